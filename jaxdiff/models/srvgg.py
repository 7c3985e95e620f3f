"""`SRVGGNetCompact`: Real-ESRGAN's small networks, which enlarge an image (arXiv:2107.10833).

A chain of convolutions at the size of the image, whose last one makes the pixels of each square
that a pixel becomes (Shi et al., 2016, arXiv:1609.05158); they are added to the pixel itself.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.layers import conv
from jaxdiff.models.sharding import Rules

SLOPE = 0.25  # of new PReLUs
SHARDING: Rules = ()


@dataclass(frozen=True)
class SRVGGNetConfig:
    """The network's sizes, which its file does not state.

    Attributes:
      features: channels of the feature maps.
      convs: the number of convolutions between the first and the last.
      scale: by how much it multiplies the sides of an image.
    """

    features: int = 64
    convs: int = 16
    scale: int = 4


class PReLU(nnx.Module):
    """A leaky ReLU with a slope for each channel (He et al., 2015, arXiv:1502.01852)."""

    def __init__(self, channels: int):
        self.weight = nnx.Param(jnp.full(channels, SLOPE))

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, channels] to the same shape."""
        return jnp.where(x >= 0, x, self.weight[...].astype(x.dtype) * x)


class SRVGGNetCompact(nnx.Module):
    """Enlarges images by a whole number."""

    def __init__(self, config: SRVGGNetConfig, *, rngs: nnx.Rngs):
        features, self.scale = config.features, config.scale
        layers = [conv(3, features, 3, rngs=rngs), PReLU(features)]
        for _ in range(config.convs):
            layers += [conv(features, features, 3, rngs=rngs), PReLU(features)]
        layers.append(conv(features, 3 * self.scale**2, 3, rngs=rngs))
        self.body = nnx.List(layers)

    def __call__(self, images: Array) -> Array:
        """Maps images in 0..1, [batch, h, w, 3], to [batch, scale h, scale w, 3], not clipped."""
        x = images
        for layer in self.body:
            x = layer(x)
        batch, height, width, _ = x.shape
        squares = x.reshape(batch, height, width, 3, self.scale, self.scale)
        added = squares + images[..., None, None]
        pixels = added.transpose(0, 1, 4, 2, 5, 3)
        return pixels.reshape(batch, self.scale * height, self.scale * width, 3)
