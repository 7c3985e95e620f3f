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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import unet_encoder
from jaxdiff.models.embeddings import sinusoids
from jaxdiff.models.layers import ImagePrompt, Upsample2D, conv, group_norm
from jaxdiff.models.unet_encoder import (
    DOWN_BLOCKS,
    MID_BLOCKS,
    Block,
    MidBlock,
    Prompts,
    UNetEncoder,
    UNetEncoderConfig,
)

SHARDING = unet_encoder.SHARDING
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}  # name: has attention
FIXED = {
    **unet_encoder.FIXED,
    "_class_name": "UNet2DConditionModel",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
}
IGNORED = unet_encoder.IGNORED | {"attention_type", "dropout"}


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
        return (*widths, *[width] * (depth * MID_BLOCKS[self.mid_block_type]))


class _UpBlock(Block):
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
        prompts: Prompts | None = None,
    ) -> Array:
        """Runs the layers, each of which pops a feature map off `skips`; more may be left over."""
        for i in range(len(self.resnets))[layers]:
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.layer(i, x, time_embedding, context, prompts)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


class _Dealt(NamedTuple):
    """The image prompts of each down block, of each up block and of the mid block."""

    down: list[Prompts] | None
    up: list[Prompts | None]
    mid: Prompts | None


def _prompts_of(block: Block | MidBlock, left: Iterator[Sequence[ImagePrompt]]) -> Prompts:
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
        return self.after_embedding(
            latents, time_embedding, context, deep, residuals=residuals, image_prompts=image_prompts
        )

    def after_embedding(
        self,
        latents: Array,
        time_embedding: Array,
        context: Array,
        deep: Array | None = None,
        *,
        residuals: tuple[list[Array], Array] | None = None,
        image_prompts: Sequence[Sequence[ImagePrompt]] | None = None,
    ) -> tuple[Array, Array]:
        """Does what `evaluate` does, with a finished embedding of what conditions all blocks.

        Args:
          time_embedding: [batch, time width], of `embedded`.
          latents, context, deep, residuals, image_prompts: as for `evaluate`.

        Returns:
          as `evaluate`.
        """
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
