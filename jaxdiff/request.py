"""What one image is asked to be, and what all images of a run share. Imports no JAX."""

from dataclasses import dataclass
from typing import NamedTuple

SAMPLERS = (
    *("ddim", "ddpm", "pndm", "euler", "euler_ancestral", "heun"),
    *("dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"),
)
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
      steps: of the sampler, at least 1.
      guidance_scale: w in uncond + w (cond - uncond); guidance is off at 1 and below.
      sampler: one of `SAMPLERS`; `None` takes the one the model's scheduler names.
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
