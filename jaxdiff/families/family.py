"""The interface of a model family. Imports no JAX."""

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.ip_adapter import IPAdapterFiles
from jaxdiff.checkpoint.lora_names import Layer
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.families.image_inputs import ImageInputs
from jaxdiff.request import Bucket

if TYPE_CHECKING:
    from jaxdiff.families.model import Control, ImageAdapter, Model
    from jaxdiff.families.tokenizers.tokenizer import Tokenizer


CLASSIFIER_FREE, EMBEDDED, UNGUIDED = "classifier-free", "embedded", "unguided"
# The options that only some families have.
OWN_OPTIONS = frozenset({"clip_skip", "deep_cache", "guess_mode", "prompt_chunks", "skip_layers"})


class Defaults(Protocol):
    """A checkpoint's properties and default settings: `Checkpoint.defaults`.

    Any attribute may raise InputError when it is read, because not every checkpoint has every
    default.

    Attributes:
      name: the family's name, for example "Stable Diffusion XL".
      base_needed: whether the model is a refiner, which only takes the last steps of another
        model's images.
      size: (width, height) in pixels.
      size_multiple: the number of pixels that width and height must be multiples of.
      largest_side: the largest width or height, in pixels.
      factor: the number of pixels per latent along each side.
      latent_channels: the number of channels of the autoencoder's latents.
      latents: everything that distinguishes its latents from those of another autoencoder.
      steps, guidance_scale, sampler: as in `Request`.
      guidance: `CLASSIFIER_FREE`; `EMBEDDED` if the denoiser takes the guidance scale as an input
        instead of being evaluated twice (Meng et al., 2023, arXiv:2210.03142); or `UNGUIDED`.
      tokens: the number of a prompt's tokens that the denoiser takes.
      scheduler: the scheduler's config as the diffusers pipeline uses it.
    """

    name: str
    base_needed: bool
    size: tuple[int, int]
    size_multiple: int
    largest_side: int
    factor: int
    latent_channels: int
    latents: Mapping[str, Any]
    steps: int
    guidance_scale: float
    sampler: str
    guidance: str
    tokens: int
    scheduler: dict


class Networks(Protocol):
    """The part of a family that imports JAX; a module."""

    def read_configs(self, parsed: Mapping[str, dict]) -> dict:
        """Reads each network's parsed config strictly into its dataclass."""

    def check_counts(self, configs: Mapping, weights: Mapping[str, Sized]) -> None:
        """Raises InputError if a config describes far more weights than the files contain."""

    def module(self, component: str, config: Any) -> Callable:
        """Returns the Flax module's class for a component."""

    def build(self, configs: Mapping, index: Mapping, *, remat: bool = False) -> "Model":
        """Builds the networks, as pure functions, from configs and `model_index.json`."""

    def control(self, configs: Mapping, config: Mapping, *, remat: bool = False) -> "Control":
        """Builds a ControlNet for a model with these configs from its own parsed config.

        Raises:
          InputError: if there is none for models of this family, or it does not fit the model.
        """

    def image_adapter(self, configs: Mapping, files: IPAdapterFiles) -> "ImageAdapter":
        """Builds an IP-Adapter for a model with these configs.

        Raises:
          InputError: if there is none for models of this family, or it does not fit the model.
        """

    def for_inpainting(self, configs: Mapping) -> dict:
        """Returns the configs with a denoiser that also takes a mask and what it leaves visible.

        Raises:
          InputError: if models of this family cannot be widened in this way.
        """

    def with_guidance_input(self, configs: Mapping, width: int) -> dict:
        """Returns the configs with a denoiser that embeds the guidance scale in `width` numbers.

        Raises:
          InputError: if no model of this family can be distilled.
        """


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. To add a family, define one of these and list it in `FAMILIES`.

    Attributes:
      components: the networks of its pipelines, by folder, in the order of their use.
      absent: the `model_index.json` entries of components that its pipelines never contain.
      own_options: those of `OWN_OPTIONS` that have an effect on its models.
      check_files: raises InputError for a checkpoint that it cannot use, from the configs alone.
      defaults: returns a checkpoint's `Defaults`.
      schedule: maps (the scheduler's config, bucket) to the noise schedule. It gets the image size
        because dynamic shifts belong to the pipeline, not to the scheduler's file.
      operations: maps (checkpoint, height and width of the latents, tokens) to the floating-point
        operations of one evaluation of the denoiser for one image: of a full evaluation, and of one
        that reuses the deep features of an earlier one.
      image_noise: returns how much of its pixels and how much noise there is in the image that a
        checkpoint's denoiser enlarges, as in `objective.noisy`; None if it sees no such image.
      further_configs: further folders of its pipelines that hold a config and no weights.
      decoder_operations: maps (checkpoint, height and width of the latents) to the floating-point
        operations of decoding one image.
      tokenizer: maps (text encoder, its tokenizer's folder, its parsed config) to its tokenizer;
        raises InputError if it cannot be used. Imports transformers.
      image_inputs: returns the images that a checkpoint's denoiser takes; None if it takes none.
      sees_control: whether its models see a control image in every request, without a ControlNet.
      check_controlnet: raises InputError for a ControlNet's parsed config that does not fit a
        checkpoint, as far as the configs tell; None if there are no ControlNets for its models.
      check_ip_adapter: the same for the width of the tokens that an IP-Adapter makes.
      kohya_names: as in `checkpoint.Family`.
      networks: imports JAX and returns the module with the family's networks.
    """

    components: Mapping[str, Component]
    defaults: Callable[[Checkpoint], Defaults]
    schedule: Callable[[dict, Bucket], NoiseSchedule]
    operations: Callable[[Checkpoint, int, int, int], tuple[int, int]]
    decoder_operations: Callable[[Checkpoint, int, int], int]
    tokenizer: Callable[[str, Path, Mapping], "Tokenizer"]
    networks: Callable[[], Networks]
    image_inputs: Callable[[Checkpoint], ImageInputs | None] = lambda checkpoint: None
    image_noise: Callable[[Checkpoint], tuple[float, float] | None] = lambda checkpoint: None
    further_configs: tuple[str, ...] = ()
    kohya_names: Callable[[Checkpoint, str], Mapping[str, Layer]] = lambda checkpoint, component: {}
    absent: Mapping[str, Any] = field(default_factory=dict)
    own_options: frozenset[str] = frozenset()
    sees_control: bool = False
    check_controlnet: Callable[[Checkpoint, Mapping], None] | None = None
    check_ip_adapter: Callable[[Checkpoint, int], None] | None = None
    check_files: Callable[[Checkpoint], None] = lambda checkpoint: None
