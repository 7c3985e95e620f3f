"""`UNet2DConditionModel`: the denoiser of Stable Diffusion 1, 2 and XL.

Rombach et al., 2022, arXiv:2112.10752, section 3.3: a U-Net (Ronneberger et al., 2015) of residual
blocks, each followed by a transformer that attends to the text. XL (Podell et al., 2023,
arXiv:2307.01952, section 2) also adds the pooled text and the image's size to the timestep
embedding; latent consistency models (Luo et al., 2023, arXiv:2310.04378) add the guidance scale.

DeepCache (Ma et al., 2023, arXiv:2312.00858) is built in: the features of all but the outermost
layers can be reused from an earlier evaluation. What ControlNets add (Zhang et al., 2023,
arXiv:2302.05543) and the image prompts of IP-Adapters (Ye et al., 2023, arXiv:2308.06721) are
inputs of the network.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.embeddings import EmbeddingMLP, sinusoids
from jaxdiff.models.layers import (
    Downsample2D,
    ImagePrompt,
    ResnetBlock2D,
    Upsample2D,
    conv,
    group_norm,
)
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS
from jaxdiff.models.transformer import Transformer2DModel

DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # name: has attention
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# Keys that change what is computed; only these values are supported.
ENCODER_FIXED = {
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
}
FIXED = {
    **ENCODER_FIXED,
    "_class_name": "UNet2DConditionModel",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
}
# Keys without effect unless another key is set, which is then rejected.
ENCODER_IGNORED = {
    "addition_embed_type_num_heads",
    "upcast_attention",  # attention is always computed with a float32 softmax
}
IGNORED = ENCODER_IGNORED | {"attention_type", "dropout"}


# Columns, then rows, also inside residual blocks. GEGLU's value and gate share one kernel, so each
# device must fetch its half of one or the other.
SHARDING = (
    (r"\.(to_[qkv]|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|net\.2|linear_2)\.kernel$", ROWS),
    (r"\.(conv1|time_emb_proj)\.kernel$", COLUMNS),
    (r"\.(conv2|conv_shortcut)\.kernel$", ROWS),
    (r"\.(\w+samplers\.\d+\.conv|proj_in|proj_out)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class UNetEncoderConfig(ComponentConfig):
    """What the config files of a U-Net and of a ControlNet share, with diffusers' defaults."""

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    def __post_init__(self):
        self._check_types("down_block_types", self.down_block_types, DOWN_BLOCKS)
        count = len(self.block_out_channels)
        for name, values in (
            ("attention_head_dim", self.heads),
            ("transformer_layers_per_block", self.depths),
        ):
            if len(values) != count or min(values) < 1:
                raise ValueError(f"{name} must be {count} numbers of at least 1, or one for all")
        for width, heads in zip(self.block_out_channels, self.heads, strict=True):
            if width % heads or width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of its heads or groups"
                )
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"addition_embed_type = {self.addition_embed_type!r} is not supported")
        if self.addition_embed_type and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ValueError(
                "addition_embed_type needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )

    def _check_types(self, name: str, types: tuple[str, ...], known: Collection[str]) -> None:
        if len(types) != len(self.block_out_channels) or not set(types) <= set(known):
            raise ValueError(f"{name} = {list(types)} is not supported")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads in each down block; `attention_head_dim` holds them despite its name."""
        return self._for_each_block(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers per transformer in each down block."""
        return self._for_each_block(self.transformer_layers_per_block)

    def _for_each_block(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def factor(self) -> int:
        """Latents per position of the deepest block along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time_width(self) -> int:
        """The width of the timestep embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """The widths of the feature maps that the up blocks reuse, in the order they are made."""
        last = len(self.block_out_channels) - 1
        widths = [self.block_out_channels[0]]
        for i, width in enumerate(self.block_out_channels):
            widths += [width] * (self.layers_per_block + (i < last))
        return tuple(widths)


@dataclass(frozen=True)
class UNetConfig(UNetEncoderConfig):
    """The fields of `unet/config.json` that shape the network, with diffusers' defaults."""

    component = "unet"
    fixed = FIXED
    ignored = IGNORED

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    time_cond_proj_dim: int | None = None

    def __post_init__(self):
        self._check_types("up_block_types", self.up_block_types, UP_BLOCKS)
        super().__post_init__()

    @property
    def cross_attention_widths(self) -> tuple[int, ...]:
        """The width of each attention to the text: of the down, then the up, then the mid block."""
        depths = list(zip(self.block_out_channels, self.depths, strict=True))
        down = zip(depths, map(DOWN_BLOCKS.get, self.down_block_types), strict=True)
        up = zip(reversed(depths), map(UP_BLOCKS.get, self.up_block_types), strict=True)
        widths = []
        for blocks, layers in ((down, self.layers_per_block), (up, self.layers_per_block + 1)):
            for (width, depth), attends in blocks:
                widths += [width] * (layers * depth * attends)
        width, depth = depths[-1]
        return (*widths, *[width] * depth)


def _resnets(widths: list[tuple[int, int]], config: UNetEncoderConfig, rngs: nnx.Rngs) -> nnx.List:
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


def _transformers(
    widths: list[tuple[int, int]],
    num_heads: int,
    depth: int,
    config: UNetEncoderConfig,
    rngs: nnx.Rngs,
) -> nnx.List:
    """Makes a transformer for each residual block, or none if `depth` is 0."""
    return nnx.List(
        [
            Transformer2DModel(
                width,
                num_heads,
                depth,
                config.cross_attention_dim,
                groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                rngs=rngs,
            )
            for _, width in widths
            if depth
        ]
    )


# The image prompts of a block: for each transformer, for each of its layers, those of each adapter.
_Prompts = list[list[Sequence[ImagePrompt]]]


class _Block(nnx.Module):
    """The common part of down and up blocks: residual blocks, each with its transformer."""

    def __init__(self, widths, num_heads, depth, config: UNetEncoderConfig, remat: bool, *, rngs):
        self.remat = remat
        self.resnets = _resnets(widths, config, rngs)
        self.attentions = _transformers(widths, num_heads, depth, config, rngs)

    def layer(self, i: int, x: Array, time_embedding, context, prompts: _Prompts | None) -> Array:
        x = call(self.resnets[i], x, time_embedding, remat=self.remat)
        if not self.attentions:
            return x
        return call(self.attentions[i], x, context, prompts and prompts[i], remat=self.remat)


class _DownBlock(_Block):
    def __init__(self, widths, num_heads, depth, config, remat, *, downsample: bool, rngs):
        super().__init__(widths, num_heads, depth, config, remat, rngs=rngs)
        self.downsamplers = nnx.List(
            [Downsample2D(widths[-1][1], (1, 1), rngs=rngs)] if downsample else []
        )

    def __call__(
        self, x: Array, time_embedding, context, prompts: _Prompts | None = None
    ) -> list[Array]:
        """Returns the feature map of every layer; the last is the block's output."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_embedding, context, prompts)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in self.downsamplers]


class _MidBlock(nnx.Module):
    def __init__(self, config: UNetEncoderConfig, remat: bool, *, rngs: nnx.Rngs):
        self.remat = remat
        same = (config.block_out_channels[-1],) * 2
        self.resnets = _resnets([same] * 2, config, rngs)
        self.attentions = _transformers([same], config.heads[-1], config.depths[-1], config, rngs)

    def __call__(self, x: Array, time_embedding, context, prompts: _Prompts | None = None) -> Array:
        x = call(self.resnets[0], x, time_embedding, remat=self.remat)
        x = call(self.attentions[0], x, context, prompts and prompts[0], remat=self.remat)
        return call(self.resnets[1], x, time_embedding, remat=self.remat)


class _UpBlock(_Block):
    def __init__(self, widths, num_heads, depth, config, remat, *, upsample: bool, rngs):
        super().__init__(widths, num_heads, depth, config, remat, rngs=rngs)
        self.upsamplers = nnx.List([Upsample2D(widths[-1][1], rngs=rngs)] if upsample else [])

    def __call__(
        self,
        x: Array,
        skips: list[Array],
        time_embedding: Array,
        context: Array,
        layers: slice = slice(None),
        prompts: _Prompts | None = None,
    ) -> Array:
        """Runs the layers, each of which pops a feature map off `skips`; more may be left over."""
        for i in range(len(self.resnets))[layers]:
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(i, x, time_embedding, context, prompts)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


class UNetEncoder(nnx.Module):
    """The first convolution, the embeddings, and the down and mid blocks of a U-Net."""

    def __init__(
        self,
        config: UNetEncoderConfig,
        remat: bool = False,
        *,
        condition_width: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the layers; a condition of `condition_width` may be added to the timestep's.

        With `remat`, gradients recompute what is inside the blocks, as in `UNet2DConditionModel`.
        """
        channels = config.block_out_channels
        self.config = config
        self.conv_in = conv(config.in_channels, channels[0], 3, rngs=rngs)
        self.time_embedding = EmbeddingMLP(
            channels[0], config.time_width, condition_width=condition_width, rngs=rngs
        )
        self.add_embedding = (
            EmbeddingMLP(config.projection_class_embeddings_input_dim, config.time_width, rngs=rngs)
            if config.addition_embed_type
            else None
        )
        self.down_blocks = nnx.List(
            [
                _DownBlock(
                    [(channels[max(i - 1, 0)], width)]
                    + [(width, width)] * (config.layers_per_block - 1),
                    config.heads[i],
                    config.depths[i] if DOWN_BLOCKS[config.down_block_types[i]] else 0,
                    config,
                    remat,
                    downsample=i < len(channels) - 1,
                    rngs=rngs,
                )
                for i, width in enumerate(channels)
            ]
        )
        self.mid_block = _MidBlock(config, remat, rngs=rngs)

    def embedded(
        self,
        timesteps: Array,
        pooled: Array | None,
        time_ids: Array | None,
        dtype: jnp.dtype,
        condition: Array | None = None,
    ) -> Array:
        """Embeds everything that conditions the residual blocks.

        Args:
          timesteps, pooled, time_ids: as for `UNet2DConditionModel`.
          dtype: that of the result.
          condition: [batch, condition width], is projected and added to the timesteps' sinusoids.

        Returns:
          [batch, time width].
        """
        config = self.config
        order = {"cosine_first": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        times = sinusoids(timesteps, config.block_out_channels[0], **order)
        embedded = self.time_embedding(times.astype(dtype), condition)
        if self.add_embedding is not None:
            sizes = sinusoids(time_ids, config.addition_time_embed_dim, **order)
            sizes = sizes.reshape(len(time_ids), -1)  # [b, ids * dim]
            added = jnp.concatenate([pooled, sizes], axis=-1).astype(dtype)
            embedded = embedded + self.add_embedding(added)
        return embedded

    def encode(
        self,
        x: Array,
        time_embedding: Array,
        context: Array,
        down_prompts: Sequence[_Prompts] | None = None,
        mid_prompts: _Prompts | None = None,
    ) -> tuple[list[Array], Array]:
        """Runs the down and mid blocks.

        Args:
          x: [batch, h, w, first width], the output of the first convolution.
          time_embedding: [batch, time width], of `embedded`.
          context: [batch, tokens, cross attention dim].
          down_prompts, mid_prompts: the image prompts of each down block and of the mid block; for
            each transformer, for each of its layers, one of each adapter. None for none.

        Returns:
          the skips, which begin with x: feature maps [batch, h_i, w_i, c_i] with the widths
          `skip_widths`; and the mid block's output, [batch, h_last, w_last, c_last].
        """
        skips = [x]
        for block, prompts in zip(self.down_blocks, down_prompts or repeat(None), strict=False):
            skips += block(skips[-1], time_embedding, context, prompts)
        return skips, self.mid_block(skips[-1], time_embedding, context, mid_prompts)


class _Dealt(NamedTuple):
    """The image prompts of each down block, of each up block and of the mid block."""

    down: list[_Prompts] | None
    up: list[_Prompts | None]
    mid: _Prompts | None


def _prompts_of(block: _Block | _MidBlock, left: Iterator[Sequence[ImagePrompt]]) -> _Prompts:
    """Takes those of a block off what is left."""
    return [[next(left) for _ in each.transformer_blocks] for each in block.attentions]


class UNet2DConditionModel(UNetEncoder):
    """Predicts the noise (or v) in latents from the timestep and the text."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between residual blocks and transformers (Chen et al., 2016,
        arXiv:1604.06174).
        """
        super().__init__(config, remat, condition_width=config.time_cond_proj_dim, rngs=rngs)
        channels, layers = config.block_out_channels, config.layers_per_block
        last, skips = len(channels) - 1, list(config.skip_widths)
        self.up_blocks = nnx.List([])
        for i in reversed(range(len(channels))):
            below = [channels[min(i + 1, last)]] + [channels[i]] * layers
            self.up_blocks.append(
                _UpBlock(
                    [(width + skips.pop(), channels[i]) for width in below],
                    config.heads[i],
                    config.depths[i] if UP_BLOCKS[config.up_block_types[last - i]] else 0,
                    config,
                    remat,
                    upsample=i > 0,
                    rngs=rngs,
                )
            )
        self.conv_norm_out = group_norm(
            channels[0], config.norm_num_groups, config.norm_eps, rngs=rngs
        )
        self.conv_out = conv(channels[0], config.out_channels, 3, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        *,
        pooled: Array | None = None,
        time_ids: Array | None = None,
        guidance_scale: Array | None = None,
        residuals: tuple[list[Array], Array] | None = None,
        image_prompts: Sequence[Sequence[ImagePrompt]] | None = None,
    ) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, in channels], any height and width.
          timesteps: [batch], in the units of training (0 to 999), not necessarily whole.
          context: [batch, tokens, cross attention dim], the text encoders' hidden states.
          pooled: [batch, projection dim], the pooled text embedding; required by "text_time"
            networks (XL).
          time_ids: [batch, 6], required by the same networks: the original's height and width, the
            crop's top and left, the target's height and width, in pixels; or [batch, 5] with an
            aesthetic score in place of the last two (the refiner).
          guidance_scale: [batch], for networks with `time_cond_proj_dim`, which are distilled from
            a guided network; None leaves it out, as diffusers does.
          residuals: what is added to each skip after all down blocks, [batch, h_i, w_i, c_i] in
            the order of `skip_widths` (or [batch, 1, 1, c_i]), and to the mid block's output; of
            the latents' dtype. A ControlNet computes them (Zhang et al., section 3.2); those of
            several are summed. None adds nothing.
          image_prompts: for each attention to the text, in the order of `cross_attention_widths`,
            what it attends to besides: an item of each IP-Adapter. None for no images.

        Returns:
          [batch, h, w, out channels].
        """
        conditions = {"pooled": pooled, "time_ids": time_ids, "guidance_scale": guidance_scale}
        added = {"residuals": residuals, "image_prompts": image_prompts}
        return self.evaluate(latents, timesteps, context, **conditions, **added)[0]

    def evaluate(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        deep: Array | None = None,
        *,
        pooled: Array | None = None,
        time_ids: Array | None = None,
        guidance_scale: Array | None = None,
        residuals: tuple[list[Array], Array] | None = None,
        image_prompts: Sequence[Sequence[ImagePrompt]] | None = None,
    ) -> tuple[Array, Array]:
        """Evaluates the denoiser and also returns features that a later evaluation can reuse.

        Args:
          latents, timesteps, context, pooled, time_ids, guidance_scale, residuals, image_prompts:
            as for `__call__`.
          deep: the second result for the same batch at a nearby timestep; with it, only the first
            convolution and the last layer of the up blocks are computed (Ma et al., figure 3),
            and only the first of the residuals and that layer's image prompts are used. None
            computes everything.

        Returns:
          [batch, h, w, out channels]; and `deep`, the input of the last layer of the up blocks
          without its skip, [batch, h, w, channels].
        """
        condition = None
        if guidance_scale is not None:
            # Luo et al., 2023, use w, which is 0 without guidance; diffusers' scale is then 1.
            condition = sinusoids(
                1000 * (guidance_scale - 1),
                self.config.time_cond_proj_dim,
                cosine_first=False,
                freq_shift=1,
            ).astype(latents.dtype)
        time_embedding = self.embedded(timesteps, pooled, time_ids, latents.dtype, condition)
        entry = self.conv_in(latents)
        prompts = self._dealt(image_prompts)
        if deep is None:
            deep = self._deep(entry, time_embedding, context, residuals, prompts)
        if residuals is not None:
            entry = entry + residuals[0][0]
        last = slice(-1, None)
        x = self.up_blocks[-1](deep, [entry], time_embedding, context, last, prompts.up[-1])
        return self.conv_out(nnx.silu(self.conv_norm_out(x))), deep

    def _dealt(self, prompts: Sequence[Sequence[ImagePrompt]] | None) -> _Dealt:
        if prompts is None:
            return _Dealt(None, [None] * len(self.up_blocks), None)
        wanted = len(self.config.cross_attention_widths)
        if len(prompts) != wanted:
            raise ValueError(f"image prompts for {len(prompts)} attentions, but there are {wanted}")
        left = iter(prompts)
        down = [_prompts_of(block, left) for block in self.down_blocks]
        up = [_prompts_of(block, left) for block in self.up_blocks]
        return _Dealt(down, up, _prompts_of(self.mid_block, left))

    def _deep(
        self, x: Array, time_embedding: Array, context: Array, residuals, prompts: _Dealt
    ) -> Array:
        """Computes everything between the first convolution and the last layer of the up blocks."""
        skips, x = self.encode(x, time_embedding, context, prompts.down, prompts.mid)
        if residuals is not None:
            added, to_mid = residuals
            skips = [skip + each for skip, each in zip(skips, added, strict=True)]
            x = x + to_mid
        *blocks, last = zip(self.up_blocks, prompts.up, strict=True)
        for block, own in blocks:
            x = block(x, skips, time_embedding, context, prompts=own)
        block, own = last
        return block(x, skips, time_embedding, context, slice(-1), own)
