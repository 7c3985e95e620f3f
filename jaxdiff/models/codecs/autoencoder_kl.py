"""`AutoencoderKL`: images to latents and back (Rombach et al., 2022, arXiv:2112.10752, 3.1)."""

import itertools
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.layers import (
    Attention,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    conv,
    group_norm,
)
from jaxdiff.models.sharding import COLUMNS, ROWS

EPSILON = 1e-6
FIXED = {"_class_name": "AutoencoderKL", "act_fn": "silu"}


SHARDING = (
    (r"\.(to_[qkv]|conv1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|conv2|conv_shortcut|\w+samplers\.\d+\.conv)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class AutoencoderKLConfig(ComponentConfig):
    """The fields of `vae/config.json` that shape the network, with diffusers' defaults."""

    component = "vae"
    fixed = FIXED

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        check_blocks(self)
        lengths = {len(self.latents_mean or ()), len(self.latents_std or ())}
        if lengths not in ({0}, {self.latent_channels}):
            raise ValueError("latents_mean and latents_std must have one number per channel")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scale(self, latents: Array) -> Array:
        """Scales the encoder's latents to about unit variance for the denoiser."""
        shift, factor = self._affine
        return (latents - shift) * factor

    def unscale(self, latents: Array) -> Array:
        """Undoes `scale`."""
        shift, factor = self._affine
        return latents / factor + shift

    @property
    def _affine(self) -> tuple[float | Array, float | Array]:
        """Shift and factor, for all channels or for each."""
        if self.latents_mean is None:
            return self.shift_factor or 0.0, self.scaling_factor
        return jnp.array(self.latents_mean), self.scaling_factor / jnp.array(self.latents_std)


def check_blocks(config) -> None:
    """Raises ValueError if `Encoder` and `Decoder` cannot be made of these blocks."""
    count = len(config.block_out_channels)
    if config.down_block_types != ("DownEncoderBlock2D",) * count:
        raise ValueError(f"down_block_types {config.down_block_types} is not supported")
    if config.up_block_types != ("UpDecoderBlock2D",) * count:
        raise ValueError(f"up_block_types {config.up_block_types} is not supported")
    if any(width % config.norm_num_groups for width in config.block_out_channels):
        raise ValueError("block_out_channels must be multiples of norm_num_groups")


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        self.resnets = nnx.List(
            [
                ResnetBlock2D(channels, channels, groups=groups, epsilon=EPSILON, rngs=rngs)
                for _ in range(2)
            ]
        )
        self.attentions = nnx.List(
            [_SpatialAttention(channels, groups, rngs=rngs)]
            if config.mid_block_add_attention
            else []
        )

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _SpatialAttention(Attention):
    """Single-head attention over all positions, with pre-norm and residual."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(channels, 1, qkv_bias=True, rngs=rngs)
        self.group_norm = group_norm(channels, groups, EPSILON, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])  # [b, h w, c]
        return x + super().__call__(tokens).reshape(x.shape)


class _DownBlock(nnx.Module):
    def __init__(self, in_channels, out_channels, config, *, downsample: bool, rngs: nnx.Rngs):
        widths = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = _resnets(widths, config, rngs)
        # The encoder pads only at the bottom and the right, as the original implementation does.
        self.downsamplers = nnx.List(
            [Downsample2D(out_channels, (0, 1), rngs=rngs)] if downsample else []
        )

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class _UpBlock(nnx.Module):
    def __init__(self, in_channels, out_channels, config, *, upsample: bool, rngs: nnx.Rngs):
        widths = [in_channels] + [out_channels] * (config.layers_per_block + 1)
        self.resnets = _resnets(widths, config, rngs)
        self.upsamplers = nnx.List([Upsample2D(out_channels, rngs=rngs)] if upsample else [])

    def __call__(self, x: Array) -> Array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def _resnets(widths: list[int], config: AutoencoderKLConfig, rngs: nnx.Rngs) -> nnx.List:
    groups = config.norm_num_groups
    return nnx.List(
        [
            ResnetBlock2D(before, after, groups=groups, epsilon=EPSILON, rngs=rngs)
            for before, after in itertools.pairwise(widths)
        ]
    )


class Encoder(nnx.Module):
    """Maps pixels to the moments of the latents, before `quant_conv`."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels
        last = len(channels) - 1
        self.conv_in = conv(config.in_channels, channels[0], 3, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                _DownBlock(channels[max(i - 1, 0)], width, config, downsample=i < last, rngs=rngs)
                for i, width in enumerate(channels)
            ]
        )
        self.mid_block = _MidBlock(channels[-1], config, rngs=rngs)
        self.conv_norm_out = group_norm(channels[-1], config.norm_num_groups, EPSILON, rngs=rngs)
        self.conv_out = conv(channels[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, 3] to [batch, h / factor, w / factor, 2 * latent channels]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Maps latents, after `post_quant_conv`, to pixels. Its blocks run from deep to shallow."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[::-1]
        last = len(channels) - 1
        self.conv_in = conv(config.latent_channels, channels[0], 3, rngs=rngs)
        self.mid_block = _MidBlock(channels[0], config, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                _UpBlock(channels[max(i - 1, 0)], width, config, upsample=i < last, rngs=rngs)
                for i, width in enumerate(channels)
            ]
        )
        self.conv_norm_out = group_norm(channels[-1], config.norm_num_groups, EPSILON, rngs=rngs)
        self.conv_out = conv(channels[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, latent channels] to [batch, h * factor, w * factor, 3]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder of latent diffusion; its latents are unscaled (see `config.scale`)."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        latent = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = (
            conv(2 * latent, 2 * latent, 1, rngs=rngs) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            conv(latent, latent, 1, rngs=rngs) if config.use_post_quant_conv else None
        )

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Returns the posterior of the latents.

        Args:
          images: [batch, height, width, 3], -1 to 1.

        Returns:
          mean and log-variance, each [batch, height / factor, width / factor, latent channels].
        """
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Array) -> Array:
        """Decodes [batch, h, w, latent channels] to [batch, h * factor, w * factor, 3], -1 to 1."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
