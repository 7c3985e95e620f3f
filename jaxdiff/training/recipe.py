"""Recipes: TOML files parsed strictly into frozen dataclasses, which define all the defaults.

The nested tables are in `tables.py`.
"""

import dataclasses
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxdiff.errors import InputError
from jaxdiff.training import strict
from jaxdiff.training.tables import (
    Average,
    Checkpoints,
    Computing,
    Data,
    Degradation,
    Lora,
    Loss,
    Optimizer,
    Prior,
)
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
    "adversarial_weight": (0, ANY),
    "discriminator_features": (1, 1024),
    "degradation.rounds": (0, 4),
    "degradation.blur": (0, 10),
    "degradation.resize": (0.1, 1),
    "degradation.noise": (0, 100),
    "degradation.jpeg": (1, 95),
    "student_steps": (1, ANY),
    "solver_steps": (1, ANY),
}


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
    average: Average = field(default_factory=Average)
    computing: Computing = field(default_factory=Computing)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)


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
    data: Data = field(default_factory=Data)
    train: tuple[str, ...] | None = None
    method: Literal["full", "lora", "controlnet", "inpaint"] = "full"
    controlnet: dict = field(default_factory=dict)
    lora: Lora = field(default_factory=Lora)
    prior: Prior | None = None
    loss: Loss = field(default_factory=Loss)
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
    data: Data = field(default_factory=Data)
    guidance_scale: tuple[float, ...] = (2.0, 6.0)
    student_steps: int = 4
    solver_steps: int = 20


@dataclass(frozen=True, kw_only=True)
class UpscalerRecipe(_Run):
    """Trains a GAN upscaler on crops of images: `training/upscaler.py`.

    Attributes:
      model: an upscaler to train further; or, for a new one, one of the tables below.
      srvgg, rrdb: the fields of `SRVGGNetConfig` or of `RRDBNetConfig`.
      images: "shapes" for scenes of the shapes world, or a folder of images.
      crop: height and width in pixels of the small crops.
      gradient_weight: weight of the error in the images' finite differences, which sharpens edges.
      adversarial_weight: weight of the discriminator's verdict; 0 trains without one.
      discriminator_features: channels of the discriminator's first feature maps.
      degradation: how the small images are damaged.
    """

    model: str = ""
    srvgg: dict = field(default_factory=dict)
    rrdb: dict = field(default_factory=dict)
    images: str = "shapes"
    crop: int = 32
    gradient_weight: float = 0.5
    adversarial_weight: float = 0.0
    discriminator_features: int = 32
    degradation: Degradation = field(default_factory=Degradation)


Recipe = (
    AutoencoderRecipe | TextEncoderRecipe | TextToImageRecipe | ConsistencyRecipe | UpscalerRecipe
)
OBJECTIVES = {
    "autoencoder": AutoencoderRecipe,
    "text_encoder": TextEncoderRecipe,
    "text_to_image": TextToImageRecipe,
    "consistency": ConsistencyRecipe,
    "upscaler": UpscalerRecipe,
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
    if recipe.checkpoints.prompts and objective not in ("text_to_image", "consistency"):
        raise InputError(f'{path}: checkpoints.prompts has no effect on objective = "{objective}"')
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
