"""`RRDBNet`: ESRGAN's and Real-ESRGAN's generator, which enlarges an image.

Wang et al., 2018, arXiv:1809.00219, section 3.1: residual blocks in residual blocks of densely
connected convolutions, without normalisation, and then convolutions of the doubled maps.
Real-ESRGAN (Wang et al., 2021, arXiv:2107.10833) first folds squares of pixels into channels where
it enlarges by less than 4.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.layers import conv, doubled_conv
from jaxdiff.models.sharding import Rules

SLOPE = 0.2  # of the leaky ReLUs
SHARE = 0.2  # of each block's output that is added to its input
UPSAMPLED = 4  # by how much the maps are enlarged after the blocks
SHARDING: Rules = ()


@dataclass(frozen=True)
class RRDBNetConfig:
    """The network's sizes, which its file does not state.

    Attributes:
      features: channels of the feature maps.
      growth: channels that each convolution of a dense block adds.
      blocks: the number of residual blocks in the trunk.
      scale: by how much it multiplies the sides of an image: 4, 2 or 1.
    """

    features: int = 64
    growth: int = 32
    blocks: int = 23
    scale: int = 4


class ResidualDenseBlock(nnx.Module):
    """Five convolutions, each of which sees the maps of all before it."""

    def __init__(self, config: RRDBNetConfig, *, rngs: nnx.Rngs):
        features, growth = config.features, config.growth
        seen = [features + growth * number for number in range(5)]
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            conv(channels, growth, 3, rngs=rngs) for channels in seen[:4]
        )
        self.conv5 = conv(seen[4], features, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, features] to the same shape."""
        maps = [x]
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            maps.append(_leaky(layer(jnp.concatenate(maps, axis=-1))))
        return x + SHARE * self.conv5(jnp.concatenate(maps, axis=-1))


class ResidualInResidual(nnx.Module):
    """Three dense blocks, whose result is added to what they get."""

    def __init__(self, config: RRDBNetConfig, *, rngs: nnx.Rngs):
        self.rdb1 = ResidualDenseBlock(config, rngs=rngs)
        self.rdb2 = ResidualDenseBlock(config, rngs=rngs)
        self.rdb3 = ResidualDenseBlock(config, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, features] to the same shape."""
        return x + SHARE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nnx.Module):
    """Enlarges images by 4, 2 or 1."""

    def __init__(self, config: RRDBNetConfig, *, rngs: nnx.Rngs):
        features = config.features
        self.folded = UPSAMPLED // config.scale
        self.conv_first = conv(3 * self.folded**2, features, 3, rngs=rngs)
        self.body = nnx.List([ResidualInResidual(config, rngs=rngs) for _ in range(config.blocks)])
        self.conv_body = conv(features, features, 3, rngs=rngs)
        self.conv_up1 = conv(features, features, 3, rngs=rngs)
        self.conv_up2 = conv(features, features, 3, rngs=rngs)
        self.conv_hr = conv(features, features, 3, rngs=rngs)
        self.conv_last = conv(features, 3, 3, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Maps images in 0..1, [batch, h, w, 3], to [batch, scale h, scale w, 3], not clipped.

        Height and width must be multiples of 4 / scale.
        """
        first = self.conv_first(_folded(images, self.folded))
        x = first
        for block in self.body:
            x = block(x)
        x = first + self.conv_body(x)
        for layer in (self.conv_up1, self.conv_up2):
            x = _leaky(doubled_conv(layer, x))
        return self.conv_last(_leaky(self.conv_hr(x)))


def _leaky(x: Array) -> Array:
    return nnx.leaky_relu(x, SLOPE)


def _folded(images: Array, side: int) -> Array:
    """Folds squares of pixels into channels, in PyTorch's order: color, row, column."""
    batch, height, width, colors = images.shape
    squares = images.reshape(batch, height // side, side, width // side, side, colors)
    squares = squares.transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(batch, height // side, width // side, colors * side**2)
