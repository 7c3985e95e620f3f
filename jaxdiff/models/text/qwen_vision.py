"""The vision tower of Qwen2.5-VL (arXiv:2502.13923, section 2.1.1).

A vision transformer (Dosovitskiy et al., 2020, arXiv:2010.11929) with rotary positions on two axes
(Su et al., 2021, arXiv:2104.09864), whose layers attend within windows, except a few. Squares of
neighbouring patches are merged into the tokens that the language model sees.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.attention import attend, merge_heads, split_heads
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.embeddings import (
    constant_angles,
    grid_positions,
    rotary_angles,
    rotate_halves,
)
from jaxdiff.models.layers import Chain
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS
from jaxdiff.models.text import decoder

EPSILON = 1e-6  # of all norms
THETA = 10_000  # the base of the rotary frequencies
CHANNELS, FRAMES, PATCH = 3, 2, 14  # of a patch of a film, and its side in pixels
MERGE = 2  # patches along each side of a token
FACTOR = MERGE * PATCH  # pixels along each side of a token
# Keys that change what is computed; only these values are supported.
FIXED = {
    "hidden_act": "silu",
    "in_channels": CHANNELS,
    "in_chans": CHANNELS,  # in older files
    "patch_size": PATCH,
    "rope_parameters": {"rope_theta": float(THETA), "rope_type": "axial"},
    "spatial_merge_size": MERGE,
    "spatial_patch_size": PATCH,  # in older files
    "temporal_patch_size": FRAMES,
}
IGNORED = {
    "architectures",
    "dtype",
    "initializer_range",
    "model_type",
    "tokens_per_second",  # of videos
    "torch_dtype",
    "transformers_version",
}

SHARDING = (
    *decoder.SHARDING,
    (r"\.(qkv|mlp\.0)\.kernel$", COLUMNS),
    (r"\.(attn\.proj|mlp\.2)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class Qwen2_5_VLVisionConfig(ComponentConfig):
    """The fields of Qwen2.5-VL's `vision_config` that shape the tower."""

    component = "text_encoder"
    fixed = FIXED
    ignored = IGNORED

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden_size: int = 3584

    def __post_init__(self):
        if self.hidden_size % (4 * self.num_heads):  # halves of two axes
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of 4 * num_heads = "
                f"{4 * self.num_heads}"
            )
        if self.window_size < FACTOR:
            raise ValueError(f"window_size = {self.window_size} is less than {FACTOR} pixels")


def window_order(rows: int, columns: int, side: int) -> np.ndarray:
    """Returns the numbers of an image's patches, window by window.

    Args:
      rows, columns: of patches; multiples of `MERGE`.
      side: the tokens along each side of a window.

    Returns:
      int [windows, patches of a window]: patches are numbered in reading order, those of a token
      stay together, and -1 is a place outside the image in the last windows of a row or a column.
    """
    window = MERGE * side
    numbers = np.arange(rows * columns).reshape(rows, columns)
    numbers = np.pad(numbers, ((0, -rows % window), (0, -columns % window)), constant_values=-1)
    down, across = (size // window for size in numbers.shape)
    squares = numbers.reshape(down, side, MERGE, across, side, MERGE)
    return squares.transpose(0, 3, 1, 4, 2, 5).reshape(down * across, window**2)


class _PatchEmbed(nnx.Module):
    def __init__(self, config: Qwen2_5_VLVisionConfig, *, rngs: nnx.Rngs):
        size = FRAMES, PATCH, PATCH
        self.proj = nnx.Conv(
            CHANNELS,
            config.hidden_size,
            size,
            strides=size,
            padding="VALID",
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, images: Array) -> Array:
        """Maps [batch, height, width, 3] to [batch, rows, columns, width]: a still film's."""
        images = images.astype(self.proj.kernel[...].dtype)
        return self.proj(jnp.repeat(images[:, None], FRAMES, axis=1))[:, 0]


class _Attention(nnx.Module):
    def __init__(self, config: Qwen2_5_VLVisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Array, angles: Array, seen: np.ndarray) -> Array:
        """Maps [batch, tokens, width] to the same shape.

        Args:
          angles: as in `rotate_halves`.
          seen: bool [windows, tokens of a window], the tokens that their window sees.
        """
        heads = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        query, key, value = heads
        parts = rotate_halves(query, angles), rotate_halves(key, angles), value
        batch, (windows, tokens) = len(x), seen.shape
        parts = (part.reshape(batch * windows, tokens, *part.shape[2:]) for part in parts)
        mask = None if seen.all() else jnp.tile(seen, (batch, 1))
        return self.proj(merge_heads(attend(*parts, mask=mask)).reshape(x.shape))


class _Block(nnx.Module):
    def __init__(self, config: Qwen2_5_VLVisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1 = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attn = _Attention(config, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.mlp = decoder.MLP(config, use_bias=True, rngs=rngs)

    def __call__(self, x: Array, angles: Array, seen: np.ndarray) -> Array:
        x = x + self.attn(self.norm1(x), angles, seen)
        return x + self.mlp(self.norm2(x))


class _Merger(nnx.Module):
    def __init__(self, config: Qwen2_5_VLVisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size * MERGE**2
        self.ln_q = nnx.RMSNorm(config.hidden_size, epsilon=EPSILON, rngs=rngs)
        first = Linear(width, width, rngs=rngs)
        last = Linear(width, config.out_hidden_size, rngs=rngs)
        self.mlp = Chain([first, _gelu, last])

    def __call__(self, x: Array) -> Array:
        """Maps squares of patches, [batch, squares, patches, width], to [batch, squares, out]."""
        return self.mlp(self.ln_q(x).reshape(*x.shape[:2], -1))


def _gelu(x: Array) -> Array:
    return nnx.gelu(x, approximate=False)


class Qwen2_5_VLVisionModel(nnx.Module):
    """Turns an image into tokens for the language model."""

    def __init__(self, config: Qwen2_5_VLVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = _PatchEmbed(config, rngs=rngs)
        self.blocks = nnx.List([_Block(config, rngs=rngs) for _ in range(config.depth)])
        self.merger = _Merger(config, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Encodes images.

        All layers see the patches window by window; those outside the image are not seen.

        Args:
          images: [batch, height, width, 3], normalised as `images/clip_pixels.py` does it; each
            side is a multiple of `FACTOR`.

        Returns:
          [batch, tokens, out hidden size], in reading order and in the dtype of the weights.
        """
        config = self.config
        x = self.patch_embed(images)
        batch, rows, columns, width = x.shape
        order = window_order(rows, columns, config.window_size // FACTOR)
        places, seen = np.maximum(order, 0).reshape(-1), order >= 0
        axes = [width // config.num_heads // 2] * 2  # rows and columns
        where = grid_positions(rows, columns)[places, 1:]
        # In float32, as in transformers.
        angles = constant_angles(rotary_angles(where, axes, THETA, dtype=np.float32))
        x = x.reshape(batch, -1, width)[:, places]
        for number, block in enumerate(self.blocks):
            is_full = number in config.fullatt_block_indexes
            x = block(x, angles, seen.reshape(1, -1) if is_full else seen)
        firsts = order.reshape(-1, MERGE**2)[:, 0]  # of each square, by which it is sorted
        squares = np.argsort(firsts, kind="stable")[np.sum(firsts < 0) :]
        return self.merger(x.reshape(batch, -1, MERGE**2, width)[:, squares])
