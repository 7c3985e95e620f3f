"""What both engines are given: the same checkpoint, inputs and settings. Imports no JAX."""

from dataclasses import dataclass

import numpy as np

from jaxdiff.checkpoint.checkpoint import Checkpoint, open_checkpoint
from jaxdiff.families import operations

GUIDED_PAIR = 2  # rows of a U-Net's batch for an image
TIMESTEP = 500
XL_POOLED, XL_TIME_IDS = "text_encoder_2", 6


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
      model: a diffusers directory.
      width, height: of the images, pixels.
      steps, guidance_scale: of the checkpoint's own sampler.
      batches_a_turn: of images; an engine may begin one before it has finished another.
      turn_seconds: what is shorter is repeated for so long.
      memory_fraction: of an accelerator's memory, what an engine may take.
      compile_mode: of `torch.compile`, or "off".
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
        """The opened model."""
        return open_checkpoint(self.model)


def prompts(first: int, count: int) -> list[str]:
    """Prompts that differ from each other and from those of other numbers."""
    return [f"{number} red circles above a blue square" for number in range(first, first + count)]


def latents(work: Workload, batch: int) -> np.ndarray:
    """Normal float32 numbers [batch, h, w, channels], an image's size."""
    factor, channels = work.checkpoint.size_multiple, work.checkpoint.latent_channels
    shape = (batch, work.height // factor, work.width // factor, channels)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def conditioning(work: Workload, rows: int) -> dict[str, np.ndarray]:
    """What the U-Net is told, but for the timestep, float32.

    Returns:
      "context" [rows, tokens, width]; for Stable Diffusion XL also "pooled" [rows, width] and
      "time_ids" [rows, 6].
    """
    checkpoint, random = work.checkpoint, np.random.default_rng(1)
    width = checkpoint.config("unet")["cross_attention_dim"]
    told = {"context": random.standard_normal((rows, _tokens(checkpoint), width), np.float32)}
    if checkpoint.config("unet").get("addition_embed_type") == "text_time":
        pooled = checkpoint.config(XL_POOLED)["projection_dim"]
        told["pooled"] = random.standard_normal((rows, pooled), np.float32)
        sizes = [work.height, work.width, 0, 0, work.height, work.width]
        told["time_ids"] = np.tile(np.float32(sizes), (rows, 1))
    return told


def step_operations(work: Workload, batch: int) -> int:
    """Floating-point operations of one guided step of a batch."""
    checkpoint = work.checkpoint
    factor = checkpoint.size_multiple
    size = work.height // factor, work.width // factor
    weights = checkpoint.weights("unet")
    return GUIDED_PAIR * batch * operations.of_network(weights, *size, _tokens(checkpoint))


def decode_operations(work: Workload, batch: int) -> int:
    """Floating-point operations of decoding a batch."""
    checkpoint = work.checkpoint
    factor = checkpoint.size_multiple
    weights = {
        key.removeprefix("decoder."): tensor
        for key, tensor in checkpoint.weights("vae").items()
        if key.startswith(("decoder.", "post_quant_conv."))
    }
    return batch * operations.of_network(weights, work.height // factor, work.width // factor)


def product_size(platform: str) -> int:
    """Of the square matrices whose product stands for what a device can do at most."""
    return 4096 if platform == "cpu" else 16384


def matrix(size: int) -> np.ndarray:
    """Normal float32 numbers, [size, size]."""
    return np.random.default_rng(2).standard_normal((size, size), np.float32)


def product_operations(size: int) -> int:
    """Floating-point operations of the product of two square matrices."""
    return 2 * size**3


def _tokens(checkpoint: Checkpoint) -> int:
    return checkpoint.config(checkpoint.text_encoders[0])["max_position_embeddings"]
