"""The inputs of both engines: the same checkpoint, inputs and settings. Imports no JAX."""

from dataclasses import dataclass

import numpy as np

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.families import open_checkpoint
from jaxdiff.families.family import CLASSIFIER_FREE

TIMESTEP = 500
XL_POOLED = "text_encoder_2"


@dataclass(frozen=True)
class Workload:
    """Settings of the measured work.

    Attributes:
      model: a diffusers directory.
      width, height: the size of the images in pixels.
      steps, guidance_scale: settings for the checkpoint's own sampler.
      batches_a_turn: batches of images; an engine may begin one before it has finished another.
      turn_seconds: the minimum length of a turn; shorter work is repeated.
      memory_fraction: the share of an accelerator's memory that an engine may use.
      compile_mode: the mode of `torch.compile`, or "off".
    """

    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    batches_a_turn: int
    turn_seconds: float
    memory_fraction: float
    compile_mode: str

    @property
    def checkpoint(self) -> Checkpoint:
        """Opens the model."""
        return open_checkpoint(self.model)

    @property
    def denoiser(self) -> str:
        """The denoiser's folder: "unet" or "transformer"."""
        return "unet" if "unet" in self.checkpoint.networks else "transformer"

    @property
    def rows_an_image(self) -> int:
        """The rows of the denoiser's batch per image: 2 with an unconditional half."""
        return 2 if self.checkpoint.defaults.guidance == CLASSIFIER_FREE else 1


def prompts(first: int, count: int) -> list[str]:
    """Returns prompts that differ from each other and from those of other numbers."""
    return [f"{number} red circles above a blue square" for number in range(first, first + count)]


def latents(work: Workload, batch: int) -> np.ndarray:
    """Returns normal float32 latents [batch, h, w, channels] for the image size."""
    defaults = work.checkpoint.defaults
    height, width = work.height // defaults.factor, work.width // defaults.factor
    shape = (batch, height, width, defaults.latent_channels)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def conditioning(work: Workload, rows: int) -> dict[str, np.ndarray]:
    """Returns the conditioning of the denoiser in float32, without the timestep.

    Returns:
      "context" [rows, tokens, width]; for Stable Diffusion XL also "pooled" [rows, width] and
      "time_ids" [rows, 6]; for FLUX.1 also "pooled" and, if it takes one, "guidance_scale" [rows].
    """
    checkpoint, random = work.checkpoint, np.random.default_rng(1)
    config = checkpoint.config(work.denoiser)
    width = config.get("cross_attention_dim") or config["joint_attention_dim"]
    shape = (rows, checkpoint.defaults.tokens, width)
    arrays = {"context": random.standard_normal(shape, np.float32)}
    if config.get("addition_embed_type") == "text_time":
        pooled = checkpoint.config(XL_POOLED)["projection_dim"]
        arrays["pooled"] = random.standard_normal((rows, pooled), np.float32)
        sizes = [work.height, work.width, 0, 0, work.height, work.width]
        arrays["time_ids"] = np.tile(np.float32(sizes), (rows, 1))
    elif pooled := config.get("pooled_projection_dim"):
        arrays["pooled"] = random.standard_normal((rows, pooled), np.float32)
        if config.get("guidance_embeds"):
            arrays["guidance_scale"] = np.full(rows, work.guidance_scale, np.float32)
    return arrays


def step_operations(work: Workload, batch: int) -> int:
    """Counts the floating-point operations of one step of a batch, guided as the model is."""
    checkpoint = work.checkpoint
    factor = checkpoint.defaults.factor
    size = work.height // factor, work.width // factor
    whole, _ = checkpoint.family.operations(checkpoint, *size, checkpoint.defaults.tokens)
    return work.rows_an_image * batch * whole


def decode_operations(work: Workload, batch: int) -> int:
    """Counts the floating-point operations of decoding a batch."""
    checkpoint = work.checkpoint
    factor = checkpoint.defaults.factor
    size = work.height // factor, work.width // factor
    return batch * checkpoint.family.decoder_operations(checkpoint, *size)


def product_size(platform: str) -> int:
    """Returns the size of the square matrices whose product measures a device's peak."""
    return 4096 if platform == "cpu" else 16384


def matrix(size: int) -> np.ndarray:
    """Returns normal float32 numbers, [size, size]."""
    return np.random.default_rng(2).standard_normal((size, size), np.float32)


def product_operations(size: int) -> int:
    """Counts the floating-point operations of the product of two square matrices."""
    return 2 * size**3
