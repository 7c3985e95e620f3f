"""Embeddings of numbers and of positions, shared by the denoisers."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


def sinusoids(
    numbers: Array, width: int, *, cosine_first: bool = True, freq_shift: int = 0
) -> Array:
    """Returns sinusoids of the numbers (Vaswani et al., 2017, section 3.5).

    Args:
      numbers: [...], such as timesteps or pixels.
      width: even.
      cosine_first: whether the cosines come before the sines.
      freq_shift: 0, or 1 for a lowest frequency of exactly 1 / 10000.

    Returns:
      float32 [..., width].
    """
    half = width // 2
    exponents = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = numbers.astype(jnp.float32)[..., None] * jnp.exp(exponents)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cosine, sine] if cosine_first else [sine, cosine], axis=-1)


class EmbeddingMLP(nnx.Module):
    """Two linear layers with SiLU in between; a condition may be added to their input."""

    def __init__(
        self, in_width: int, width: int, *, condition_width: int | None = None, rngs: nnx.Rngs
    ):
        self.cond_proj = (
            nnx.Linear(condition_width, in_width, use_bias=False, rngs=rngs)
            if condition_width
            else None
        )
        self.linear_1 = nnx.Linear(in_width, width, rngs=rngs)
        self.linear_2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """Maps [batch, in width] and [batch, condition width] to [batch, width]."""
        if condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(nnx.silu(self.linear_1(x)))


def grid_positions(height: int, width: int) -> np.ndarray:
    """Returns (0, row, column) of each patch in reading order, int64 [height * width, 3]."""
    rows, columns = np.indices((height, width))
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)


def grid_sinusoids(rows: int, columns: int, width: int, *, base: int, scale: float) -> np.ndarray:
    """Returns the sinusoids of each patch's place in an image, stretched to the trained size.

    Chen et al., 2023, arXiv:2310.00426, section 2.3; the first half is of the column, as in Vaswani
    et al., 2017, section 3.5.

    Args:
      rows, columns: the number of patches along each side.
      width: a multiple of 4.
      base: the number of patches along each side in training.
      scale: the factor by which places are divided.

    Returns:
      float32 [rows * columns, width], in reading order.
    """
    down, across = (  # in float32, as PyTorch does
        np.arange(side, dtype=np.float32) / np.float32(side / base) / np.float32(scale)
        for side in (rows, columns)
    )
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    halves = []
    for places in (np.tile(across, rows), np.repeat(down, columns)):
        angles = np.outer(places, frequencies)
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def rotary_angles(
    positions: np.ndarray, widths: Sequence[int], theta: float, dtype=np.float64
) -> np.ndarray:
    """Returns the angles of rotary embeddings over several axes.

    See Su et al., 2021, arXiv:2104.09864, equation 15; each axis has its own share of a head.

    Args:
      positions: [tokens, axes].
      widths: how many of a head's numbers each axis rotates; even.
      theta: the base of the frequencies.
      dtype: of the arithmetic.

    Returns:
      [tokens, sum of widths / 2], in `dtype`.
    """
    angles = []
    for axis, width in enumerate(widths):
        exponents = np.arange(0, width, 2, dtype=dtype) / dtype(width)
        frequencies = dtype(1.0) / dtype(theta) ** exponents
        angles.append(positions[:, axis, None].astype(dtype) * frequencies)
    return np.concatenate(angles, axis=-1)


def rotate(x: Array, angles: Array | np.ndarray) -> Array:
    """Rotates neighbouring pairs of a head's numbers, in float32 (arXiv:2104.09864, equation 34).

    Args:
      x: [batch, tokens, heads, head width].
      angles: [tokens, head width / 2] or [batch, tokens, head width / 2].

    Returns:
      the rotated heads, in the shape and dtype of `x`.
    """
    # NumPy's float64 is more exact than the device's float32.
    library = np if isinstance(angles, np.ndarray) else jnp
    cosine, sine = (
        jnp.asarray(function(angles), jnp.float32)[..., None, :]  # for all heads
        for function in (library.cos, library.sin)
    )
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack(
        [real * cosine - imaginary * sine, real * sine + imaginary * cosine], axis=-1
    )
    return turned.reshape(x.shape).astype(x.dtype)
