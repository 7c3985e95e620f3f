"""EfficientViT's linear attention and gated convolutions, in Sana's denoiser and autoencoder.

See Cai et al., 2023, arXiv:2205.14756, and Xie et al., 2024, arXiv:2410.10629.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.layers import conv

LEAST_NORMALIZER = 1e-15  # added to the sum of the attention's weights


def attend_linearly(query: Array, key: Array, value: Array) -> Array:
    """Computes attention in linear time, in float32, with ReLU as its feature map.

    See Katharopoulos et al., 2020, arXiv:2006.16236, equation 5.

    Args:
      query, key, value: [batch, tokens, heads, head width].

    Returns:
      the same shape and dtype.
    """
    dtype, exact = value.dtype, {"precision": "highest"}  # by default, TPUs round to bfloat16
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query, key = nnx.relu(query), nnx.relu(key)
    sums = jnp.einsum("bnhd,bnhe->bhde", key, value, **exact)
    mixed = jnp.einsum("bnhd,bhde->bnhe", query, sums, **exact)
    weights = jnp.einsum("bnhd,bhd->bnh", query, key.sum(axis=1), **exact)
    return (mixed / (weights + LEAST_NORMALIZER)[..., None]).astype(dtype)


class GatedConvolutions(nnx.Module):
    """A gated feed-forward layer that also mixes neighbours by a convolution: Sana's Mix-FFN."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.conv_inverted = conv(width, 2 * hidden, 1, rngs=rngs)
        self.conv_depth = conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden, rngs=rngs)
        self.conv_point = conv(hidden, width, 1, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, width] to the same shape."""
        x = _depthwise(self.conv_depth, nnx.silu(pointwise(self.conv_inverted, x)))
        value, gate = jnp.split(x, 2, axis=-1)
        return pointwise(self.conv_point, value * nnx.silu(gate))


def pointwise(layer: nnx.Conv, x: Array) -> Array:
    """Applies a 1x1 convolution as a matrix product: up to four times as fast on a CPU."""
    x = x @ layer.kernel[...][0, 0]
    return x if layer.bias is None else x + layer.bias[...]


def _depthwise(layer: nnx.Conv, x: Array) -> Array:
    """Applies a 3x3 depthwise convolution: five times as fast on a CPU as XLA's."""
    _, height, width, _ = x.shape
    kernel = layer.kernel[...].astype(jnp.float32)[:, :, 0]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = layer.bias[...].astype(jnp.float32)
    for i, j in np.ndindex(3, 3):
        total = total + padded[:, i : i + height, j : j + width] * kernel[i, j]
    return total.astype(x.dtype)
