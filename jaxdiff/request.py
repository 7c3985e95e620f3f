"""What one image is asked to be, and what all images of a run share. Imports no JAX."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxdiff import checks


class Bucket(NamedTuple):
    """What the images of one batch have in common: it decides the compiled program and its tables.

    Prompts, seeds and guidance scales differ freely within a batch.
    """

    width: int
    height: int
    steps: int
    guided: bool
    sampler: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image to make. `None` means what the model prefers.

    Attributes:
      prompt: what the image shows.
      negative_prompt: what classifier-free guidance steers away from.
      seed: 0 to 2**32 - 1; with the same model and settings it fixes every pixel.
      width, height: pixels, multiples of the autoencoder's factor (8 for Stable Diffusion).
      steps: of the sampler, at least 1.
      guidance_scale: w in uncond + w (cond - uncond); guidance is off at 1 and below.
      sampler: one of `samplers.SAMPLERS`; `None` takes the one the model's scheduler names.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None

    @property
    def bucket(self) -> Bucket:
        """The batches that this image may be part of, once nothing is None."""
        return Bucket(self.width, self.height, self.steps, self.guidance_scale > 1, self.sampler)


class Field(NamedTuple):
    """A value of a `Request`: what it must be, and how it is stored.

    Attributes:
      check: one of `checks`.
      arguments: of the check, as far as they do not depend on the model.
      column: the type of its column in Parquet, by Arrow's name.
    """

    check: Callable
    arguments: tuple
    column: str


# The one table of a request's fields, in the order in which they are written.
FIELDS = {
    "prompt": Field(checks.text, (), "string"),
    "negative_prompt": Field(checks.text, (), "string"),
    "seed": Field(checks.integer, (0, checks.MAX_SEED), "int64"),
    "width": Field(checks.side, (), "int32"),
    "height": Field(checks.side, (), "int32"),
    "steps": Field(checks.integer, (1, checks.MAX_STEPS), "int32"),
    "guidance_scale": Field(checks.number, (0, checks.MAX_GUIDANCE_SCALE), "float64"),
    "sampler": Field(checks.choice, (), "string"),
}


def field_checks(size_multiple: int, samplers: Sequence[str]) -> dict[str, tuple]:
    """How each value of a `Request` is checked for a model: by name, the check and its arguments.

    Args:
      size_multiple: of width and height, in pixels.
      samplers: the names of those that the model can take.
    """
    of_model = {"width": (size_multiple,), "height": (size_multiple,), "sampler": (samplers,)}
    return {
        name: (field.check, *field.arguments, *of_model.get(name, ()))
        for name, field in FIELDS.items()
    }


# The metadata of an option or a setting that came after the first plans of version 5. Identities
# leave it out where it has its default: `settings.written`.
LATER = {"later": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is loaded and sampled: the same for every image of a run.

    Attributes:
      dtype: "float32" or "bfloat16", of the weights and of the networks' arithmetic.
      noise: "jax", or "torch" for the noise that PyTorch's CPU generator draws.
      mesh: such as "data=4,model=2"; None lets every device take its part of each batch.
      scheduler: changes to `scheduler_config.json`, by diffusers' names, such as
        "use_karras_sigmas=true, timestep_spacing=trailing".
      eta: how much of DDIM's noise is drawn anew, 0 to 1 (arXiv:2010.02502, equation 16).
      guidance_rescale: phi, 0 to 1, against overexposure (Lin et al., 2024, arXiv:2305.08891, 3.4).
      guidance_start, guidance_stop: the stretch of the steps that is guided, as fractions from 0
        to 1 (Kynkäänniemi et al., 2024, arXiv:2404.07724); the others cost half as much.
      clip_skip: how many of the text encoder's last layers are left out.
      prompt_chunks: how many stretches of 75 tokens a prompt may have; what is longer is cut.
      refiner_start: the share of the noise levels after which a refiner takes over, 0 to 1.
      deep_cache: of so many evaluations of the U-Net in turn only the first is computed whole; the
        others take what its deep layers made (Ma et al., 2023, arXiv:2312.00858). 1: all whole.
    """

    dtype: str = "float32"
    noise: str = "jax"
    mesh: str | None = None
    scheduler: str = ""
    eta: float = 0.0
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    clip_skip: int = 0
    prompt_chunks: int = 1
    refiner_start: float = 0.8
    deep_cache: int = 1


FRACTION = (checks.number, 0, 1)
# How each of `Options` is checked, likewise.
OPTION_CHECKS = {
    "dtype": (checks.choice, checks.DTYPES),
    "noise": (checks.choice, checks.NOISES),
    "mesh": (checks.text,),
    "scheduler": (checks.scheduler,),
    "eta": FRACTION,
    "guidance_rescale": FRACTION,
    "guidance_start": FRACTION,
    "guidance_stop": FRACTION,
    "clip_skip": (checks.integer, 0, checks.MAX_CLIP_SKIP),
    "prompt_chunks": (checks.integer, 1, checks.MAX_PROMPT_CHUNKS),
    "refiner_start": FRACTION,
    "deep_cache": (checks.integer, 1, checks.MAX_DEEP_CACHE),
}
