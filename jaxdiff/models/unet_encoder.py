"""The first half of the U-Net of Stable Diffusion 1, 2 and XL, which ControlNets share.

Rombach et al., 2022, arXiv:2112.10752, section 3.3: the first convolution, the embeddings, and the
down and mid blocks, of residual blocks each followed by a transformer that attends to the text. XL
(Podell et al., 2023, arXiv:2307.01952, section 2) also adds the pooled text and the image's size to
the timestep embedding.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import repeat

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.embeddings import EmbeddingMLP, sinusoids
from jaxdiff.models.layers import Downsample2D, ImagePrompt, ResnetBlock2D, conv
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS
from jaxdiff.models.transformer import Transformer2DModel

# Names of blocks, and whether they have attention.
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}
# Keys that change what is computed; only these values are supported.
FIXED = {
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
}
# Keys without effect unless another key is set, which is then rejected.
IGNORED = {
    "addition_embed_type_num_heads",
    "upcast_attention",  # attention is always computed with a float32 softmax
}

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
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
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
        if self.mid_block_type not in MID_BLOCKS:
            raise ValueError(f"mid_block_type = {self.mid_block_type!r} is not supported")
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
Prompts = list[list[Sequence[ImagePrompt]]]


class Block(nnx.Module):
    """The common part of down and up blocks: residual blocks, each with its transformer."""

    def __init__(self, widths, num_heads, depth, config: UNetEncoderConfig, remat: bool, *, rngs):
        self.remat = remat
        self.resnets = _resnets(widths, config, rngs)
        self.attentions = _transformers(widths, num_heads, depth, config, rngs)

    def layer(self, i: int, x: Array, time_embedding, context, prompts: Prompts | None) -> Array:
        """Applies one residual block and its transformer."""
        x = call(self.resnets[i], x, time_embedding, remat=self.remat)
        if not self.attentions:
            return x
        return call(self.attentions[i], x, context, prompts and prompts[i], remat=self.remat)


class _DownBlock(Block):
    def __init__(self, widths, num_heads, depth, config, remat, *, downsample: bool, rngs):
        super().__init__(widths, num_heads, depth, config, remat, rngs=rngs)
        self.downsamplers = nnx.List(
            [Downsample2D(widths[-1][1], (1, 1), rngs=rngs)] if downsample else []
        )

    def __call__(
        self, x: Array, time_embedding, context, prompts: Prompts | None = None
    ) -> list[Array]:
        """Returns the feature map of every layer; the last is the block's output."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, time_embedding, context, prompts)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nnx.Module):
    """A transformer between two residual blocks, or one residual block, on the smallest map."""

    def __init__(self, config: UNetEncoderConfig, remat: bool, *, rngs: nnx.Rngs):
        self.remat = remat
        same, depth = (config.block_out_channels[-1],) * 2, config.depths[-1]
        attends = MID_BLOCKS[config.mid_block_type]
        self.resnets = _resnets([same] * (1 + attends), config, rngs)
        self.attentions = _transformers([same], config.heads[-1], depth * attends, config, rngs)

    def __call__(self, x: Array, time_embedding, context, prompts: Prompts | None = None) -> Array:
        """Returns a feature map in the shape of `x`."""
        x = call(self.resnets[0], x, time_embedding, remat=self.remat)
        if not self.attentions:
            return x
        x = call(self.attentions[0], x, context, prompts and prompts[0], remat=self.remat)
        return call(self.resnets[1], x, time_embedding, remat=self.remat)


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
        self.mid_block = MidBlock(config, remat, rngs=rngs)

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
        down_prompts: Sequence[Prompts] | None = None,
        mid_prompts: Prompts | None = None,
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
