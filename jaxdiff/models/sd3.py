"""`SD3Transformer2DModel`: the denoiser of Stable Diffusion 3 and 3.5.

Esser et al., 2024, arXiv:2403.03206, section 4: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) whose blocks have weights of their own for the tokens of the text and for those of
the image, and attention over both. Stable Diffusion 3.5 also normalises queries and keys, and the
first blocks of its medium size have a second attention, over the image alone.
"""

from dataclasses import dataclass

import jax
from flax import nnx
from jax import Array

from jaxdiff.models.dit import (
    AdaLayerNorm,
    JointAttention,
    SelfAttention,
    TransformerConfig,
    modulated,
    residual,
    unpacked,
)
from jaxdiff.models.embeddings import EmbeddingMLP, NumberEmbedding, grid_sinusoids
from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.layers import conv
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

# Keys that change what is computed; only these values are supported.
MOST_PATCHES = 1024  # along a side; the table of positions grows with the square
FIXED = {"_class_name": "SD3Transformer2DModel"}

SHARDING = (
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|to_add_out|net\.2|linear_2)\.kernel$", ROWS),
    (r"norm\w+\.linear\.kernel$", COLUMNS),
    (r"\.pos_embed$", COLUMNS),  # 0.5 GB in bfloat16 in Stable Diffusion 3.5 medium
)


@dataclass(frozen=True)
class SD3Config(TransformerConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

    fixed = FIXED

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim = {self.caption_projection_dim} is not supported (only "
                f"num_attention_heads * attention_head_dim = {self.width} is)"
            )
        if self.width % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {self.width} is not a multiple of 4"
            )
        if self.sample_size < self.patch_size:
            raise ValueError(f"sample_size = {self.sample_size} is less than patch_size")
        if self.pos_embed_max_size > MOST_PATCHES:
            raise ValueError(f"pos_embed_max_size must be at most {MOST_PATCHES}")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm = {self.qk_norm!r} is not supported")


def position_table(config: SD3Config) -> Array:
    """Returns the table of positions that checkpoints have among their weights.

    It is of a square of `pos_embed_max_size` patches a side, in units in which the side of
    `sample_size` latents is as long as the whole table's (arXiv:2403.03206, section 5.3.2).

    Returns:
      float32 [1, pos_embed_max_size^2, width].
    """
    size, base = config.pos_embed_max_size, config.sample_size // config.patch_size
    return grid_sinusoids(size, size, config.width, base=base)[None]


class _PatchEmbedding(nnx.Module):
    """Maps latents to tokens, one for each patch, and adds the patch's position."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.patch, self.max_size = config.patch_size, config.pos_embed_max_size
        self.proj = conv(
            config.in_channels, config.width, self.patch, stride=self.patch, padding=0, rngs=rngs
        )
        # A parameter, because files have it.
        self.pos_embed = nnx.Param(position_table(config))

    def __call__(self, latents: Array) -> Array:
        """Maps [batch, h, w, in channels] to [batch, h w / patch^2, width].

        Raises:
          ValueError: for a height or width that is no multiple of the patch or above the table's.
        """
        batch, *sides, _ = latents.shape
        if any(side % self.patch or side > self.max_size * self.patch for side in sides):
            raise ValueError(
                f"latents of {sides[0]}x{sides[1]}: each side must be a multiple of {self.patch} "
                f"and at most {self.max_size * self.patch}"
            )
        height, width = (side // self.patch for side in sides)
        top, left = (self.max_size - height) // 2, (self.max_size - width) // 2
        table = self.pos_embed[...].reshape(self.max_size, self.max_size, -1)
        table = table[top : top + height, left : left + width]
        # Training must not change the positions.
        x = self.proj(latents) + jax.lax.stop_gradient(table).astype(latents.dtype)
        return x.reshape(batch, height * width, -1)


class _TimeTextEmbedding(nnx.Module):
    """Embeds the timestep and the pooled text, which modulate every block."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.timestep_embedder = NumberEmbedding(config.width, rngs=rngs)
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, config.width, rngs=rngs)

    def __call__(self, timesteps: Array, pooled: Array) -> Array:
        """Maps [batch] and [batch, pooled projection dim] to [batch, width]."""
        return self.timestep_embedder(timesteps, pooled.dtype) + self.text_embedder(pooled)


class _Block(nnx.Module):
    """Joint attention and feed-forward, each with a modulated norm, a gate and a residual.

    See arXiv:2403.03206, figure 2b. With `dual`, a second attention sees the image's tokens alone.
    The `last` block returns the image's tokens only.
    """

    def __init__(self, config: SD3Config, *, dual: bool, last: bool, rngs: nnx.Rngs):
        width, heads = config.width, config.num_attention_heads
        qk_norm = config.qk_norm is not None
        self.norm1 = AdaLayerNorm(width, 9 if dual else 6, rngs=rngs)
        self.norm1_context = AdaLayerNorm(width, 2 if last else 6, rngs=rngs)
        self.attn = JointAttention(width, heads, qk_norm=qk_norm, context_out=not last, rngs=rngs)
        self.attn2 = SelfAttention(width, heads, qk_norm=qk_norm, rngs=rngs) if dual else None
        self.ff = FeedForward(width, rngs=rngs)
        self.ff_context = None if last else FeedForward(width, rngs=rngs)

    def __call__(
        self, x: Array, context: Array, embedding: Array, *, last_counts: int
    ) -> tuple[Array, Array | None]:
        """Maps the image's and the text's tokens to such tokens; None for the text if last."""
        shift, scale, gate, *of_rest = self.norm1(embedding)
        of_feed_forward, of_dual = of_rest[:3], of_rest[3:]
        if self.ff_context is None:
            context_scale, context_shift = self.norm1_context(embedding)  # in this order
        else:
            context_shift, context_scale, context_gate, *of_context = self.norm1_context(embedding)

        mixed, context_mixed = self.attn(
            modulated(x, shift, scale),
            modulated(context, context_shift, context_scale),
            last_counts=last_counts,
        )
        y = x + gate[:, None] * mixed
        if self.attn2 is not None:
            shift, scale, gate = of_dual
            y = y + gate[:, None] * self.attn2(modulated(x, shift, scale))
        y = residual(self.ff, y, *of_feed_forward)
        if self.ff_context is None:
            return y, None
        context = context + context_gate[:, None] * context_mixed
        return y, residual(self.ff_context, context, *of_context)


class SD3Transformer2DModel(nnx.Module):
    """Predicts the velocity of latents, noise minus image, from the timestep and the text."""

    def __init__(self, config: SD3Config, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        self.config, self.remat = config, remat
        self.pos_embed = _PatchEmbedding(config, rngs=rngs)
        self.time_text_embed = _TimeTextEmbedding(config, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, config.width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [
                _Block(
                    config,
                    dual=i in config.dual_attention_layers,
                    last=i == config.num_layers - 1,
                    rngs=rngs,
                )
                for i in range(config.num_layers)
            ]
        )
        self.norm_out = AdaLayerNorm(config.width, 2, rngs=rngs)
        self.proj_out = Linear(config.width, config.patch_size**2 * config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        pooled: Array,
        skipped: tuple[int, ...] = (),
        last_counts: int = 1,
    ) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, in channels]; their dtype is that of the activations.
          timesteps: [batch], 0 to 1000, not necessarily whole: a thousand times the noise's share
            (sigma).
          context: [batch, tokens, joint attention dim], the text encoders' hidden states; all
            tokens are seen.
          pooled: [batch, pooled projection dim], the pooled text embeddings.
          skipped: the indices of blocks to leave out, as skip-layer guidance does.
          last_counts: how many tokens like the last one of the context there are. Tokens have no
            positions here, so equal ones stay equal, and one can be computed for all of them.

        Returns:
          [batch, h, w, out channels].

        Raises:
          ValueError: for a height or width that is no multiple of `patch_size` or has more than
            `pos_embed_max_size` patches, and for the index of a block that there is not.
        """
        config = self.config
        if not set(skipped) <= set(range(config.num_layers)):
            raise ValueError(f"skipped = {skipped}: there are only {config.num_layers} blocks")
        x = self.pos_embed(latents)
        embedding = self.time_text_embed(timesteps, pooled)
        context = self.context_embedder(context)
        for i, block in enumerate(self.transformer_blocks):
            if i not in skipped:
                x, context = call(
                    block, x, context, embedding, remat=self.remat, last_counts=last_counts
                )
        scale, shift = self.norm_out(embedding)  # in this order
        x = self.proj_out(modulated(x, shift, scale))
        return unpacked(x, *latents.shape[1:3], config.patch_size, channels_last=True)
