"""Recipes: TOML files parsed strictly into frozen dataclasses, which define all the defaults."""

import dataclasses
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxdiff.errors import InputError
from jaxdiff.training import strict
from jaxdiff.worlds.shapes.scene import CANVAS

ANY = sys.float_info.max
NEARLY_1 = 1.0 - 1e-9
# The smallest and largest allowed value of each number, by dotted key.
RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, ANY),
    "batch_size": (1, ANY),
    "seed": (0, 2**32 - 1),
    "optimizer.learning_rate": (1e-12, ANY),
    "optimizer.warmup_steps": (0, ANY),
    "optimizer.cooldown_steps": (0, ANY),
    "optimizer.weight_decay": (0, ANY),
    "optimizer.beta1": (0, NEARLY_1),
    "optimizer.beta2": (0, NEARLY_1),
    "optimizer.clip_norm": (0, ANY),
    "optimizer.accumulate": (1, ANY),
    "average.decay": (0, NEARLY_1),
    "average.relative_width": (0, 0.28),  # where the power function of Karras et al. becomes flat
    "checkpoints.every": (1, ANY),
    "checkpoints.keep": (1, ANY),
    "checkpoints.keep_best": (0, ANY),
    "data.size": (0, ANY),
    "data.aspect_ratios": (1, ANY),
    "data.scenes": (2, ANY),  # one to train on, one to validate on
    "loss.logit_mean": (-ANY, ANY),
    "loss.logit_std": (0, ANY),
    "loss.min_snr_gamma": (0, ANY),
    "loss.offset_noise": (0, ANY),
    "loss.places": (0, ANY),
    "lora.rank": (1, ANY),
    "lora.alpha": (0, ANY),
    "prior.images": (1, ANY),
    "prior.weight": (0, ANY),
    "caption_dropout": (0, 1),
    "kl_weight": (0, ANY),
    "gradient_weight": (0, ANY),
    "crop": (1, CANVAS),
    "student_steps": (1, ANY),
    "solver_steps": (1, ANY),
}


@dataclass(frozen=True)
class Optimizer:
    """How gradients are turned into updates.

    Attributes:
      name: "adamw" (Loshchilov and Hutter, 2019), "adafactor", "lion", "muon" or "sgd", from optax.
      learning_rate: the peak learning rate.
      schedule: "cosine" decay to zero after the warm-up, or "constant".
      warmup_steps: steps of linear growth from zero.
      cooldown_steps: steps of linear decay to zero at the end of a constant schedule (Hägele et
        al., 2024, arXiv:2405.18392).
      weight_decay: decoupled from the gradient; applies only to kernels and embeddings.
      beta1, beta2: decay rates of the moments, for optimizers that have them.
      clip_norm: the maximum norm of the gradient; 0 disables clipping.
      accumulate: the number of batches whose gradients are averaged for one update.
    """

    learning_rate: float
    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 200
    cooldown_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0
    accumulate: int = 1


@dataclass(frozen=True)
class Average:
    """The exponential moving average of the weights; these are the weights that are exported.

    Attributes:
      decay: the decay per step. It starts lower, at (1 + step) / (10 + step), to forget the random
        initial weights.
      relative_width: if not 0, the average covers a fixed fraction of the training so far: the
        standard deviation of the power function of Karras et al., 2024, arXiv:2312.02696, 3.1.
    """

    decay: float = 0.999
    relative_width: float = 0.0


@dataclass(frozen=True)
class Computing:
    """Precision, rematerialization and sharding.

    Attributes:
      dtype: the dtype of activations and of the weights in computations; the stored weights are
        float32.
      remat: recompute activations in the backward pass instead of storing them (gradient
        checkpointing; Chen et al., 2016, arXiv:1604.06174).
      shard: also split weights and optimizer state across the devices (Rajbhandari et al., 2020,
        arXiv:1910.02054, stage 3, known as FSDP).
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    shard: bool = False


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are written, and which are kept.

    Attributes:
      every: steps between checkpoints, each with a sample grid and a validation.
      keep: how many of the newest checkpoints to keep.
      keep_best: how many checkpoints with the lowest validation loss to keep as well.
    """

    every: int = 500
    keep: int = 2
    keep_best: int = 1


@dataclass(frozen=True)
class Data:
    """Captioned images.

    Attributes:
      path: "shapes" for the shapes world; a folder of images with metadata.jsonl, of WebDataset
        shards or of Parquet files; a dataset from `jaxdiff generate`; the output of
        `pipelines.encode`.
      captions: the column (or the file extension) of the captions; "" detects it.
      control: method "controlnet" only: the column (or the file extension) of the control images,
        each as large as its image. The shapes world draws outlines.
      size: in pixels, the side of the square whose area images are resized to; 0 for the model's.
      aspect_ratios: the largest aspect ratio of the buckets, and inverted the smallest; 1 crops to
        squares.
      flip: mirror half of the images; only for captions that never mention left or right.
      scenes: shapes world only: how many scenes are drawn and encoded before training starts.
      composed: shapes world only: objects are large and evenly spread instead of randomly placed.
      templates: shapes world only: the caption templates. A template listed twice is drawn twice as
        often; an empty list means all templates.
      held_out: shapes world only: "color shape" pairs excluded from every scene and caption.
    """

    path: str = "shapes"
    captions: str = ""
    control: str = "conditioning_image"
    size: int = 0
    aspect_ratios: float = 1.0
    flip: bool = False
    scenes: int = 65536
    composed: bool = False
    templates: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loss:
    """The weights and noise settings of the denoising loss.

    Attributes:
      timesteps: their distribution: "uniform", or "logit_normal" (Esser et al., 2024,
        arXiv:2403.03206, equation 19) with the two values below. For flow matching, the scheduler's
        `shift` is applied after that (equation 23), unless it is dynamic.
      logit_mean, logit_std: mean and standard deviation of the logit of the timestep, scaled to
        [0, 1]; a mean above 0 gives more noise, a mean of ln(s) is a shift of s.
      min_snr_gamma: limits the weight of low noise levels (Hang et al., 2023, arXiv:2303.09556);
        0 disables this.
      offset_noise: standard deviation of noise that is constant across a channel (Guttenberg,
        2023); 0 disables it.
      places: weight of the auxiliary loss for locating each shape of the shapes world
        (`training/shapes/places.py`); 0 disables it.
    """

    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float = 0.0
    offset_noise: float = 0.0
    places: float = 0.0


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the attention matrices (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
      rank: the rank of the updates.
      alpha: the updates are scaled by alpha / rank; 0 sets alpha to the rank.
      text_encoder: whether to train the attention of the text encoders too.
    """

    rank: int = 8
    alpha: float = 0.0
    text_encoder: bool = False


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (Ruiz et al., 2023, arXiv:2208.12242, 3.3).

    Attributes:
      prompt: the prompt for the class images, which the model generates before training starts.
      images: how many class images to generate.
      weight: the weight of their loss; the loss of the subject's images has weight 1.
    """

    prompt: str
    images: int = 100
    weight: float = 1.0


@dataclass(frozen=True)
class _Run:
    """The settings common to all recipes.

    Attributes:
      objective: what to train, a key of `OBJECTIVES`.
      steps, batch_size: the number of optimizer updates and of images in each batch.
      seed: the seed of initial weights, noise and data order.
    """

    objective: str
    steps: int
    batch_size: int
    optimizer: Optimizer
    seed: int = 0
    average: Average = Average()
    computing: Computing = Computing()
    checkpoints: Checkpoints = Checkpoints()


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe(_Run):
    """Trains an `AutoencoderKL` on scenes rendered on the fly.

    Attributes:
      kl_weight: weight of the KL divergence per latent value, relative to the loss per pixel value.
      gradient_weight: weight of the error in the images' finite differences, which sharpens edges.
      crop: height and width in pixels of a random crop of each scene.
      vae: the keys of the autoencoder's `config.json`.
    """

    vae: dict
    kl_weight: float = 1e-5
    gradient_weight: float = 0.5
    crop: int = 64


@dataclass(frozen=True, kw_only=True)
class TextEncoderRecipe(_Run):
    """Trains a CLIP text encoder to understand captions of the shapes world.

    Attributes:
      tokenizer: a directory in the `CLIPTokenizer` format.
      text_encoder: a table with the keys of `config.json` for a new encoder, or a folder to load it
        from.
    """

    tokenizer: str
    text_encoder: dict | str


@dataclass(frozen=True, kw_only=True)
class TextToImageRecipe(_Run):
    """Trains a denoiser on captioned images, from scratch or from a checkpoint.

    A component is either a table with the keys of its `config.json`, for a new one, or a folder to
    load it from.

    Attributes:
      model: a checkpoint that `jaxdiff generate` accepts; provides all components not set below.
      pipeline: without a `model`, the new model's pipeline class in diffusers, which determines its
        components.
      vae, tokenizer: directories; the tokenizer is that of every text encoder.
      text_encoder, text_encoder_2, text_encoder_3, unet, transformer: tables or directories.
      scheduler: the keys of `scheduler_config.json`; missing keys are taken from `model`.
      data: the captioned images.
      train: the components to train, by default the denoiser; the others are frozen.
      method: "full"; "lora" for low-rank updates of frozen weights; "controlnet" for a ControlNet
        beside a frozen U-Net; or "inpaint" to train in full after widening the U-Net to take a mask
        and what it leaves visible.
      controlnet: the keys of the ControlNet's `config.json` that differ from the U-Net's.
      lora: the LoRA settings.
      prior: DreamBooth's prior preservation.
      loss: the settings of the denoising loss.
      caption_dropout: the fraction of captions replaced by the empty one, for classifier-free
        guidance; models without it see every caption.
    """

    model: str = ""
    pipeline: str = ""
    vae: str = ""
    tokenizer: str = ""
    text_encoder: dict | str = ""
    text_encoder_2: dict | str = ""
    text_encoder_3: dict | str = ""
    unet: dict | str = ""
    transformer: dict | str = ""
    scheduler: dict = field(default_factory=dict)
    data: Data = Data()
    train: tuple[str, ...] | None = None
    method: Literal["full", "lora", "controlnet", "inpaint"] = "full"
    controlnet: dict = field(default_factory=dict)
    lora: Lora = Lora()
    prior: Prior | None = None
    loss: Loss = Loss()
    caption_dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ConsistencyRecipe(_Run):
    """Distils a model into a guidance-conditioned few-step student: `training/consistency.py`.

    Attributes:
      model: the teacher, a checkpoint that `jaxdiff generate` accepts.
      student: an earlier student whose U-Net to train further; "" starts from the teacher's.
      data: the source of the captions; its images are not used.
      guidance_scale: the lowest and the highest guidance scale to train on.
      student_steps: the number of steps in which the student generates an image.
      solver_steps: the number of teacher evaluations per image, split evenly among the student's
        steps.
    """

    model: str
    student: str = ""
    data: Data = Data()
    guidance_scale: tuple[float, ...] = (2.0, 6.0)
    student_steps: int = 4
    solver_steps: int = 20


Recipe = AutoencoderRecipe | TextEncoderRecipe | TextToImageRecipe | ConsistencyRecipe
OBJECTIVES = {
    "autoencoder": AutoencoderRecipe,
    "text_encoder": TextEncoderRecipe,
    "text_to_image": TextToImageRecipe,
    "consistency": ConsistencyRecipe,
}


def read(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
      InputError: naming the file and the key, for an unknown, missing or mistyped key.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: recipe file not found") from None
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from None
    objective = data.get("objective")
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise InputError(
            f"{path}: objective = {objective!r}; it must be one of {', '.join(OBJECTIVES)}"
        )
    recipe = strict.build(OBJECTIVES[objective], data, f"{path}: ")
    for name, value in flat(dataclasses.asdict(recipe)).items():
        low, high = RANGES.get(name, (value, value))
        if name in RANGES and not low <= value <= high:
            wanted = f"at least {low}" if high == ANY else f"from {low} to {high}"
            raise InputError(f"{path}: {name} must be {wanted}, not {value}")
    warmup, cooldown = recipe.optimizer.warmup_steps, recipe.optimizer.cooldown_steps
    if cooldown and recipe.optimizer.schedule != "constant":
        raise InputError(
            f'{path}: optimizer.cooldown_steps requires optimizer.schedule = "constant"'
        )
    if cooldown and warmup + cooldown > recipe.steps:
        raise InputError(
            f"{path}: optimizer.warmup_steps and cooldown_steps add up to {warmup + cooldown}, "
            f"more than steps = {recipe.steps}"
        )
    return recipe


def flat(table: dict, before: str = "") -> dict:
    """Flattens a nested table into one with dotted keys."""
    found = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found
