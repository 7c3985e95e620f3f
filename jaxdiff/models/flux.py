"""`FluxTransformer2DModel`: the denoiser of FLUX.1 dev and schnell.

A rectified flow transformer (Esser et al., 2024, arXiv:2403.03206) without a paper of its own; see
Black Forest Labs' reference code and "FLUX.1 Kontext", arXiv:2506.15742, section 2. Double blocks
have weights for the text and weights for the image, and join them only in attention. Single blocks
process both alike, with attention and feed-forward layers side by side (Dehghani et al., 2023,
arXiv:2302.05442, section 2). Positions are rotary embeddings (Su et al., 2021, arXiv:2104.09864);
the guidance scale of dev is one more input (Meng et al., 2023, arXiv:2210.03142).
"""

from collections.abc import Callable
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
    packed,
    unpacked,
)
from jaxdiff.models.embeddings import EmbeddingMLP, grid_positions, rotary_angles, sinusoids
from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

PATCH = 2  # latents per token along each side
SINUSOIDS = 256  # of the timestep and of the guidance scale
MLP_RATIO = 4
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


def refuse_axes(axes_dims_rope: tuple[int, ...], count: int, head_width: int) -> None:
    """Raises ValueError unless `count` even shares of a head's rotary embedding fill its width."""
    if len(axes_dims_rope) != count or any(width % 2 for width in axes_dims_rope):
        raise ValueError(f"axes_dims_rope = {list(axes_dims_rope)} must be {count} even numbers")
    if sum(axes_dims_rope) != head_width:
        raise ValueError(
            f"axes_dims_rope = {list(axes_dims_rope)} must add up to attention_head_dim = "
            f"{head_width}"
        )


@dataclass(frozen=True)
class FluxConfig:
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

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
        for name, channels in (
            ("in_channels", self.in_channels),
            ("out_channels", self.token_size),
        ):
            if channels % PATCH**2:
                raise ValueError(f"{name} = {channels} is not a multiple of {PATCH**2}")
        refuse_axes(self.axes_dims_rope, 3, self.attention_head_dim)

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_size(self) -> int:
        """Numbers per token in the output."""
        return self.out_channels or self.in_channels

    @classmethod
    def from_json(cls, data: dict) -> "FluxConfig":
        """Reads a parsed `transformer/config.json`; raises InputError if it is not supported."""
        return config_json.from_json(cls, "transformer", data, FIXED)

    def to_json(self) -> dict:
        """Returns the `transformer/config.json` that diffusers reads."""
        return config_json.to_json(self, FIXED)


class TimeEmbedding(nnx.Module):
    """Embeds the timestep and, in a network distilled from a guided one, the guidance scale."""

    def __init__(self, in_width: int, guided: bool, mlp: Callable[[], nnx.Module]):
        """Makes the layers; `mlp` makes one that maps sinusoids of `in_width` to an embedding."""
        self.in_width = in_width
        self.timestep_embedder = mlp()
        self.guidance_embedder = mlp() if guided else None

    def __call__(self, timesteps: Array, guidance_scale: Array | None, dtype) -> Array:
        """Maps [batch], [batch] and a dtype to [batch, width].

        Raises:
          ValueError: unless `guidance_scale` is None exactly for networks that do not take it.
        """
        if self.guidance_embedder is None:
            if guidance_scale is not None:
                raise ValueError("guidance_scale must be None: this network does not take it")
            return self._embedded(self.timestep_embedder, timesteps, dtype)
        if guidance_scale is None:
            raise ValueError("guidance_scale is missing: this network takes it as an input")
        return self._embedded(self.timestep_embedder, timesteps, dtype) + self._embedded(
            self.guidance_embedder, 1000 * guidance_scale, dtype
        )

    def _embedded(self, mlp: nnx.Module, numbers: Array, dtype) -> Array:
        return mlp(sinusoids(numbers, self.in_width).astype(dtype))


class _Embedding(TimeEmbedding):
    """Adds the pooled text's embedding."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        def mlp(in_width: int = SINUSOIDS) -> EmbeddingMLP:
            return EmbeddingMLP(in_width, config.width, rngs=rngs)

        super().__init__(SINUSOIDS, config.guidance_embeds, mlp)
        self.text_embedder = mlp(config.pooled_projection_dim)

    def __call__(self, timesteps: Array, pooled: Array, guidance_scale: Array | None, dtype):
        return super().__call__(timesteps, guidance_scale, dtype) + self.text_embedder(pooled)


class DoubleBlock(nnx.Module):
    """A block with weights for each kind of token: arXiv:2403.03206, figure 2b."""

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
        self, x: Array, context: Array, of_image, of_text, angles: Array
    ) -> tuple[Array, Array]:
        """Maps the tokens of an image and of a text to the same shapes.

        Args:
          x: [batch, image tokens, width].
          context: [batch, text tokens, width].
          of_image, of_text: six modulations each, [batch, width]: shift, scale and gate of
            attention, then of the feed-forward layers.
          angles: float32 [text and image tokens, head width / 2].
        """
        shift, scale, gate, *of_image = of_image
        text_shift, text_scale, text_gate, *of_text = of_text
        mixed, text_mixed = self.attn(
            modulated(x, shift, scale), modulated(context, text_shift, text_scale), angles=angles
        )
        x = x + gate[:, None] * mixed
        context = context + text_gate[:, None] * text_mixed
        x = fed_forward(self.ff, x, *of_image)
        return x, fed_forward(self.ff_context, context, *of_text)


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
    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        width, hidden = config.width, MLP_RATIO * config.width
        self.norm = AdaLayerNorm(width, 3, rngs=rngs)
        self.attn = SelfAttention(
            width, config.num_attention_heads, qk_norm=True, out=False, rngs=rngs
        )
        self.proj_mlp = nnx.Linear(width, hidden, rngs=rngs)
        self.proj_out = nnx.Linear(width + hidden, width, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, angles: Array) -> Array:
        """Maps the text's tokens, followed by the image's, to the same shape."""
        shift, scale, gate = self.norm(embedding)
        y = modulated(x, shift, scale)
        both = [self.attn(y, angles=angles), jax.nn.gelu(self.proj_mlp(y), approximate=True)]
        return x + gate[:, None] * self.proj_out(jnp.concatenate(both, axis=-1))


def constant_angles(positions: np.ndarray, widths: tuple[int, ...], theta: float) -> Array:
    """Returns `rotary_angles` as one float32 array, for a traced function.

    Whole turns are taken off in float64, and float32 is precise enough for the rest. NumPy's angles
    would put their cosines and sines into the program again for each block: 5 MB for an image of
    1024 pixels. The barrier keeps XLA from doing the same when it folds constants.
    """
    angles = rotary_angles(positions, widths, theta) % (2 * np.pi)
    return jax.lax.optimization_barrier(jnp.asarray(angles, jnp.float32))


class FluxTransformer2DModel(nnx.Module):
    """Predicts the velocity of latents, noise minus data, from the timestep and the text."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, remat: bool = False):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width = config.width
        self.config, self.remat = config, remat
        self.time_text_embed = _Embedding(config, rngs=rngs)
        self.context_embedder = nnx.Linear(config.joint_attention_dim, width, rngs=rngs)
        self.x_embedder = nnx.Linear(config.in_channels, width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.single_transformer_blocks = nnx.List(
            [_SingleBlock(config, rngs=rngs) for _ in range(config.num_single_layers)]
        )
        self.norm_out = AdaLayerNorm(width, 2, rngs=rngs)
        self.proj_out = nnx.Linear(width, config.token_size, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        pooled: Array,
        guidance_scale: Array | None = None,
    ) -> Array:
        """Evaluates the denoiser once; latents, context and pooled have the weights' dtype.

        Args:
          latents: [batch, h, w, in channels / 4], not packed; h and w are even.
          timesteps: float [batch], 1000 times the flow's sigma: 0 to 1000, 1000 for pure noise.
          context: [batch, tokens, joint attention dim], T5's last hidden states.
          pooled: [batch, pooled projection dim], CLIP's pooled text.
          guidance_scale: float [batch] for networks with `guidance_embeds` (dev), else None.

        Returns:
          [batch, h, w, out channels / 4], noise minus data, in the dtype of the latents; the shape
          of the latents if the config has no `out_channels`.

        Raises:
          ValueError: if `guidance_scale` is missing or not taken.
        """
        config, (_, height, width, _) = self.config, latents.shape
        embedding = self.time_text_embed(timesteps, pooled, guidance_scale, latents.dtype)
        x, context = self.x_embedder(packed(latents, PATCH)), self.context_embedder(context)
        tokens = context.shape[1]
        # All of the text is at the origin; it is not rotated.
        image = grid_positions(height // PATCH, width // PATCH)
        positions = np.concatenate([np.zeros((tokens, 3), image.dtype), image])
        angles = constant_angles(positions, config.axes_dims_rope, THETA)
        for block in self.transformer_blocks:
            x, context = call(block, x, context, embedding, angles, remat=self.remat)
        x = jnp.concatenate([context, x], axis=1)
        for block in self.single_transformer_blocks:
            x = call(block, x, embedding, angles, remat=self.remat)
        scale, shift = self.norm_out(embedding)
        x = self.proj_out(modulated(x[:, tokens:], shift, scale))
        return unpacked(x, height, width, PATCH)
