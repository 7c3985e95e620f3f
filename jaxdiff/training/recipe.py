"""Recipes: TOML files read strictly into frozen dataclasses. A default stands here or nowhere."""

import dataclasses
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxdiff.errors import InputError, meant
from jaxdiff.worlds.shapes.scene import CANVAS

ANY = sys.float_info.max
NEARLY_1 = 1.0 - 1e-9
# The least and the largest value of every number, by its dotted key.
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
    """How gradients become updates.

    Attributes:
      name: "adamw" (Loshchilov and Hutter, 2019), "adafactor", "lion", "muon" or "sgd", of optax.
      learning_rate: the highest.
      schedule: after the warm-up, "cosine" decay to zero or "constant".
      warmup_steps: of linear growth from zero.
      cooldown_steps: the last ones of a constant schedule, of linear decay to zero (Hägele et al.,
        2024, arXiv:2405.18392).
      weight_decay: decoupled from the gradient; kernels and embeddings alone decay.
      beta1, beta2: decay of the moments, for those that have them.
      clip_norm: longer gradients are shortened to this; 0 leaves them.
      accumulate: batches whose mean gradient makes one step.
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
    """The exponential moving average of the weights, which is what is exported.

    Attributes:
      decay: a step. It begins lower, as (1 + step) / (10 + step), to forget the random start.
      relative_width: if not 0, the average reaches back over a fixed share of the training so far:
        the standard deviation of the power function of Karras et al., 2024, arXiv:2312.02696, 3.1.
    """

    decay: float = 0.999
    relative_width: float = 0.0


@dataclass(frozen=True)
class Computing:
    """Where and in what precision it is computed.

    Attributes:
      dtype: of activations and of the weights in products; the weights themselves are float32.
      remat: recompute activations in the backward pass instead of keeping them (gradient
        checkpointing; Chen et al., 2016, arXiv:1604.06174).
      shard: split weights and optimizer state over the devices too (Rajbhandari et al., 2020,
        arXiv:1910.02054, stage 3, known as FSDP).
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    shard: bool = False


@dataclass(frozen=True)
class Checkpoints:
    """What is kept of a run on disk.

    Attributes:
      every: steps between two checkpoints, sample grids and validations.
      keep: how many of the newest stay.
      keep_best: how many of those with the lowest validation loss stay beside them.
    """

    every: int = 500
    keep: int = 2
    keep_best: int = 1


@dataclass(frozen=True)
class Data:
    """Captioned images.

    Attributes:
      path: "shapes" for the shapes world; a folder of images with metadata.jsonl, of WebDataset
        shards or of Parquet files; a dataset of `jaxdiff generate`; what `pipelines.encode` made.
      captions: the column (or the file ending) that holds the caption; "" finds it.
      size: pixels; the side of a square of the area that images are brought to. 0 is the model's.
      aspect_ratios: widest and, inverted, tallest ratio of the buckets; 1 crops to squares.
      flip: mirror half of the images; only where captions know no left and right.
      scenes: of the shapes world: how many are drawn and encoded once, before training starts.
      composed: of the shapes world: objects are large and spread evenly, instead of lying anywhere.
      templates: of the shapes world: the captions' templates; one named twice comes twice as often,
        and if none is named, all are drawn.
      held_out: of the shapes world: "color shape" pairs that no scene and no caption may have.
    """

    path: str = "shapes"
    captions: str = ""
    size: int = 0
    aspect_ratios: float = 1.0
    flip: bool = False
    scenes: int = 65536
    composed: bool = False
    templates: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loss:
    """What of the denoising loss counts how much.

    Attributes:
      timesteps: how they are drawn: "uniform", or "logit_normal" (Esser et al., 2024,
        arXiv:2403.03206, 3.1) with the two values below.
      logit_mean, logit_std: of the logit of the timestep's share of all; above 0 is more noise.
      min_snr_gamma: bounds the weight of little noise (Hang et al., 2023, arXiv:2303.09556); 0: no.
      offset_noise: standard deviation of noise that is the same all over a channel (Guttenberg,
        2023); 0: none.
      places: weight of the error in telling where each shape of the shapes world lies, a second
        task beside the denoising (`training/shapes/places.py`); 0: not asked.
    """

    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float = 0.0
    offset_noise: float = 0.0
    places: float = 0.0


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of the attention's matrices (Hu et al., 2021, arXiv:2106.09685).

    Attributes:
      rank: of the updates.
      alpha: they are scaled by alpha / rank; 0 is the rank.
      text_encoder: whether its attention is taught too.
    """

    rank: int = 8
    alpha: float = 0.0
    text_encoder: bool = False


@dataclass(frozen=True)
class Prior:
    """DreamBooth's prior preservation (Ruiz et al., 2023, arXiv:2208.12242, 3.3).

    Attributes:
      prompt: of the class; its images are made by the model itself, before training starts.
      images: how many.
      weight: of their loss against that of the subject's images.
    """

    prompt: str
    images: int = 100
    weight: float = 1.0


@dataclass(frozen=True)
class _Run:
    """What every recipe says.

    Attributes:
      objective: what is trained.
      steps, batch_size: optimizer updates, and images in each batch.
      seed: of weights, noise and the order of the data.
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
      kl_weight: of the KL divergence per latent value, against the loss per pixel value.
      gradient_weight: of the error of the images' finite differences, which sharpens edges.
      crop: height and width in pixels of what is cut out of each scene, somewhere.
      vae: the keys of the component's `config.json`.
    """

    vae: dict
    kl_weight: float = 1e-5
    gradient_weight: float = 0.5
    crop: int = 64


@dataclass(frozen=True, kw_only=True)
class TextEncoderRecipe(_Run):
    """Trains a CLIP text encoder to tell what a caption of the shapes world says.

    Attributes:
      tokenizer: a directory in the `CLIPTokenizer` format.
      text_encoder: a table, the keys of its `config.json`, and made anew; or a folder, and loaded.
    """

    tokenizer: str
    text_encoder: dict | str


@dataclass(frozen=True, kw_only=True)
class TextToImageRecipe(_Run):
    """Trains a denoiser on captioned images, from nothing or from a checkpoint.

    A component is a table, the keys of its `config.json`, and made anew; or a folder, and loaded.

    Attributes:
      model: a checkpoint that `jaxdiff generate` could use: what is not named below comes from it.
      vae, tokenizer: directories.
      text_encoder, unet: tables or directories.
      scheduler: the keys of `scheduler_config.json`; those of `model` stand where it says nothing.
      data: the captioned images.
      train: the components that learn; the others stay as they are.
      method: "full", or "lora": small updates beside weights that stay as they are.
      lora: its settings.
      prior: for DreamBooth.
      loss: what counts how much.
      caption_dropout: the share of captions replaced by the empty one, for guidance.
    """

    model: str = ""
    vae: str = ""
    tokenizer: str = ""
    text_encoder: dict | str = ""
    unet: dict | str = ""
    scheduler: dict = field(default_factory=dict)
    data: Data = Data()
    train: tuple[str, ...] = ("unet",)
    method: Literal["full", "lora"] = "full"
    lora: Lora = Lora()
    prior: Prior | None = None
    loss: Loss = Loss()
    caption_dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ConsistencyRecipe(_Run):
    """Distils a model into one of few steps, told the guidance scale: `training/consistency.py`.

    Attributes:
      model: the teacher, a checkpoint that `jaxdiff generate` could use.
      student: an earlier student whose U-Net goes on learning; one begins as its teacher.
      data: whose captions are drawn; its images are not needed.
      guidance_scale: the lowest and the highest that the student is taught.
      student_steps: in which the student makes an image.
      solver_steps: evaluations of the teacher for an image, as many for each step of the student.
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
        raise InputError(f"{path}: there is no such recipe") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a readable TOML file: {error}") from None
    objective = data.get("objective")
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise InputError(
            f"{path}: objective = {objective!r}; it must be one of {', '.join(OBJECTIVES)}"
        )
    recipe = _build(OBJECTIVES[objective], data, f"{path}: ")
    for name, value in flat(dataclasses.asdict(recipe)).items():
        low, high = RANGES.get(name, (value, value))
        if name in RANGES and not low <= value <= high:
            wanted = f"at least {low}" if high == ANY else f"from {low} to {high}"
            raise InputError(f"{path}: {name} must be {wanted}, not {value}")
    warmup, cooldown = recipe.optimizer.warmup_steps, recipe.optimizer.cooldown_steps
    if cooldown and recipe.optimizer.schedule != "constant":
        raise InputError(f"{path}: optimizer.cooldown_steps is for a constant schedule")
    if cooldown and warmup + cooldown > recipe.steps:
        raise InputError(
            f"{path}: optimizer.warmup_steps and cooldown_steps are {warmup + cooldown} together, "
            f"more than steps = {recipe.steps}"
        )
    return recipe


def flat(table: dict, before: str = "") -> dict:
    """A nested table with dotted keys."""
    found = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _build(cls, data: dict, where: str):
    kinds = typing.get_type_hints(cls)
    for key in data:
        if key not in kinds:
            hint = meant(key, kinds) or f"; it has {', '.join(sorted(kinds))}"
            raise InputError(f"{where}{key} is not known{hint}")
    values = {}
    for spec in dataclasses.fields(cls):
        if spec.name in data:
            values[spec.name] = _value(kinds[spec.name], data[spec.name], where + spec.name)
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}{spec.name} is missing")
    return cls(**values)


def _value(kind, value, where: str):
    """`value`, if it is of this kind; a table becomes a dataclass, an array a tuple."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for one in kinds:
        if dataclasses.is_dataclass(one) and isinstance(value, dict):
            return _build(one, value, f"{where}.")
        if typing.get_origin(one) is Literal and value in typing.get_args(one):
            return value
        if typing.get_origin(one) is tuple and isinstance(value, list):
            item = typing.get_args(one)[0]
            return tuple(_value(item, part, f"{where}[{i}]") for i, part in enumerate(value))
        if one is float and type(value) is int:
            return float(value)
        if isinstance(one, type) and type(value) is one:
            return value
    wanted = " or ".join(_told(one) for one in kinds if one is not types.NoneType)
    raise InputError(f"{where} must be {wanted}, not {value!r}")


def _told(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "an array"
    if dataclasses.is_dataclass(kind) or kind is dict:
        return "a table"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
