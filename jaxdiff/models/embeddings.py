"""Embeddings of numbers and of positions."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.linear import Linear


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


class FourierProjection(nnx.Module):
    """Sinusoids of random frequencies (Song et al., 2021, arXiv:2011.13456, appendix C.2)."""

    def __init__(self, width: int, *, cosine_first: bool = True, rngs: nnx.Rngs):
        self.cosine_first = cosine_first
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (width // 2,)))

    def __call__(self, numbers: Array) -> Array:
        """Maps [...] to float32 [..., width]."""
        turns = numbers.astype(jnp.float32)[..., None] * self.weight[...].astype(jnp.float32)
        sine, cosine = jnp.sin(2 * jnp.pi * turns), jnp.cos(2 * jnp.pi * turns)
        return jnp.concatenate([cosine, sine] if self.cosine_first else [sine, cosine], axis=-1)


class EmbeddingMLP(nnx.Module):
    """Two linear layers with an activation in between; a condition may be added to their input."""

    def __init__(
        self,
        in_width: int,
        width: int,
        *,
        condition_width: int | None = None,
        activation: Callable[[Array], Array] = nnx.silu,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.cond_proj = (
            Linear(condition_width, in_width, use_bias=False, rngs=rngs)
            if condition_width
            else None
        )
        self.linear_1 = Linear(in_width, width, use_bias=use_bias, rngs=rngs)
        self.linear_2 = Linear(width, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """Maps [..., in width] and [..., condition width] to [..., width]."""
        if condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(self.activation(self.linear_1(x)))


class NumberEmbedding(EmbeddingMLP):
    """Embeds numbers, such as timesteps, by two linear layers over their sinusoids."""

    def __init__(
        self, width: int, *, num_sinusoids: int = 256, use_bias: bool = True, rngs: nnx.Rngs
    ):
        self.num_sinusoids = num_sinusoids
        super().__init__(num_sinusoids, width, use_bias=use_bias, rngs=rngs)

    def __call__(self, numbers: Array, dtype) -> Array:
        """Maps [...] to [..., width] in `dtype`."""
        return super().__call__(sinusoids(numbers, self.num_sinusoids).astype(dtype))


def grid_positions(height: int, width: int) -> np.ndarray:
    """Returns (0, row, column) of each patch in reading order, int64 [height * width, 3]."""
    rows, columns = np.indices((height, width))
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)


def grid_sinusoids(rows: int, columns: int, width: int, *, base: int, scale: float = 1) -> Array:
    """Returns sinusoids of the places of patches in an image.

    Places are stretched so that an image always has the size of those in training, as in Chen et
    al., 2023, arXiv:2310.00426, section 2.3, and Esser et al., 2024, arXiv:2403.03206, section
    5.3.2. The first half is of the column, the second of the row; each has the sines first.

    Only the device holds the whole table, or nothing while shapes are traced.

    Args:
      rows, columns: the number of patches along each side.
      width: a multiple of 4.
      base: the number of patches along each side in training.
      scale: a further divisor of the places.

    Returns:
      float32 [rows * columns, width], in reading order.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))

    def waves(side: int) -> np.ndarray:
        # Places are in float32, as in PyTorch.
        places = np.arange(side, dtype=np.float32) / np.float32(side / base) / np.float32(scale)
        angles = np.outer(places, frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    shape = (rows, columns, width // 2)
    across = jnp.broadcast_to(waves(columns), shape)
    down = jnp.broadcast_to(waves(rows)[:, None], shape)
    return jnp.concatenate([across, down], axis=-1).reshape(rows * columns, width)


def rotary_angles(
    positions: np.ndarray, widths: Sequence[int], theta: float, *, dtype=np.float64
) -> np.ndarray:
    """Returns the angles of rotary embeddings over one or several axes.

    See Su et al., 2021, arXiv:2104.09864, equation 15; each axis has its own share of a head.

    Args:
      positions: [tokens, axes].
      widths: how many of a head's numbers each axis rotates; even.
      theta: the base of the frequencies.
      dtype: of the arithmetic. In float32, frequencies equal PyTorch's but for a last bit at times.

    Returns:
      [tokens, sum of widths / 2], in `dtype`.
    """
    angles = []
    for axis, width in enumerate(widths):
        exponents = np.arange(0, width, 2, dtype=dtype) / dtype(width)
        frequencies = dtype(1) / (np.float64(theta) ** exponents).astype(dtype)
        angles.append(positions[:, axis, None].astype(dtype) * frequencies)
    return np.concatenate(angles, axis=-1)


def constant_angles(angles: np.ndarray) -> Array:
    """Makes angles one float32 constant of a traced function.

    Whole turns are taken off in float64; then float32 is precise enough. The barrier keeps XLA from
    computing cosines and sines in advance and storing them in the program for each block: 5 MB each
    in Flux for an image of 1024x1024 pixels.
    """
    turned = angles.astype(np.float64) % (2 * np.pi)
    return jax.lax.optimization_barrier(jnp.asarray(turned, jnp.float32))


def rotate_pairs(x: Array, angles: Array) -> Array:
    """Rotates neighbouring pairs of a head's numbers, in float32 (arXiv:2104.09864, equation 34).

    Args:
      x: [batch, tokens, heads, head width].
      angles: [tokens, head width / 2] or [batch, tokens, head width / 2].

    Returns:
      the rotated heads, in the shape and dtype of `x`.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack(_rotated(pairs[..., 0], pairs[..., 1], angles), axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: Array, angles: Array) -> Array:
    """Rotates as `rotate_pairs`, but pairs the numbers of a head's two halves."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(_rotated(first, second, angles), axis=-1).astype(x.dtype)


def _rotated(real: Array, imaginary: Array, angles: Array) -> tuple[Array, Array]:
    """Rotates points by angles that are the same for all heads."""
    cosine, sine = (function(angles)[..., None, :] for function in (jnp.cos, jnp.sin))
    return real * cosine - imaginary * sine, real * sine + imaginary * cosine
