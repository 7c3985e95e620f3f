"""`Flux2Transformer2DModel`: the denoiser of FLUX.2, such as FLUX.2-klein.

FLUX.1's network (see `flux`) with four rotary axes, whose last is the text's; one set of
modulations for all blocks of a kind; gated feed-forward layers (Shazeer, 2020, arXiv:2002.05202,
SwiGLU); no biases; and single blocks whose first and last linear layers serve attention and
feed-forward layers together, as in Dehghani et al., 2023, arXiv:2302.05442, figure 2. There is no
paper; see Black Forest Labs' reference code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.attention import attend, merge_heads, split_heads
from jaxdiff.models.dit import (
    EPSILON,
    AdaLayerNorm,
    TransformerConfig,
    modulated,
    refuse_axes,
    residual,
)
from jaxdiff.models.embeddings import (
    constant_angles,
    grid_positions,
    rotary_angles,
    rotate_pairs,
)
from jaxdiff.models.flux import DoubleBlock, TimeEmbedding
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

# Keys that change what is computed; only these values are supported.
FIXED = {"_class_name": "Flux2Transformer2DModel", "eps": EPSILON, "patch_size": 1}

# Columns, then rows. Fused layers hold several parts along the axis that is split: SwiGLU's gate
# and value, or a single block's queries, keys, values, gate and value. A part lies on other devices
# than its share of the next layer, so XLA exchanges activations after `linear_in` and
# `to_qkv_mlp_proj` and before a single block's `to_out`.
SHARDING = (
    (r"\.(to_[qkv]|add_[qkv]_proj|linear_in|to_qkv_mlp_proj|linear|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out|to_out\.0|to_add_out|linear_out|linear_2)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class Flux2Config(TransformerConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

    fixed = FIXED

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    guidance_embeds: bool = True

    def __post_init__(self):
        refuse_axes(self.axes_dims_rope, 4, self.attention_head_dim)
        if self.timestep_guidance_channels % 2:
            raise ValueError(
                f"timestep_guidance_channels = {self.timestep_guidance_channels} must be even"
            )

    @property
    def hidden(self) -> int:
        """The width of the feed-forward layers."""
        return int(self.width * self.mlp_ratio)


_Linear = partial(Linear, use_bias=False)


def _gated(x: Array) -> Array:
    """Maps [..., 2 hidden] to [..., hidden]: the gate comes first."""
    gate, value = jnp.split(x, 2, axis=-1)
    return nnx.silu(gate) * value


class _FeedForward(nnx.Module):
    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        self.linear_in = _Linear(config.width, 2 * config.hidden, rngs=rngs)
        self.linear_out = _Linear(config.hidden, config.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_out(_gated(self.linear_in(x)))


class _ParallelAttention(nnx.Module):
    """Self-attention and feed-forward layers side by side, with common first and last layers."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden
        self.num_heads, self.width = config.num_attention_heads, width
        self.to_qkv_mlp_proj = _Linear(width, 3 * width + 2 * hidden, rngs=rngs)
        self.norm_q, self.norm_k = (
            nnx.RMSNorm(config.attention_head_dim, epsilon=EPSILON, rngs=rngs) for _ in range(2)
        )
        self.to_out = _Linear(width + hidden, width, rngs=rngs)

    def __call__(self, x: Array, angles: Array) -> Array:
        *heads, hidden = jnp.split(self.to_qkv_mlp_proj(x), self.width * np.arange(1, 4), axis=-1)
        query, key, value = (split_heads(part, self.num_heads) for part in heads)
        query = rotate_pairs(self.norm_q(query), angles)
        key = rotate_pairs(self.norm_k(key), angles)
        mixed = merge_heads(attend(query, key, value))
        return self.to_out(jnp.concatenate([mixed, _gated(hidden)], axis=-1))


class _SingleBlock(nnx.Module):
    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs):
        self.attn = _ParallelAttention(config, rngs=rngs)

    def __call__(self, x: Array, of_both: Sequence[Array], angles: Array) -> Array:
        """Maps the text's tokens, followed by the image's, to the same shape."""
        return residual(partial(self.attn, angles=angles), x, *of_both)


class Flux2Transformer2DModel(nnx.Module):
    """Predicts the velocity of latents, noise minus data, from the timestep and the text."""

    def __init__(self, config: Flux2Config, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width = config.width

        def modulation(count: int) -> AdaLayerNorm:
            return AdaLayerNorm(width, count, use_bias=False, rngs=rngs)

        def double_block() -> DoubleBlock:
            feed_forward = partial(_FeedForward, config, rngs=rngs)
            heads = config.num_attention_heads
            return DoubleBlock(width, heads, feed_forward, use_bias=False, rngs=rngs)

        self.config, self.remat = config, remat
        self.time_guidance_embed = TimeEmbedding(
            width,
            is_guided=config.guidance_embeds,
            num_sinusoids=config.timestep_guidance_channels,
            use_bias=False,
            rngs=rngs,
        )
        self.double_stream_modulation_img = modulation(6)
        self.double_stream_modulation_txt = modulation(6)
        self.single_stream_modulation = modulation(3)
        self.x_embedder = _Linear(config.in_channels, width, rngs=rngs)
        self.context_embedder = _Linear(config.joint_attention_dim, width, rngs=rngs)
        self.transformer_blocks = nnx.List([double_block() for _ in range(config.num_layers)])
        self.single_transformer_blocks = nnx.List(
            [_SingleBlock(config, rngs=rngs) for _ in range(config.num_single_layers)]
        )
        self.norm_out = modulation(2)
        self.proj_out = _Linear(width, config.out_channels or config.in_channels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        guidance_scale: Array | None = None,
    ) -> Array:
        """Evaluates the denoiser once; latents and context have the weights' dtype.

        Args:
          latents: [batch, h, w, in channels], as the autoencoder cuts them into patches: h and w
            are those of the image / 16.
          timesteps: float [batch], 1000 times the flow's sigma: 0 to 1000, 1000 for pure noise.
          context: [batch, tokens, joint attention dim], hidden states of the text.
          guidance_scale: float [batch] for networks with `guidance_embeds` (not klein), else None.

        Returns:
          [batch, h, w, out channels], noise minus data, in the dtype of the latents; the shape of
          the latents if the config has no `out_channels`.

        Raises:
          ValueError: if `guidance_scale` is missing or not taken.
        """
        config, (batch, height, width, channels) = self.config, latents.shape
        embedding = self.time_guidance_embed(timesteps, guidance_scale, latents.dtype)
        of_image = self.double_stream_modulation_img(embedding)
        of_text = self.double_stream_modulation_txt(embedding)
        of_both = self.single_stream_modulation(embedding)
        x = self.x_embedder(latents.reshape(batch, -1, channels))
        context = self.context_embedder(context)
        tokens = context.shape[1]
        positions = _positions(tokens, height, width)
        angles = constant_angles(rotary_angles(positions, config.axes_dims_rope, config.rope_theta))
        for block in self.transformer_blocks:
            x, context = call(block, x, context, of_image, of_text, angles, remat=self.remat)
        x = jnp.concatenate([context, x], axis=1)
        for block in self.single_transformer_blocks:
            x = call(block, x, of_both, angles, remat=self.remat)
        scale, shift = self.norm_out(embedding)
        x = self.proj_out(modulated(x[:, tokens:], shift, scale))
        return x.reshape(batch, height, width, -1)


def _positions(tokens: int, height: int, width: int) -> np.ndarray:
    """Returns (0, 0, 0, i) of the text's tokens, then (0, row, column, 0) of the image's."""
    text = np.pad(np.arange(tokens)[:, None], ((0, 0), (3, 0)))
    image = np.pad(grid_positions(height, width), ((0, 0), (0, 1)))
    return np.concatenate([text, image])
