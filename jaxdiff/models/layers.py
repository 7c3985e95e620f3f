"""Building blocks shared by the U-Net and the autoencoder. Activations are NHWC.

Attribute names match the checkpoint's keys, so loading needs no table per model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models import products
from jaxdiff.models.attention import attention
from jaxdiff.models.linear import Linear
from jaxdiff.models.platform import platform


class Chain(nnx.List):
    """Layers that are called one after the other; functions may be among them."""

    def __call__(self, x: Array) -> Array:
        """Passes `x` through all layers."""
        for layer in self:
            x = layer(x)
        return x


def conv(
    in_channels: int,
    out_channels: int,
    size: int,
    *,
    rngs: nnx.Rngs,
    stride=1,
    padding=None,
    groups: int = 1,
    use_bias: bool = True,
) -> nnx.Conv:
    """Makes a square NHWC convolution, padded to keep the size unless `padding` is given."""
    if padding is None:
        padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(
        in_channels,
        out_channels,
        (size, size),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=use_bias,
        conv_general_dilated=products.conv_general_dilated,
        rngs=rngs,
    )


class GroupNorm(nnx.GroupNorm):
    """Group normalisation (Wu and He, 2018), with statistics in float32.

    Of float32 inputs, the variance takes a second pass over them, as in PyTorch. Both passes add up
    channels first and groups of them then: XLA's reductions over parts of the last axis are slow on
    CPUs (four times, with two channels in a group).

    Half-precision inputs are read once: what E[x^2] - E[x]^2 loses in float32 is less than what
    they have lost. By the TPU compiler's estimate, that takes a quarter of a step of Stable
    Diffusion 1.5.
    """

    def __call__(self, x: Array) -> Array:
        """Normalises [batch, ..., channels]."""
        if x.dtype != jnp.float32:
            self.use_fast_variance = True
            return super().__call__(x)
        deviations = x - self._mean(x)
        scale = jax.lax.rsqrt(self._mean(jnp.square(deviations)) + self.epsilon)
        if self.scale is not None:
            scale = scale * self.scale[...]
        normalised = deviations * scale
        return normalised if self.bias is None else normalised + self.bias[...]

    def _mean(self, x: Array) -> Array:
        """Returns the mean of each channel's group, [batch, 1, ..., channels]."""
        channels = x.mean(axis=tuple(range(1, x.ndim - 1)), keepdims=True)
        groups = channels.reshape(*channels.shape[:-1], self.num_groups, -1).mean(axis=-1)
        return jnp.repeat(groups, self.group_size, axis=-1)


def group_norm(channels: int, groups: int, epsilon: float, *, rngs: nnx.Rngs) -> GroupNorm:
    """Makes a group normalisation of all channels."""
    return GroupNorm(channels, num_groups=groups, epsilon=epsilon, rngs=rngs)


class ImagePrompt(NamedTuple):
    """What an image adds to a cross-attention (Ye et al., 2023, arXiv:2308.06721, section 3.2.2).

    Attributes:
      key, value: [batch, image tokens, width], projected; of the queries' dtype.
      scale: float [batch], of the attention to them; 0 adds nothing.
    """

    key: Array
    value: Array
    scale: Array


class Attention(nnx.Module):
    """Multi-head attention of `query` tokens over `context` tokens (or over themselves)."""

    def __init__(
        self, width: int, num_heads: int, *, rngs: nnx.Rngs, context_width=None, qkv_bias=False
    ):
        context_width = context_width or width
        self.num_heads = num_heads
        self.to_q = Linear(width, width, use_bias=qkv_bias, rngs=rngs)
        self.to_k = Linear(context_width, width, use_bias=qkv_bias, rngs=rngs)
        self.to_v = Linear(context_width, width, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        mask: Array | None = None,
        prompts: Sequence[ImagePrompt] = (),
    ) -> Array:
        """Maps [batch, tokens, width] and [batch, context tokens, context width] to x's shape.

        The mask is that of `attend`. The same queries also attend to each of the image prompts, by
        a softmax of its own.
        """
        context = x if context is None else context
        query, key, value = self.to_q(x), self.to_k(context), self.to_v(context)
        mixed = attention(query, key, value, self.num_heads, mask=mask)
        for key, value, scale in prompts:
            seen = attention(query, key, value, self.num_heads)
            mixed = mixed + scale[:, None, None].astype(seen.dtype) * seen
        return self.to_out[0](mixed)


class ResnetBlock2D(nnx.Module):
    """Norm, SiLU and convolution, twice, with a shortcut; the timestep is added in between."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        rngs: nnx.Rngs,
        time_width: int | None = None,
    ):
        self.norm1 = group_norm(in_channels, groups, epsilon, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, 3, rngs=rngs)
        self.time_emb_proj = Linear(time_width, out_channels, rngs=rngs) if time_width else None
        self.norm2 = group_norm(out_channels, groups, epsilon, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, 3, rngs=rngs)
        self.conv_shortcut = (
            conv(in_channels, out_channels, 1, rngs=rngs) if in_channels != out_channels else None
        )

    def __call__(self, x: Array, time_embedding: Array | None = None) -> Array:
        """Maps [batch, h, w, in] and [batch, time width] to [batch, h, w, out]."""
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(nnx.silu(time_embedding))[:, None, None, :]
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Halves the height and the width with a convolution of stride 2."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs, stride=2, padding=(padding, padding))

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, c] to [batch, h / 2, w / 2, c]."""
        return self.conv(x)


# After nearest-neighbour doubling, two of the three rows under a kernel of size 3 are equal. So an
# even row is [k0, k1 + k2] over two rows of the small map, an odd row [k0 + k1, k2]; columns too.
FOLDED = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)  # odd, tap, k


def _doubled(x: Array) -> Array:
    """Upsamples [batch, h, w, c] to [batch, 2h, 2w, c] by nearest neighbours."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _convolve(x: Array, kernel: Array, padding: int) -> Array:
    return products.conv_general_dilated(
        x, kernel, (1, 1), ((padding, padding),) * 2, dimension_numbers=products.NHWC
    )


@jax.custom_vjp
def _double_and_convolve(x: Array, kernel: Array) -> Array:
    """Computes `_convolve(_doubled(x), kernel, 1)` in one step, on the small map.

    Four 2x2 kernels, one for each parity of row and column, need 4/9 of the multiplications
    (Shi et al., 2016, arXiv:1609.07009, describe the other direction).
    """
    batch, height, width, channels = x.shape
    folded = jnp.einsum("iak,jbl,klcd->abcijd", FOLDED, FOLDED, kernel.astype(jnp.float32))
    both = _convolve(x, folded.astype(x.dtype).reshape(2, 2, channels, -1), 1)
    both = both.reshape(batch, height + 1, width + 1, 2, 2, -1)
    odd = [
        jnp.stack([both[:, i : i + height, j : j + width, i, j] for j in (0, 1)], axis=3)
        for i in (0, 1)
    ]
    return jnp.stack(odd, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _forward(x: Array, kernel: Array):
    return _double_and_convolve(x, kernel), (x, kernel)


def _backward(saved, gradient: Array):
    # XLA has no fast kernel for the folded gradient: it took half of a training step on a CPU.
    _, pull_back = jax.vjp(lambda x, kernel: _convolve(_doubled(x), kernel, 1), *saved)
    return pull_back(gradient)


_double_and_convolve.defvjp(_forward, _backward)


def doubled_conv(layer: nnx.Conv, x: Array) -> Array:
    """Doubles [batch, h, w, c] by nearest neighbours, then applies a 3x3 convolution.

    On TPUs it takes two steps: by the compiler's estimate, they are faster than weaving the results
    of four kernels into one another.
    """
    if platform() == "tpu":
        return layer(_doubled(x))
    kernel, bias = layer.kernel[...].astype(x.dtype), layer.bias[...].astype(x.dtype)
    return _double_and_convolve(x, kernel) + bias


class Upsample2D(nnx.Module):
    """Doubles the height and the width by nearest neighbours, then convolves."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """Maps [batch, h, w, c] to [batch, 2h, 2w, c], or crops it to an odd (height, width)."""
        _, height, width, _ = x.shape
        if size not in (None, (2 * height, 2 * width)):  # zero padding replaces the cropped part
            return self.conv(_doubled(x)[:, : size[0], : size[1]])
        return doubled_conv(self.conv, x)
