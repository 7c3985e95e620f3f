"""Recipes: TOML files read strictly into frozen dataclasses. A default stands here or nowhere."""

import dataclasses
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

from jaxdiff.errors import InputError


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), linear warm-up, then cosine decay to zero."""

    learning_rate: float
    warmup_steps: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Trains an `AutoencoderKL` on scenes rendered on the fly.

    Attributes:
      steps, batch_size: optimizer updates, and images in each.
      ema_decay: of the exponential moving average of the weights, which is what is exported.
      kl_weight: of the KL divergence per latent value, against the loss per pixel value.
      gradient_weight: of the error of the images' finite differences, which sharpens edges.
      vae: the keys of the component's `config.json`.
    """

    objective: str
    steps: int
    batch_size: int
    optimizer: Optimizer
    vae: dict
    seed: int = 0
    ema_decay: float = 0.999
    save_every: int = 500
    kl_weight: float = 1e-5
    gradient_weight: float = 0.5


@dataclass(frozen=True)
class DecoderRecipe:
    """Trains the decoder of an autoencoder further; its latents stay what they are.

    Attributes:
      autoencoder: a directory that an autoencoder recipe wrote.
      latent_noise: standard deviation of the noise on the latents, whose own is 1, so that the
        decoder forgives what a denoiser leaves.
      seed: another than the autoencoder's, for other scenes.
    """

    objective: str
    steps: int
    batch_size: int
    optimizer: Optimizer
    autoencoder: str
    seed: int = 1
    ema_decay: float = 0.999
    save_every: int = 500
    gradient_weight: float = 0.5
    latent_noise: float = 0.05


@dataclass(frozen=True)
class TextToImageRecipe:
    """Trains a CLIP text encoder and a U-Net together, on latents that are encoded once.

    Attributes:
      autoencoder: a directory that an autoencoder or decoder recipe wrote.
      tokenizer: a directory in the `CLIPTokenizer` format.
      scenes: how many scenes are rendered and encoded before training starts.
      caption_dropout: the share of captions replaced by the empty one, for guidance.
      text_encoder, unet, scheduler: the keys of the components' JSON files.
    """

    objective: str
    steps: int
    batch_size: int
    optimizer: Optimizer
    autoencoder: str
    tokenizer: str
    scenes: int
    text_encoder: dict
    unet: dict
    scheduler: dict
    seed: int = 0
    ema_decay: float = 0.9995
    save_every: int = 1000
    caption_dropout: float = 0.1


Recipe = AutoencoderRecipe | DecoderRecipe | TextToImageRecipe
OBJECTIVES = {
    "autoencoder": AutoencoderRecipe,
    "decoder": DecoderRecipe,
    "text_to_image": TextToImageRecipe,
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
    if objective not in OBJECTIVES:
        raise InputError(
            f"{path}: objective = {objective!r}; it must be one of {', '.join(OBJECTIVES)}"
        )
    recipe = _build(OBJECTIVES[objective], data, f"{path}: ")
    for name in ("steps", "batch_size", "save_every"):
        if getattr(recipe, name) < 1:
            raise InputError(f"{path}: {name} must be at least 1")
    return recipe


def _build(cls, data: dict, where: str):
    types = typing.get_type_hints(cls)
    unknown = sorted(data.keys() - types.keys())
    if unknown:
        raise InputError(f"{where}{unknown[0]} is no key of a {cls.__name__}")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name not in data:
            if field.default is dataclasses.MISSING:
                raise InputError(f"{where}{field.name} is missing")
            continue
        values[field.name] = _value(types[field.name], data[field.name], where + field.name)
    return cls(**values)


def _value(kind: type, value, where: str):
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, f"{where}.")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} must be a {kind.__name__}, not {value!r}")
    return value
