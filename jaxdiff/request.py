"""What one image is asked to be. Imports no JAX, so that planning needs none."""

from dataclasses import dataclass
from typing import NamedTuple

SAMPLERS = ("ddim", "euler", "dpmpp_2m")
MAX_SEED = 2**32 - 1


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
      steps: denoiser evaluations, at least 1.
      guidance_scale: w in uncond + w (cond - uncond); guidance is off at 1 and below.
      sampler: one of `SAMPLERS`; `None` takes the one the model's scheduler names.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance_scale: float = 3.0
    sampler: str | None = None

    @property
    def bucket(self) -> Bucket:
        """The batches that this image may be part of."""
        return Bucket(self.width, self.height, self.steps, self.guidance_scale > 1, self.sampler)
