"""`AutoencoderDC`: the deep compression autoencoder of Sana (Chen et al., 2024, arXiv:2410.10733).

One latent stands for 32x32 pixels. Every resampling has a shortcut without weights, which turns
pixels into channels and averages them, or repeats channels and turns them into pixels. The deep
blocks are EfficientViT's (Cai et al., 2023, arXiv:2205.14756), whose attention takes time in
proportion to the pixels.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.dit import packed, unpacked
from jaxdiff.models.efficient_vit import GatedConvolutions, attend_linearly
from jaxdiff.models.layers import Chain, Upsample2D, conv
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS

EPSILON = 1e-5
LOG_VARIANCE = -30.0  # the least of the other autoencoders: a standard deviation of 3e-7
EXPANSION = 4  # of a feed-forward layer's width to its channels
RES, VIT = "ResBlock", "EfficientViTBlock"
FIXED = {
    "_class_name": "AutoencoderDC",
    "decoder_conv_act_fn": "relu",
    "decoder_in_shortcut": True,
    "encoder_out_shortcut": True,
}
SHARDING = (
    (r"\.(to_[qkv]|conv1|conv_inverted)\.kernel$", COLUMNS),
    (r"\.(to_out|conv2|conv_point|conv)\.kernel$", ROWS),
)


class _Stage(NamedTuple):
    """What the config says of the layers of one resolution."""

    type: str
    channels: int
    depth: int
    scales: tuple[int, ...]


@dataclass(frozen=True)
class AutoencoderDCConfig(ComponentConfig):
    """The fields of `vae/config.json`; the defaults are diffusers'.

    Two of the defaults are refused, `pixel_shuffle` and `pixel_unshuffle`: only Sana's resampling
    is supported, by nearest neighbours and by a convolution of stride 2. The paper's other
    autoencoders, which have batch norms and an empty first block, are not supported.
    """

    component = "vae"
    fixed = FIXED

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = RES
    decoder_block_types: str | tuple[str, ...] = RES
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    scaling_factor: float = 1.0

    def __post_init__(self):
        if self.upsample_block_type != "interpolate":
            raise ValueError(f"upsample_block_type {self.upsample_block_type!r} is not supported")
        if self.downsample_block_type == "pixel_unshuffle":  # any other name means a convolution
            raise ValueError("downsample_block_type 'pixel_unshuffle' is not supported")
        count = len(self.encoder_block_out_channels)
        for key, only in (("decoder_norm_types", "rms_norm"), ("decoder_act_fns", "silu")):
            if getattr(self, key) not in (only, (only,) * count):
                raise ValueError(f"{key} {getattr(self, key)} is not supported (only {only!r} is)")
        for half in ("encoder", "decoder"):
            for key in ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales"):
                values = getattr(self, f"{half}_{key}")
                if not isinstance(values, str) and len(values) != count:
                    raise ValueError(f"{half}_{key} must have one value for each of {count} blocks")
            self._check_stages(half)

    def _check_stages(self, half: str) -> None:
        stages = self.stages(half)
        for stage in stages:
            if stage.type not in (RES, VIT):
                raise ValueError(f"{half}_block_types {stage.type!r} is not supported")
            if stage.type == VIT and stage.channels % self.attention_head_dim:
                raise ValueError(
                    f"{half}_block_out_channels {stage.channels} must be a multiple of "
                    "attention_head_dim"
                )
            if any(size < 1 or size % 2 == 0 for size in stage.scales):
                raise ValueError(f"{half}_qkv_multiscales {stage.scales} must be odd")
        for shallow, deep in pairwise(stages):
            if 4 * shallow.channels % deep.channels:
                raise ValueError(
                    f"{half}_block_out_channels {deep.channels} must divide 4 * {shallow.channels}"
                )
        if stages[-1].channels % self.latent_channels:
            raise ValueError(f"latent_channels must divide the last of {half}_block_out_channels")

    def stages(self, half: str) -> list[_Stage]:
        """Returns the layers of "encoder" or "decoder", from shallow to deep."""
        widths = getattr(self, f"{half}_block_out_channels")
        types = getattr(self, f"{half}_block_types")
        types = (types,) * len(widths) if isinstance(types, str) else types
        depths = getattr(self, f"{half}_layers_per_block")
        scales = getattr(self, f"{half}_qkv_multiscales")
        return [_Stage(*each) for each in zip(types, widths, depths, scales, strict=True)]

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    def scale(self, latents: Array) -> Array:
        """Scales the encoder's latents to about unit variance for the denoiser."""
        return latents * self.scaling_factor

    def unscale(self, latents: Array) -> Array:
        """Undoes `scale`."""
        return latents / self.scaling_factor


class _RMSNorm(nnx.RMSNorm):
    """An RMS normalisation of the channels with a bias (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        super().__init__(channels, epsilon=EPSILON, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        return super().__call__(x) + self.bias[...].astype(x.dtype)


class _GroupedLinear(nnx.Conv):
    """A 1x1 convolution without bias that keeps groups of channels apart.

    It is computed as a product of matrices: XLA gets the convolution wrong if its channels are
    split over a mesh (with jaxlib 0.10.2; other sizes are right).
    """

    def __call__(self, x: Array) -> Array:
        group = x.shape[-1] // self.feature_group_count
        kernel = self.kernel[...].astype(x.dtype).reshape(group, -1, group)  # [in, groups, out]
        y = jnp.einsum("bhwgi,igo->bhwgo", x.reshape(*x.shape[:-1], -1, group), kernel)
        return y.reshape(x.shape)


class _ResBlock(nnx.Module):
    """Two convolutions and a norm, with a residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv1 = conv(channels, channels, 3, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, use_bias=False, rngs=rngs)
        self.norm = _RMSNorm(channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.norm(self.conv2(nnx.silu(self.conv1(x))))


class _Scale(nnx.Module):
    """Mixes queries, keys and values over a neighbourhood, and then within each head."""

    def __init__(self, channels: int, size: int, num_heads: int, *, rngs: nnx.Rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.proj_in = conv(channels, channels, size, groups=channels, **options)
        self.proj_out = _GroupedLinear(
            channels, channels, (1, 1), feature_group_count=3 * num_heads, **options
        )

    def __call__(self, x: Array) -> Array:
        return self.proj_out(self.proj_in(x))


class _LinearAttention(nnx.Module):
    """Multi-scale linear attention (Cai et al., 2023, arXiv:2205.14756), with norm and residual.

    For at most `head_width` pixels, diffusers multiplies queries and keys first, in the network's
    dtype, which differs only by rounding.
    """

    def __init__(self, channels: int, head_width: int, scales: tuple[int, ...], *, rngs: nnx.Rngs):
        self.head_width = head_width
        self.to_q, self.to_k, self.to_v = (
            Linear(channels, channels, use_bias=False, rngs=rngs) for _ in range(3)
        )
        heads = channels // head_width
        self.to_qkv_multiscale = nnx.List(
            [_Scale(3 * channels, size, heads, rngs=rngs) for size in scales]
        )
        self.to_out = Linear(channels * (1 + len(scales)), channels, use_bias=False, rngs=rngs)
        self.norm_out = _RMSNorm(channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        batch, height, width, _ = x.shape
        once = jnp.concatenate([self.to_q(x), self.to_k(x), self.to_v(x)], axis=-1)
        all_scales = [once, *(scale(once) for scale in self.to_qkv_multiscale)]
        # As in the original, a head takes 3 * head_width neighbouring channels for its query, key
        # and value, though the first scale's are all queries, then all keys, then all values.
        heads = jnp.concatenate(all_scales, axis=-1)
        heads = heads.reshape(batch, height * width, -1, 3, self.head_width)
        mixed = attend_linearly(*jnp.unstack(heads, axis=-2))  # [b, h w, heads, head width]
        return x + self.norm_out(self.to_out(mixed.reshape(batch, height, width, -1)))


class _FeedForward(GatedConvolutions):
    """EfficientViT's feed-forward layer, with norm and residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        super().__init__(channels, EXPANSION * channels, rngs=rngs)
        self.norm = _RMSNorm(channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.norm(super().__call__(x))


class _EfficientViTBlock(nnx.Module):
    def __init__(self, channels: int, head_width: int, scales: tuple[int, ...], *, rngs: nnx.Rngs):
        self.attn = _LinearAttention(channels, head_width, scales, rngs=rngs)
        self.conv_out = _FeedForward(channels, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv_out(self.attn(x))


class _Downsample(nnx.Module):
    """Halves the height and the width; the shortcut averages groups of pixels and channels."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(in_channels, out_channels, 3, rngs=rngs, stride=2)

    def __call__(self, x: Array) -> Array:
        y = self.conv(x)
        return y + packed(x).reshape(*y.shape, -1).mean(axis=-1)


class _Upsample(Upsample2D):
    """Doubles the height and the width; the shortcut repeats channels and makes pixels of them."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(in_channels, out_channels, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        batch, height, width, channels = y.shape
        repeated = jnp.repeat(x, 4 * channels // x.shape[-1], axis=-1)
        return y + unpacked(repeated.reshape(batch, -1, 4 * channels), height, width)


def _layers(stage: _Stage, head_width: int, *, rngs: nnx.Rngs) -> list[nnx.Module]:
    if stage.type == RES:
        return [_ResBlock(stage.channels, rngs=rngs) for _ in range(stage.depth)]
    return [
        _EfficientViTBlock(stage.channels, head_width, stage.scales, rngs=rngs)
        for _ in range(stage.depth)
    ]


class _Encoder(nnx.Module):
    """Maps pixels to latents."""

    def __init__(self, config: AutoencoderDCConfig, *, rngs: nnx.Rngs):
        stages = config.stages("encoder")
        blocks = [_layers(stage, config.attention_head_dim, rngs=rngs) for stage in stages]
        for layers, (here, deeper) in zip(blocks, pairwise(stages), strict=False):
            layers.append(_Downsample(here.channels, deeper.channels, rngs=rngs))
        self.conv_in = conv(config.in_channels, stages[0].channels, 3, rngs=rngs)
        self.down_blocks = Chain([Chain(layers) for layers in blocks])
        self.conv_out = conv(stages[-1].channels, config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.down_blocks(self.conv_in(x))
        y = self.conv_out(x)
        return y + x.reshape(*y.shape, -1).mean(axis=-1)


class _Decoder(nnx.Module):
    """Maps latents to pixels. Its blocks are listed from shallow to deep, as the encoder's."""

    def __init__(self, config: AutoencoderDCConfig, *, rngs: nnx.Rngs):
        stages = config.stages("decoder")
        blocks = [_layers(stage, config.attention_head_dim, rngs=rngs) for stage in stages]
        for layers, (here, deeper) in zip(blocks, pairwise(stages), strict=False):
            layers.insert(0, _Upsample(deeper.channels, here.channels, rngs=rngs))
        self.conv_in = conv(config.latent_channels, stages[-1].channels, 3, rngs=rngs)
        self.up_blocks = nnx.List([Chain(layers) for layers in blocks])
        self.norm_out = _RMSNorm(stages[0].channels, rngs=rngs)
        self.conv_out = conv(stages[0].channels, config.in_channels, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.conv_in(x)
        x = y + jnp.repeat(x, y.shape[-1] // x.shape[-1], axis=-1)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(nnx.relu(self.norm_out(x)))


class AutoencoderDC(nnx.Module):
    """The autoencoder of Sana; its latents are unscaled (see `config.scale`)."""

    def __init__(self, config: AutoencoderDCConfig, *, rngs: nnx.Rngs):
        self.encoder = _Encoder(config, rngs=rngs)
        self.decoder = _Decoder(config, rngs=rngs)

    def encode(self, images: Array) -> tuple[Array, Array]:
        """Returns the latents in the form of the other autoencoders' posteriors.

        Args:
          images: [batch, height, width, 3], -1 to 1; multiples of `factor` high and wide.

        Returns:
          mean and log-variance, each [batch, height / factor, width / factor, latent channels]. The
          mean is the latents; the log-variance is -30 everywhere, because diffusers draws nothing.
        """
        latents = self.encoder(images)
        return latents, jnp.full_like(latents, LOG_VARIANCE)

    def decode(self, latents: Array) -> Array:
        """Decodes [batch, h, w, latent channels] to [batch, h * factor, w * factor, 3], -1 to 1."""
        return self.decoder(latents)
