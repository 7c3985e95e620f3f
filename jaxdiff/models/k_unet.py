"""The U-Net of Stable Diffusion's latent x2 upscaler, after Katherine Crowson's k-diffusion.

See Karras et al., 2022, arXiv:2206.00364, for what it is given and predicts. It differs from Stable
Diffusion's: norms take scale and shift from the embedding of noise level and text (Dhariwal and
Nichol, 2021, arXiv:2105.05233, section 3), there are no feed-forward layers and no block in the
middle, each up block gets one skip, and maps are resized by fixed filters.
"""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.embeddings import EmbeddingMLP, FourierProjection
from jaxdiff.models.layers import Attention, GroupNorm, conv
from jaxdiff.models.linear import Linear
from jaxdiff.models.sharding import COLUMNS, ROWS

SHARDING = (
    (r"\.(to_[qkv]|linear_1|conv1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|linear_2|conv2|conv_shortcut)\.kernel$", ROWS),
)
GROUP = 32  # channels in a group of a norm
DOWN_BLOCKS = ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3)
UP_BLOCKS = (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D")
# What diffusers' class of U-Nets takes for these keys if a file lacks them.
DEFAULTS = {
    "act_fn": "silu",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
FIXED = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "gelu",
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "mid_block_type": None,
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
}
IGNORED = {  # by blocks of this kind
    *("addition_embed_type_num_heads", "attention_type", "downsample_padding", "dropout"),
    *("freq_shift", "mid_block_scale_factor", "resnet_out_scale_factor"),
    *("resnet_time_scale_shift", "transformer_layers_per_block", "upcast_attention"),
    "use_linear_projection",
}
gelu = partial(jax.nn.gelu, approximate=False)


@dataclass(frozen=True)
class KUNetConfig(ComponentConfig):
    """The fields of `unet/config.json` that shape the network, with diffusers' defaults."""

    component = "unet"
    fixed = FIXED
    ignored = IGNORED

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    attention_head_dim: int = 8
    time_cond_proj_dim: int | None = None

    def __post_init__(self):
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            if getattr(self, name) != known:
                raise ValueError(f"{name} = {list(getattr(self, name))} is not supported")
        width = self.block_out_channels[0]
        if self.block_out_channels != (width, width, 2 * width, 2 * width):
            raise ValueError(
                f"block_out_channels = {list(self.block_out_channels)} is not supported: the last "
                "two must be twice the first two"
            )
        if width % GROUP or width % self.attention_head_dim:
            raise ValueError(
                f"block_out_channels: {width} is not a multiple of {GROUP} and attention_head_dim"
            )
        if self.time_cond_proj_dim is None:
            raise ValueError("time_cond_proj_dim is missing, but the network sees the whole prompt")

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Reads a parsed `config.json`; raises InputError for what is not supported."""
        return super().from_json({**DEFAULTS, **data})

    @property
    def factor(self) -> int:
        """Latents per position of the deepest block along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time_width(self) -> int:
        """The width of the embedding of noise level and text."""
        return 2 * self.block_out_channels[0]


class _AdaGroupNorm(nnx.Module):
    """A group norm whose scale and shift come from the embedding."""

    def __init__(self, channels: int, config: KUNetConfig, *, epsilon=1e-5, rngs: nnx.Rngs):
        self.norm = GroupNorm(
            channels,
            num_groups=channels // GROUP,
            epsilon=epsilon,
            use_bias=False,
            use_scale=False,
            rngs=rngs,
        )
        self.linear = Linear(config.time_width, 2 * channels, rngs=rngs)

    def __call__(self, x: Array, embedding: Array) -> Array:
        """Maps [batch, h, w, channels] and [batch, time width] to x's shape."""
        scale, shift = jnp.split(self.linear(embedding)[:, None, None, :], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class _ResnetBlock(nnx.Module):
    """Norm, GELU and convolution, twice, with a shortcut."""

    def __init__(self, before: int, width: int, after: int, config: KUNetConfig, *, rngs: nnx.Rngs):
        norm = partial(_AdaGroupNorm, config=config, epsilon=config.norm_eps, rngs=rngs)
        self.norm1 = norm(before)
        self.conv1 = conv(before, width, 3, rngs=rngs)
        self.norm2 = norm(width)
        self.conv2 = conv(width, after, 3, rngs=rngs)
        self.conv_shortcut = (
            conv(before, after, 1, use_bias=False, rngs=rngs) if before != after else None
        )

    def __call__(self, x: Array, embedding: Array) -> Array:
        """Maps [batch, h, w, before] and [batch, time width] to [batch, h, w, after]."""
        hidden = self.conv1(gelu(self.norm1(x, embedding)))
        hidden = self.conv2(gelu(self.norm2(hidden, embedding)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _TextAttention(Attention):
    """Attention to the text, which is normalised first."""

    def __init__(self, width: int, num_heads: int, context_width: int, *, rngs: nnx.Rngs):
        super().__init__(width, num_heads, context_width=context_width, qkv_bias=True, rngs=rngs)
        self.norm_cross = nnx.LayerNorm(context_width, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        return super().__call__(x, self.norm_cross(context))


class _AttentionBlock(nnx.Module):
    """Attention of a feature map to the text and, before that, perhaps to itself."""

    def __init__(self, width: int, config: KUNetConfig, *, sees_itself: bool, rngs: nnx.Rngs):
        heads = width // config.attention_head_dim
        self.sees_itself = sees_itself
        if sees_itself:
            self.norm1 = _AdaGroupNorm(width, config, rngs=rngs)
            self.attn1 = Attention(width, heads, qkv_bias=True, rngs=rngs)
        self.norm2 = _AdaGroupNorm(width, config, rngs=rngs)
        self.attn2 = _TextAttention(width, heads, config.cross_attention_dim, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, context: Array) -> Array:
        """Returns a feature map in the shape of `x`, [batch, h, w, width]."""
        if self.sees_itself:
            x = x + self.attn1(_tokens(self.norm1(x, embedding))).reshape(x.shape)
        return x + self.attn2(_tokens(self.norm2(x, embedding)), context).reshape(x.shape)


def _tokens(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])  # [b, h w, c]


class _Block(nnx.Module):
    """Residual blocks, each perhaps with its attention; `widths` as in `_ResnetBlock`."""

    def __init__(
        self,
        widths: list[tuple[int, int, int]],
        config: KUNetConfig,
        *,
        attends: bool,
        sees_itself: bool,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List([_ResnetBlock(*each, config, rngs=rngs) for each in widths])
        self.attentions = nnx.List(
            [
                _AttentionBlock(after, config, sees_itself=sees_itself, rngs=rngs)
                for *_, after in widths
                if attends
            ]
        )

    def __call__(self, x: Array, embedding: Array, context: Array) -> Array:
        """Returns the output of the last layer."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if self.attentions:
                x = self.attentions[i](x, embedding, context)
        return x


def _halved(x: Array, axis: int) -> Array:
    """Halves an even side; each place is 1/8, 3/8, 3/8 and 1/8 of four."""
    side, padded = x.shape[axis], _reflected(x, axis)
    taps = [jax.lax.slice_in_dim(padded, i, i + side - 1, stride=2, axis=axis) for i in range(4)]
    return (taps[0] + taps[3]) / 8 + (taps[1] + taps[2]) * 3 / 8


def _doubled(x: Array, axis: int) -> Array:
    """Doubles a side; each place is 3/4 of one place and 1/4 of its neighbour."""
    side, padded = x.shape[axis], _reflected(x, axis)
    before, after = (
        jax.lax.slice_in_dim(padded, i, i + side, axis=axis) / 4 + x * 3 / 4 for i in (0, 2)
    )
    shape = *x.shape[:axis], 2 * side, *x.shape[axis + 1 :]
    return jnp.stack([before, after], axis=axis + 1).reshape(shape)


def _reflected(x: Array, axis: int) -> Array:
    return jnp.pad(x, [(int(i == axis),) * 2 for i in range(x.ndim)], mode="reflect")


class KUNet(nnx.Module):
    """Predicts -v in latents from their noise level, the text and the latents of an image."""

    def __init__(self, config: KUNetConfig, *, rngs: nnx.Rngs):
        channels, layers = config.block_out_channels, config.layers_per_block
        last = len(channels) - 1
        self.config = config
        self.conv_in = conv(config.in_channels, channels[0], 1, rngs=rngs)
        self.time_proj = FourierProjection(
            config.time_width, cosine_first=config.flip_sin_to_cos, rngs=rngs
        )
        self.time_embedding = EmbeddingMLP(
            config.time_width,
            config.time_width,
            condition_width=config.time_cond_proj_dim,
            activation=gelu,
            rngs=rngs,
        )
        self.down_blocks, self.up_blocks = nnx.List([]), nnx.List([])
        for i, width in enumerate(channels):
            before = [channels[max(i - 1, 0)]] + [width] * (layers - 1)
            widths = [(each, width, width) for each in before]
            attention = {"attends": i > 0, "sees_itself": i == last}
            self.down_blocks.append(_Block(widths, config, **attention, rngs=rngs))
        for i in reversed(range(last + 1)):
            width, below = channels[i], channels[max(i - 1, 0)]
            before = [width * (1 if i == last else 2)] + [width] * (layers - 1)  # with the skip
            after = [width] * (layers - 1) + [below]
            widths = [(first, width, end) for first, end in zip(before, after, strict=True)]
            attention = {"attends": i > 0, "sees_itself": i == last}
            self.up_blocks.append(_Block(widths, config, **attention, rngs=rngs))
        self.conv_out = conv(channels[0], config.out_channels, 1, rngs=rngs)

    def __call__(self, latents: Array, timesteps: Array, context: Array, condition: Array) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, in channels], scaled to unit variance and followed by those of the
            image; height and width are multiples of `config.factor`.
          timesteps: [batch], log(noise / signal) / 4 (Karras et al., table 1, c_noise).
          context: [batch, tokens, cross attention dim], the text encoder's hidden states.
          condition: [batch, time_cond_proj_dim], what conditions all blocks besides the timestep.

        Returns:
          [batch, h, w, out channels].
        """
        times = self.time_proj(timesteps).astype(latents.dtype)
        embedding = gelu(self.time_embedding(times, condition.astype(latents.dtype)))
        x, skips = self.conv_in(latents), []
        for block in self.down_blocks[:-1]:
            x = block(x, embedding, context)
            skips.append(x)
            x = _halved(_halved(x, 1), 2)
        x = self.down_blocks[-1](x, embedding, context)
        for block in self.up_blocks[:-1]:
            x = _doubled(_doubled(block(x, embedding, context), 1), 2)
            x = jnp.concatenate([x, skips.pop()], axis=-1)
        return self.conv_out(self.up_blocks[-1](x, embedding, context))
