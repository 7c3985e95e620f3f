"""`UNet2DConditionModel`: the denoiser of Stable Diffusion 1 and 2.

Rombach et al., 2022, arXiv:2112.10752, section 3.3: a U-Net (Ronneberger et al., 2015) of residual
blocks, each followed by a transformer that attends to the text.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import config as config_json
from jaxdiff.models.layers import (
    Attention,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    conv,
    group_norm,
)

DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # name: has attention
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# Values that change what is computed, of which only these are built.
FIXED = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
# Without effect unless another key, which is refused, is set.
IGNORED = {
    "addition_embed_type_num_heads",
    "attention_type",
    "dropout",
    "num_class_embeds",
    "upcast_attention",  # attention is always computed with a float32 softmax
}


@dataclass(frozen=True)
class UNetConfig:
    """The fields of `unet/config.json` that shape the network; the defaults are diffusers'."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False

    def __post_init__(self):
        count = len(self.block_out_channels)
        for name, types, known in (
            ("down_block_types", self.down_block_types, DOWN_BLOCKS),
            ("up_block_types", self.up_block_types, UP_BLOCKS),
        ):
            if len(types) != count or not set(types) <= set(known):
                raise ValueError(f"{name} = {list(types)} is not supported")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads in each down block. `attention_head_dim` holds them, despite its name."""
        heads = self.num_attention_heads or self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    @property
    def time_width(self) -> int:
        """The width of the timestep's embedding."""
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_json(cls, data: dict) -> "UNetConfig":
        """Reads a parsed `unet/config.json`; raises InputError for what is not built."""
        kept = {key: value for key, value in data.items() if key not in IGNORED}
        return config_json.from_json(cls, "unet", kept, FIXED)

    def to_json(self) -> dict:
        """What diffusers reads as `unet/config.json`."""
        return config_json.to_json(self, FIXED)


def timestep_embedding(timesteps: Array, config: UNetConfig) -> Array:
    """Sinusoids of the timesteps (Vaswani et al., 2017, section 3.5).

    Args:
      timesteps: [batch], 0 to 999 as the network was trained, not necessarily whole.

    Returns:
      float32 [batch, block_out_channels[0]].
    """
    half = config.block_out_channels[0] // 2
    exponents = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - config.freq_shift)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponents)
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([cosine, sine] if config.flip_sin_to_cos else [sine, cosine], axis=-1)


class _TimeEmbedding(nnx.Module):
    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(config.block_out_channels[0], config.time_width, rngs=rngs)
        self.linear_2 = nnx.Linear(config.time_width, config.time_width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class _GEGLU(nnx.Module):
    """Shazeer, 2020, arXiv:2002.05202: a linear layer gated by the GELU of another."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(width, 2 * hidden, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class _Identity(nnx.Module):
    """Holds the place of a dropout layer, so that the indices are the checkpoint's."""

    def __call__(self, x: Array) -> Array:
        return x


class _FeedForward(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        hidden = 4 * width
        self.net = nnx.List(
            [_GEGLU(width, hidden, rngs=rngs), _Identity(), nnx.Linear(hidden, width, rngs=rngs)]
        )

    def __call__(self, x: Array) -> Array:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward: each normalised first, then added."""

    def __init__(self, width: int, num_heads: int, context_width: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(width, num_heads, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(width, num_heads, context_width=context_width, rngs=rngs)
        self.norm3 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.ff = _FeedForward(width, rngs=rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        """[batch, h w, width] and [batch, tokens, context width] to x's shape."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the positions of a feature map, beside a shortcut."""

    def __init__(self, channels: int, num_heads: int, config: UNetConfig, *, rngs: nnx.Rngs):
        def projection():
            if config.use_linear_projection:
                return nnx.Linear(channels, channels, rngs=rngs)
            return conv(channels, channels, 1, rngs=rngs)

        self.norm = group_norm(channels, config.norm_num_groups, 1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(channels, num_heads, config.cross_attention_dim, rngs=rngs)
                for _ in range(config.transformer_layers_per_block)
            ]
        )
        self.proj_out = projection()

    def __call__(self, x: Array, context: Array) -> Array:
        """[batch, h, w, channels] and [batch, tokens, context width] to x's shape."""
        hidden = self.proj_in(self.norm(x))
        tokens = hidden.reshape(x.shape[0], -1, x.shape[-1])  # [b, h w, c]
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))


def _resnets(widths: list[tuple[int, int]], config: UNetConfig, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List(
        [
            ResnetBlock2D(
                before,
                after,
                groups=config.norm_num_groups,
                epsilon=config.norm_eps,
                time_width=config.time_width,
                rngs=rngs,
            )
            for before, after in widths
        ]
    )


class _Block(nnx.Module):
    """What down and up blocks have in common: residual blocks, each with its transformer."""

    def __init__(self, widths, num_heads, config: UNetConfig, *, attention: bool, rngs: nnx.Rngs):
        self.resnets = _resnets(widths, config, rngs)
        self.attentions = nnx.List(
            [Transformer2DModel(after, num_heads, config, rngs=rngs) for _, after in widths]
            if attention
            else []
        )

    def layer(self, i: int, x: Array, time_embedding: Array, context: Array) -> Array:
        x = self.resnets[i](x, time_embedding)
        return self.attentions[i](x, context) if self.attentions else x


class _DownBlock(_Block):
    def __init__(self, widths, num_heads, config, *, attention, downsample: bool, rngs):
        super().__init__(widths, num_heads, config, attention=attention, rngs=rngs)
        self.downsamplers = nnx.List(
            [Downsample2D(widths[-1][1], (1, 1), rngs=rngs)] if downsample else []
        )

    def __call__(self, x: Array, time_embedding: Array, context: Array) -> list[Array]:
        """Returns the feature maps of every layer; the last is the block's output."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_embedding, context)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in self.downsamplers]


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, num_heads: int, config: UNetConfig, *, rngs: nnx.Rngs):
        self.resnets = _resnets([(channels, channels)] * 2, config, rngs)
        self.attentions = nnx.List([Transformer2DModel(channels, num_heads, config, rngs=rngs)])

    def __call__(self, x: Array, time_embedding: Array, context: Array) -> Array:
        x = self.resnets[0](x, time_embedding)
        return self.resnets[1](self.attentions[0](x, context), time_embedding)


class _UpBlock(_Block):
    def __init__(self, widths, num_heads, config, *, attention, upsample: bool, rngs):
        super().__init__(widths, num_heads, config, attention=attention, rngs=rngs)
        self.upsamplers = nnx.List([Upsample2D(widths[-1][1], rngs=rngs)] if upsample else [])

    def __call__(self, x: Array, skips: list[Array], time_embedding, context) -> Array:
        """Takes one feature map from the end of `skips` for each layer; more may be left."""
        for i in range(len(self.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(i, x, time_embedding, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


class UNet2DConditionModel(nnx.Module):
    """Predicts the noise (or v) in latents, given the timestep and the text."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        channels, heads, layers = config.block_out_channels, config.heads, config.layers_per_block
        last = len(channels) - 1
        self.config = config
        self.conv_in = conv(config.in_channels, channels[0], 3, rngs=rngs)
        self.time_embedding = _TimeEmbedding(config, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                _DownBlock(
                    [(channels[max(i - 1, 0)], width)] + [(width, width)] * (layers - 1),
                    heads[i],
                    config,
                    attention=DOWN_BLOCKS[config.down_block_types[i]],
                    downsample=i < last,
                    rngs=rngs,
                )
                for i, width in enumerate(channels)
            ]
        )
        self.mid_block = _MidBlock(channels[-1], heads[-1], config, rngs=rngs)
        skips = [channels[0]]  # the width of every feature map that the way up takes back
        for i, width in enumerate(channels):
            skips += [width] * (layers + (i < last))
        self.up_blocks = nnx.List([])
        for i in reversed(range(len(channels))):
            below = [channels[min(i + 1, last)]] + [channels[i]] * layers
            self.up_blocks.append(
                _UpBlock(
                    [(width + skips.pop(), channels[i]) for width in below],
                    heads[i],
                    config,
                    attention=UP_BLOCKS[config.up_block_types[last - i]],
                    upsample=i > 0,
                    rngs=rngs,
                )
            )
        self.conv_norm_out = group_norm(
            channels[0], config.norm_num_groups, config.norm_eps, rngs=rngs
        )
        self.conv_out = conv(channels[0], config.out_channels, 3, rngs=rngs)

    def __call__(self, latents: Array, timesteps: Array, context: Array) -> Array:
        """One evaluation of the denoiser.

        Args:
          latents: [batch, h, w, in channels], any height and width.
          timesteps: [batch], in the units of training (0 to 999).
          context: [batch, tokens, cross attention dim], the text encoder's hidden states.

        Returns:
          [batch, h, w, out channels].
        """
        sinusoids = timestep_embedding(timesteps, self.config).astype(latents.dtype)
        time_embedding = self.time_embedding(sinusoids)
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], time_embedding, context)
        x = self.mid_block(skips[-1], time_embedding, context)
        for block in self.up_blocks:
            x = block(x, skips, time_embedding, context)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))
