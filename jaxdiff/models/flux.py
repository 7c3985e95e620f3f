"""`FluxTransformer2DModel`: the denoiser of FLUX.1 dev and schnell.

A rectified flow transformer (Esser et al., 2024, arXiv:2403.03206) without a paper of its own; see
Black Forest Labs' reference code and "FLUX.1 Kontext", arXiv:2506.15742, section 2. Double blocks
have weights for the text and weights for the image, and join them only in attention. Single blocks
process both alike, with attention and feed-forward layers side by side (Dehghani et al., 2023,
arXiv:2302.05442, section 2). Positions are rotary embeddings (Su et al., 2021, arXiv:2104.09864);
the guidance scale of dev is one more input (Meng et al., 2023, arXiv:2210.03142).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.dit import (
    AdaLayerNorm,
    JointAttention,
    SelfAttention,
    TransformerConfig,
    joint_block,
    modulated,
    packed,
    refuse_axes,
    residual,
    unpacked,
)
from jaxdiff.models.embeddings import (
    EmbeddingMLP,
    NumberEmbedding,
    constant_angles,
    grid_positions,
    rotary_angles,
)
from jaxdiff.models.feed_forward import FeedForward, gelu_tanh
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

PATCH = 2  # latents per token along each side
MLP_RATIO = 4  # of a feed-forward layer's width to the tokens'
THETA = 10_000  # the base of the rotary frequencies
# Keys that change what is computed; only these values are supported.
FIXED = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}

# Columns, then rows. A modulation's columns are gathered where they are used, one row per image;
# together, these layers hold a quarter of dev's weights. A single block's `proj_out` takes the
# heads' values followed by the feed-forward layer's; the parts of this joint axis lie on other
# devices than those of either, so XLA exchanges the activations in between.
SHARDING = (
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|proj_mlp|linear|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|to_add_out|net\.2|proj_out|linear_2)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class FluxConfig(TransformerConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

    fixed = FIXED

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        sizes = {"in_channels": self.in_channels, "out_channels": self.token_size}
        for name, channels in sizes.items():
            if channels % PATCH**2:
                raise ValueError(f"{name} = {channels} is not a multiple of {PATCH**2}")
        refuse_axes(self.axes_dims_rope, 3, self.attention_head_dim)

    @property
    def token_size(self) -> int:
        """Numbers per token in the output."""
        return self.out_channels or self.in_channels


class TimeEmbedding(nnx.Module):
    """Embeds the timestep and, in a network distilled from a guided one, the guidance scale."""

    def __init__(self, width: int, *, is_guided: bool, rngs: nnx.Rngs, **options):
        """Makes the layers; the options are those of `NumberEmbedding`."""
        self.timestep_embedder, self.guidance_embedder = (
            NumberEmbedding(width, rngs=rngs, **options) if has else None
            for has in (True, is_guided)
        )

    def __call__(self, timesteps: Array, guidance_scale: Array | None, dtype) -> Array:
        """Maps [batch], [batch] and a dtype to [batch, width].

        Raises:
          ValueError: if `guidance_scale` is missing or not taken.
        """
        embedded = self.timestep_embedder(timesteps, dtype)
        if self.guidance_embedder is None:
            if guidance_scale is not None:
                raise ValueError("guidance_scale must be None: this network does not take it")
            return embedded
        if guidance_scale is None:
            raise ValueError("guidance_scale is missing: this network takes it as an input")
        return embedded + self.guidance_embedder(1000 * guidance_scale, dtype)


class _Embedding(TimeEmbedding):
    """Adds the pooled text's embedding."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        super().__init__(config.width, is_guided=config.guidance_embeds, rngs=rngs)
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, config.width, rngs=rngs)

    def __call__(self, timesteps: Array, pooled: Array, guidance_scale: Array | None, dtype):
        return super().__call__(timesteps, guidance_scale, dtype) + self.text_embedder(pooled)


class DoubleBlock(nnx.Module):
    """A block with weights for each kind of token, which is given its modulations."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        feed_forward: Callable[[], nnx.Module],
        *,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.attn = JointAttention(width, num_heads, qk_norm=True, use_bias=use_bias, rngs=rngs)
        self.ff, self.ff_context = feed_forward(), feed_forward()

    def __call__(
        self,
        x: Array,
        context: Array,
        of_image: Sequence[Array],
        of_text: Sequence[Array],
        angles: Array,
    ) -> tuple[Array, Array]:
        """Maps the image's and the text's tokens to the same shapes, as `dit.joint_block`."""
        layers = self.attn, self.ff, self.ff_context
        return joint_block(*layers, x, context, of_image, of_text, angles=angles)


class _Block(DoubleBlock):
    """A double block with modulations of its own."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        width = config.width
        super().__init__(
            width, config.num_attention_heads, lambda: FeedForward(width, rngs=rngs), rngs=rngs
        )
        self.norm1, self.norm1_context = (AdaLayerNorm(width, 6, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array, context: Array, embedding: Array, angles: Array):
        of_image, of_text = self.norm1(embedding), self.norm1_context(embedding)
        return super().__call__(x, context, of_image, of_text, angles)


class _SingleBlock(nnx.Module):
    """Self-attention and feed-forward layers side by side, with a common last layer."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        width, hidden = config.width, MLP_RATIO * config.width
        self.norm = AdaLayerNorm(width, 3, rngs=rngs)
        self.attn = SelfAttention(
            width, config.num_attention_heads, qk_norm=True, out=False, rngs=rngs
        )
        self.proj_mlp = Linear(width, hidden, rngs=rngs)
        self.proj_out = Linear(width + hidden, width, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, angles: Array) -> Array:
        """Maps the text's tokens, followed by the image's, to the same shape."""

        def layers(x: Array) -> Array:
            both = [self.attn(x, angles=angles), gelu_tanh(self.proj_mlp(x))]
            return self.proj_out(jnp.concatenate(both, axis=-1))

        return residual(layers, x, *self.norm(embedding))


class FluxBlocks(nnx.Module):
    """What the transformer and its ControlNets have in common: embeddings and blocks."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the layers; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width = config.width
        self.config, self.remat = config, remat
        self.time_text_embed = _Embedding(config, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, width, rngs=rngs)
        self.x_embedder = Linear(config.in_channels, width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.single_transformer_blocks = nnx.List(
            [_SingleBlock(config, rngs=rngs) for _ in range(config.num_single_layers)]
        )

    def embedded(
        self,
        latents: Array,
        timesteps: Array,
        context: Array,
        pooled: Array,
        guidance_scale: Array | None,
        reference: Array | None = None,
        first: Array | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """Maps the inputs of `FluxTransformer2DModel` to those of the blocks.

        Args:
          latents, timesteps, context, pooled, guidance_scale, reference: as there.
          first: [batch, 1, width], a token to put before the text's.

        Returns:
          the image's and the text's tokens, [batch, tokens, width]; the embedding of time and
          pooled text, [batch, width]; the angles of all tokens, the text's first.

        Raises:
          ValueError: if `guidance_scale` is missing or not taken.
        """
        _, height, width, _ = latents.shape
        embedding = self.time_text_embed(timesteps, pooled, guidance_scale, latents.dtype)
        x = packed(latents, PATCH)
        if reference is not None:
            x = jnp.concatenate([x, packed(reference, PATCH)], axis=1)
        x, context = self.x_embedder(x), self.context_embedder(context)
        if first is not None:
            context = jnp.concatenate([first, context], axis=1)
        # The text's tokens are all at the origin, where nothing is rotated.
        image = grid_positions(height // PATCH, width // PATCH)
        places = [np.zeros((context.shape[1], 3), image.dtype), image]
        if reference is not None:
            places.append(image + np.array([1, 0, 0]))
        positions = np.concatenate(places)
        angles = constant_angles(rotary_angles(positions, self.config.axes_dims_rope, THETA))
        return x, context, embedding, angles


class FluxTransformer2DModel(FluxBlocks):
    """Predicts the velocity of latents, noise minus data, from the timestep and the text."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the network; the arguments are those of `FluxBlocks`."""
        super().__init__(config, rngs=rngs, remat=remat)
        width = config.width
        self.norm_out = AdaLayerNorm(width, 2, rngs=rngs)
        self.proj_out = Linear(width, config.token_size, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        pooled: Array,
        guidance_scale: Array | None = None,
        reference: Array | None = None,
        residuals: tuple[Sequence[Array], Sequence[Array]] | None = None,
    ) -> Array:
        """Evaluates the denoiser once; all but numbers have the weights' dtype.

        Args:
          latents: [batch, h, w, in channels / 4], not packed; h and w are even.
          timesteps: float [batch], 1000 times the flow's sigma: 0 to 1000, 1000 for pure noise.
          context: [batch, tokens, joint attention dim], T5's last hidden states.
          pooled: [batch, pooled projection dim], CLIP's pooled text.
          guidance_scale: float [batch] for networks with `guidance_embeds` (dev), else None.
          reference: the latents of an image that is seen, in the latents' shape, as further tokens
            (arXiv:2506.15742, section 3); None for networks but Kontext.
          residuals: what ControlNets add to the image's tokens after each double block and after
            each single block, [batch, h w / 4, width]; without `reference`.

        Returns:
          [batch, h, w, out channels / 4], noise minus data, in the dtype of the latents; the shape
          of the latents if the config has no `out_channels`.

        Raises:
          ValueError: if `guidance_scale` is missing or not taken.
        """
        _, height, width, _ = latents.shape
        x, context, embedding, angles = self.embedded(
            latents, timesteps, context, pooled, guidance_scale, reference
        )
        tokens, last = context.shape[1], context.shape[1] + height * width // PATCH**2
        for number, block in enumerate(self.transformer_blocks):
            x, context = call(block, x, context, embedding, angles, remat=self.remat)
            if residuals is not None:
                x = x + residuals[0][number]
        x = jnp.concatenate([context, x], axis=1)
        for number, block in enumerate(self.single_transformer_blocks):
            x = call(block, x, embedding, angles, remat=self.remat)
            if residuals is not None:
                x = x + jnp.pad(residuals[1][number], ((0, 0), (tokens, 0), (0, 0)))
        scale, shift = self.norm_out(embedding)
        x = self.proj_out(modulated(x[:, tokens:last], shift, scale))
        return unpacked(x, height, width, PATCH)
