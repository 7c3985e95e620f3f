"""`SD3Transformer2DModel`: the denoiser of Stable Diffusion 3 and 3.5.

Esser et al., 2024, arXiv:2403.03206, section 4: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) whose blocks have weights of their own for the tokens of the text and for those of
the image, and attention over both. Stable Diffusion 3.5 also normalises queries and keys, and the
first blocks of its medium size have a second attention, over the image alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models import config as config_json
from jaxdiff.models.dit import (
    AdaLayerNorm,
    JointAttention,
    SelfAttention,
    fed_forward,
    modulated,
    unpacked,
)
from jaxdiff.models.embeddings import EmbeddingMLP, sinusoids
from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.layers import conv
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

SINUSOIDS = 256  # of a timestep
# Keys that change what is computed; only these values are supported.
FIXED = {"_class_name": "SD3Transformer2DModel"}

SHARDING = (
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|to_add_out|net\.2|linear_2)\.kernel$", ROWS),
    (r"norm\w+\.linear\.kernel$", COLUMNS),
    (r"\.pos_embed$", COLUMNS),  # 0.5 GB in bfloat16 in Stable Diffusion 3.5 medium
)


@dataclass(frozen=True)
class SD3Config:
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

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
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm = {self.qk_norm!r} is not supported")

    @property
    def width(self) -> int:
        """The width of both kinds of tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, data: dict) -> "SD3Config":
        """Reads a parsed `transformer/config.json`; raises InputError if it is not supported."""
        layers = data.get("dual_attention_layers")
        if isinstance(layers, list):  # which would have to be sizes; these are indices, or none
            data = data | {"dual_attention_layers": tuple(layers)}
        return config_json.from_json(cls, "transformer", data, FIXED)

    def to_json(self) -> dict:
        """Returns the `transformer/config.json` that diffusers reads."""
        return config_json.to_json(self, FIXED)


def position_table(config: SD3Config) -> Array:
    """Computes the sinusoids that are added to the patches (arXiv:2403.03206, section 5.3.2).

    Checkpoints have this table among their weights. For each patch of a square of
    `pos_embed_max_size` patches a side, in reading order, it has the sines and cosines of the
    column, then those of the row, in units in which the whole side is as long as the side of
    `sample_size` latents in patches.

    Returns:
      float32 [1, pos_embed_max_size^2, width].
    """
    size, quarter = config.pos_embed_max_size, config.width // 4
    unit = size / (config.sample_size // config.patch_size)
    places = np.arange(size, dtype=np.float32) / np.float32(unit)
    angles = np.outer(places.astype(np.float64), 10000.0 ** -(np.arange(quarter) / quarter))
    side = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
    # Only the device has the whole table, or nothing while the network's shapes are traced: it has
    # 0.9 GB in Stable Diffusion 3.5 medium.
    shape = (size, size, 2 * quarter)
    columns = jnp.broadcast_to(side[None, :], shape)
    rows = jnp.broadcast_to(side[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size**2, config.width)


class _PatchEmbedding(nnx.Module):
    """Maps latents to tokens, one for each patch, and adds the patch's position."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.patch, self.max_size = config.patch_size, config.pos_embed_max_size
        self.proj = conv(
            config.in_channels, config.width, self.patch, stride=self.patch, padding=0, rngs=rngs
        )
        self.pos_embed = nnx.Param(position_table(config))  # a parameter, because files have it

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
        # Positions are facts, which training must not change.
        x = self.proj(latents) + jax.lax.stop_gradient(table).astype(latents.dtype)
        return x.reshape(batch, height * width, -1)


class _TimeTextEmbedding(nnx.Module):
    """Embeds the timestep and the pooled text, which modulate every block."""

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.timestep_embedder = EmbeddingMLP(SINUSOIDS, config.width, rngs=rngs)
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, config.width, rngs=rngs)

    def __call__(self, timesteps: Array, pooled: Array) -> Array:
        """Maps [batch] and [batch, pooled projection dim] to [batch, width]."""
        times = sinusoids(timesteps, SINUSOIDS).astype(pooled.dtype)
        return self.timestep_embedder(times) + self.text_embedder(pooled)


class _Block(nnx.Module):
    """Joint attention and feed-forward, each with a modulated norm, a gate and a residual.

    See Esser et al., figure 2b. With `dual`, a second attention sees the image's tokens alone. The
    `last` block has no use for what becomes of the text's tokens.
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

    def __call__(self, x: Array, context: Array, embedding: Array) -> tuple[Array, Array | None]:
        """Maps the image's and the text's tokens to such tokens; None for the text if last."""
        shift, scale, gate, *of_rest = self.norm1(embedding)
        of_feed_forward, of_dual = of_rest[:3], of_rest[3:]
        if self.ff_context is None:
            context_scale, context_shift = self.norm1_context(embedding)  # in this order
        else:
            context_shift, context_scale, context_gate, *of_context = self.norm1_context(embedding)

        mixed, context_mixed = self.attn(
            modulated(x, shift, scale), modulated(context, context_shift, context_scale)
        )
        y = x + gate[:, None] * mixed
        if self.attn2 is not None:
            shift, scale, gate = of_dual
            y = y + gate[:, None] * self.attn2(modulated(x, shift, scale))
        y = fed_forward(self.ff, y, *of_feed_forward)
        if self.ff_context is None:
            return y, None
        context = context + context_gate[:, None] * context_mixed
        return y, fed_forward(self.ff_context, context, *of_context)


class SD3Transformer2DModel(nnx.Module):
    """Predicts the velocity of latents, noise minus image, from the timestep and the text."""

    def __init__(self, config: SD3Config, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        self.config, self.remat = config, remat
        self.pos_embed = _PatchEmbedding(config, rngs=rngs)
        self.time_text_embed = _TimeTextEmbedding(config, rngs=rngs)
        self.context_embedder = nnx.Linear(config.joint_attention_dim, config.width, rngs=rngs)
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
        self.proj_out = nnx.Linear(
            config.width, config.patch_size**2 * config.out_channels, rngs=rngs
        )

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        pooled: Array,
        skipped: tuple[int, ...] = (),
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
                x, context = call(block, x, context, embedding, remat=self.remat)
        scale, shift = self.norm_out(embedding)  # in this order
        x = self.proj_out(modulated(x, shift, scale))
        return unpacked(x, *latents.shape[1:3], config.patch_size, channels_last=True)
