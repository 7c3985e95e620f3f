"""What a model family is: the one place that knows what its checkpoints are for. Imports no JAX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.request import Bucket

if TYPE_CHECKING:
    from jaxdiff.families.model import Model


class Defaults(Protocol):
    """What a checkpoint is and makes when nothing else is asked for: `Checkpoint.defaults`.

    Each may raise InputError when it is asked for: not every checkpoint has every default.

    Attributes:
      name: of its family, such as "Stable Diffusion XL".
      base_needed: whether it only takes the last steps of another model's images: a refiner.
      size: (width, height) in pixels.
      size_multiple: what width and height must be multiples of.
      latent_channels: the channels of the autoencoder's latents.
      latents: all that distinguishes its latents from those of another autoencoder.
      steps, guidance_scale, sampler: as in `Request`.
      guidance_is_input: whether the denoiser takes the guidance scale as an input instead of being
        evaluated twice (Meng et al., 2023, arXiv:2210.03142).
      tokens: positions of the text encoder.
      scheduler: the config of its scheduler as the pipeline of diffusers uses it.
    """

    name: str
    base_needed: bool
    size: tuple[int, int]
    size_multiple: int
    latent_channels: int
    latents: Mapping[str, Any]
    steps: int
    guidance_scale: float
    sampler: str
    guidance_is_input: bool
    tokens: int
    scheduler: dict


@dataclass(frozen=True, kw_only=True)
class Family:
    """The page of a family. A new family is one such value and a line in `FAMILIES`.

    Attributes:
      components: the networks of its pipelines, by their folders, in the order of their use.
      denoiser, codec: which of these denoises, and which turns latents into pixels.
      absent: what `model_index.json` says of parts of the pipeline that are never there.
      check_files: raises InputError for a checkpoint that it cannot use, from its configs alone.
      defaults: see `Defaults`.
      schedule: (the scheduler's config, bucket) to the noise schedule. It sees the size: dynamic
        shifts belong to the pipeline, not to the scheduler's file.
      operations: floating-point operations of one evaluation of the denoiser for one image:
        (checkpoint, height, width of the latents, tokens) to those of a whole evaluation and those
        of one that takes its deep features from an earlier one.
      decoder_operations: those of decoding: (checkpoint, height, width of the latents).
      kohya_names: as `checkpoint.Family` has it.
      read_configs: (component to parsed config) to the config dataclasses, read strictly; loads
        JAX.
      module: (component, config dataclass) to the Flax module's class; loads JAX.
      build: (configs, `model_index.json`) to the family's networks as pure functions; loads JAX.
      with_guidance_input: (configs, width) to those of a denoiser that embeds the guidance scale in
        so many numbers; None for a family that is not distilled here.
    """

    components: Mapping[str, Component]
    denoiser: str
    codec: str
    absent: Mapping[str, Any]
    check_files: Callable[[Checkpoint], None]
    defaults: Callable[[Checkpoint], Defaults]
    schedule: Callable[[dict, Bucket], NoiseSchedule]
    operations: Callable[[Checkpoint, int, int, int], tuple[int, int]]
    decoder_operations: Callable[[Checkpoint, int, int], int]
    kohya_names: Callable[[Checkpoint, str], Mapping[str, str]]
    read_configs: Callable[[Mapping[str, dict]], dict]
    module: Callable[[str, Any], Callable]
    build: Callable[..., "Model"]
    with_guidance_input: Callable[[Mapping, int], dict] | None = None
