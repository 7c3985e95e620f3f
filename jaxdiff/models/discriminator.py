"""A U-Net that tells real images from generated ones, pixel by pixel, for adversarial training.

Schönfeld et al., 2020, arXiv:2002.12655, with the layers and the spectral normalisation that
Real-ESRGAN has (Wang et al., 2021, arXiv:2107.10833, section 3.3). It is used in training only.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.layers import conv

SLOPE = 0.2  # of the leaky ReLUs
ITERATIONS = 4  # of the power method, in every call


class SpectralConv(nnx.Module):
    """A convolution without bias, whose kernel is divided by its largest singular value.

    Miyato et al., 2018, arXiv:1802.05957. They keep the singular vectors from step to step; here
    the power method begins anew, so that training has no state besides its parameters.
    """

    def __init__(self, in_channels: int, channels: int, size: int, stride=1, *, rngs: nnx.Rngs):
        padding = ((1, 1), (1, 1))
        self.conv = conv(
            in_channels, channels, size, rngs=rngs, stride=stride, padding=padding, use_bias=False
        )

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, in] to [batch, h / stride, w / stride, channels]."""
        kernel = self.conv.kernel[...]
        return self.conv(x) / largest_singular_value(kernel.reshape(-1, kernel.shape[-1]))


def largest_singular_value(matrix: Array) -> Array:
    """Estimates the largest singular value of a matrix by the power method."""
    fixed = jax.lax.stop_gradient(matrix)
    right = jnp.ones(matrix.shape[1]) / jnp.sqrt(matrix.shape[1])
    for _ in range(ITERATIONS):
        left = _unit(fixed @ right)
        right = _unit(left @ fixed)
    return left @ matrix @ right


def _unit(vector: Array) -> Array:
    return vector / (jnp.linalg.norm(vector) + 1e-12)


class Discriminator(nnx.Module):
    """Judges every pixel of an image in its surroundings."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.first = conv(3, features, 3, rngs=rngs)
        self.down = nnx.List(
            SpectralConv(features * 2**level, features * 2 ** (level + 1), 4, 2, rngs=rngs)
            for level in range(3)
        )
        self.up = nnx.List(
            SpectralConv(features * 2 ** (level + 1), features * 2**level, 3, rngs=rngs)
            for level in reversed(range(3))
        )
        self.last = nnx.List(SpectralConv(features, features, 3, rngs=rngs) for _ in range(2))
        self.out = conv(features, 1, 3, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Maps images [batch, h, w, 3] to logits [batch, h, w, 1]; more than 0 is real.

        Height and width must be multiples of 8.
        """
        x = _leaky(self.first(images))
        skips = []
        for layer in self.down:
            skips.append(x)
            x = _leaky(layer(x))
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = _leaky(layer(x)) + skip
        for layer in self.last:
            x = _leaky(layer(x))
        return self.out(x)


def _leaky(x: Array) -> Array:
    return nnx.leaky_relu(x, SLOPE)
