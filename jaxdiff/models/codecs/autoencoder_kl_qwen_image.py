"""`AutoencoderKLQwenImage`: Wan's video autoencoder for one frame, for Qwen-Image.

See Wan, 2025, arXiv:2503.20314, and Wu et al., 2025, arXiv:2508.02324. Its 3-D convolutions are
causal: what comes before the first frame is zero. So for one frame only the last temporal tap of
each kernel acts, and the network needs only 2-D convolutions. The family's page drops a file's
other taps, and the `time_conv` layers, which resample in time and which the first frame skips. The
norms' `gamma` keep the file's shape, [c, 1, 1, 1] or, for attention, [c, 1, 1].
"""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.attention import attention
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.layers import Downsample2D, Upsample2D, conv
from jaxdiff.models.sharding import COLUMNS, ROWS

FIXED = {
    "_class_name": "AutoencoderKLQwenImage",
    "attn_scales": [],
    "dropout": 0.0,
    "input_channels": 3,
}
SHARDING = (
    (r"\.(to_qkv|conv1)\.kernel$", COLUMNS),
    (r"\.(proj|conv2|conv_shortcut|resample\.1)\.kernel$", ROWS),
)
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class AutoencoderKLQwenImageConfig(ComponentConfig):
    """The fields of `vae/config.json`; the defaults are diffusers'.

    `temperal_downsample` (so spelt) says which blocks also resample in time; one frame needs none.
    """

    component = "vae"
    fixed = FIXED

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def __post_init__(self):
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample must have one value fewer than dim_mult")
        if any(width % 2 for width in self.widths[1:]):
            raise ValueError("base_dim * dim_mult must be even, for the decoder halves it")
        if {len(self.latents_mean), len(self.latents_std)} != {self.z_dim}:
            raise ValueError("latents_mean and latents_std must have one number per channel")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each of the encoder's blocks."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.z_dim

    def scale(self, latents: Array) -> Array:
        """Scales the encoder's latents to about unit variance for the denoiser."""
        return (latents - jnp.array(self.latents_mean)) / jnp.array(self.latents_std)

    def unscale(self, latents: Array) -> Array:
        """Undoes `scale`."""
        return latents * jnp.array(self.latents_std) + jnp.array(self.latents_mean)


class _RMSNorm(nnx.Module):
    """An RMS normalisation of the channels (Zhang and Sennrich, 2019, arXiv:1910.07467).

    In files, `gamma` has `unit_axes` axes of length one after the channels.
    """

    def __init__(self, channels: int, unit_axes: int = 3):
        self.gamma = nnx.Param(jnp.ones((channels, *(1,) * unit_axes)))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        squares = jnp.square(wide).sum(axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # PyTorch's least norm is 1e-12
        gamma = self.gamma[...].reshape(-1).astype(x.dtype)
        return normed.astype(x.dtype) * x.shape[-1] ** 0.5 * gamma


class _ResidualBlock(nnx.Module):
    """Norm, SiLU and convolution, twice, with a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.norm1 = _RMSNorm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, rngs=rngs)
        self.norm2 = _RMSNorm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, rngs=rngs)
        self.conv_shortcut = (
            conv(in_channels, out_channels, 1, rngs=rngs) if in_channels != out_channels else None
        )

    def __call__(self, x: Array) -> Array:
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _AttentionBlock(nnx.Module):
    """Single-head attention over all positions, with pre-norm and residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = _RMSNorm(channels, unit_axes=2)
        self.to_qkv = conv(channels, 3 * channels, 1, rngs=rngs)
        self.proj = conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        batch, _, _, channels = x.shape
        tokens = self.to_qkv(self.norm(x)).reshape(batch, -1, 3 * channels)  # [b, h w, 3c]
        mixed = attention(*jnp.split(tokens, 3, axis=-1), num_heads=1)
        return x + self.proj(mixed.reshape(x.shape))


class _Downsample(Downsample2D):
    """Halves the height and the width, padded at the bottom and the right."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        layer = conv(channels, channels, 3, rngs=rngs, stride=2, padding=((0, 1), (0, 1)))
        self.resample = nnx.List([None, layer])  # in the file, its place is after the padding's

    @property
    def conv(self) -> nnx.Conv:
        return self.resample[1]


class _Upsample(Upsample2D):
    """Doubles the height and the width and halves the channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        layer = conv(channels, channels // 2, 3, rngs=rngs)
        self.resample = nnx.List([None, layer])  # in the file, its place is after the doubling's

    @property
    def conv(self) -> nnx.Conv:
        return self.resample[1]


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.attentions = nnx.List([_AttentionBlock(channels, rngs=rngs)])
        self.resnets = nnx.List([_ResidualBlock(channels, channels, rngs=rngs) for _ in range(2)])

    def __call__(self, x: Array) -> Array:
        first, last = self.resnets
        return last(self.attentions[0](first(x)))


class _UpBlock(nnx.Module):
    def __init__(self, in_channels: int, out_channels: int, depth: int, upsample: bool, *, rngs):
        widths = [in_channels] + [out_channels] * depth
        self.resnets = nnx.List(
            [_ResidualBlock(*pair, rngs=rngs) for pair in itertools.pairwise(widths)]
        )
        self.upsamplers = nnx.List([_Upsample(out_channels, rngs=rngs)] if upsample else [])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class _Encoder(nnx.Module):
    """Maps pixels to the moments of the latents, before `quant_conv`."""

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, rngs: nnx.Rngs):
        layers, width = [], config.base_dim
        for i, wider in enumerate(config.widths):  # one flat list, as in the file
            widths = [width] + [wider] * config.num_res_blocks
            layers += [_ResidualBlock(*pair, rngs=rngs) for pair in itertools.pairwise(widths)]
            if i < len(config.widths) - 1:
                layers.append(_Downsample(wider, rngs=rngs))
            width = wider
        self.conv_in = conv(3, config.base_dim, 3, rngs=rngs)
        self.down_blocks = nnx.List(layers)
        self.mid_block = _MidBlock(width, rngs=rngs)
        self.norm_out = _RMSNorm(width)
        self.conv_out = conv(width, 2 * config.z_dim, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for layer in (self.conv_in, *self.down_blocks, self.mid_block):
            x = layer(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class _Decoder(nnx.Module):
    """Maps latents, after `post_quant_conv`, to pixels. Its blocks run from deep to shallow."""

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, rngs: nnx.Rngs):
        widths = config.widths[::-1]
        last = len(widths) - 1
        before = [widths[0], *(width // 2 for width in widths[:-1])]  # upsampling halves the width
        self.conv_in = conv(config.z_dim, widths[0], 3, rngs=rngs)
        self.mid_block = _MidBlock(widths[0], rngs=rngs)
        self.up_blocks = nnx.List(
            [
                _UpBlock(before[i], width, config.num_res_blocks + 1, i < last, rngs=rngs)
                for i, width in enumerate(widths)
            ]
        )
        self.norm_out = _RMSNorm(widths[-1])
        self.conv_out = conv(widths[-1], 3, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for layer in (self.conv_in, self.mid_block, *self.up_blocks):
            x = layer(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class AutoencoderKLQwenImage(nnx.Module):
    """The autoencoder of Qwen-Image; its latents are unscaled (see `config.scale`)."""

    def __init__(self, config: AutoencoderKLQwenImageConfig, *, rngs: nnx.Rngs):
        latent = config.z_dim
        self.encoder = _Encoder(config, rngs=rngs)
        self.quant_conv = conv(2 * latent, 2 * latent, 1, rngs=rngs)
        self.post_quant_conv = conv(latent, latent, 1, rngs=rngs)
        self.decoder = _Decoder(config, rngs=rngs)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Returns the posterior of the latents.

        Args:
          images: [batch, height, width, 3], -1 to 1; multiples of `factor` high and wide.

        Returns:
          mean and log-variance, each [batch, height / factor, width / factor, z_dim].
        """
        moments = self.quant_conv(self.encoder(images))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Array) -> Array:
        """Decodes [batch, h, w, z_dim] to [batch, h * factor, w * factor, 3], cut to -1 to 1."""
        return jnp.clip(self.decoder(self.post_quant_conv(latents)), -1.0, 1.0)
