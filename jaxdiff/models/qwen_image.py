"""`QwenImageTransformer2DModel`: the denoiser of Qwen-Image.

Wu et al., 2025, arXiv:2508.02324, section 2.4: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) with joint attention to text and image (Esser et al., 2024, arXiv:2403.03206) and
rotary positions (Su et al., 2021, arXiv:2104.09864) in which the text goes on along the diagonal of
the image.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models import config as config_json
from jaxdiff.models.dit import (
    EPSILON,
    AdaLayerNorm,
    JointAttention,
    fed_forward,
    modulated,
    packed,
    unpacked,
)
from jaxdiff.models.embeddings import EmbeddingMLP, grid_positions, rotary_angles, sinusoids
from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

SINUSOIDS = 256  # of a timestep
THETA = 10000.0  # the base of the rotary frequencies
# Keys that change what is computed; only these values are supported.
FIXED = {"_class_name": "QwenImageTransformer2DModel"}
IGNORED = {"pooled_projection_dim"}  # of an early version: there is no pooled text

# The modulations are a third of all weights.
SHARDING = (
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|to_add_out|net\.2|linear_2)\.kernel$", ROWS),
    (r"(_mod\.1|norm_out\.linear)\.kernel$", COLUMNS),
)


@dataclass(frozen=True)
class QwenImageConfig:
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        if self.in_channels != self.out_channels * self.patch_size**2:
            raise ValueError(
                f"in_channels = {self.in_channels} must be out_channels * patch_size^2"
            )
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(n % 2 for n in axes):
            raise ValueError(
                f"axes_dims_rope = {list(axes)} must be three even numbers that sum to "
                f"attention_head_dim = {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """The width of both kinds of tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, data: dict) -> "QwenImageConfig":
        """Reads a parsed `transformer/config.json`; raises InputError if it is not supported."""
        kept = {key: value for key, value in data.items() if key not in IGNORED}
        return config_json.from_json(cls, "transformer", kept, FIXED)

    def to_json(self) -> dict:
        """Returns the `transformer/config.json` that diffusers reads."""
        return config_json.to_json(self, FIXED)


def positions(tokens: int, height: int, width: int) -> np.ndarray:
    """Returns the positions of a text's tokens, then of an image's patches, on three axes.

    See arXiv:2508.02324, section 2.4 (MSRoPE): the origin is in the middle of the image, and the
    text begins on the diagonal where the longer side of the image ends.

    Args:
      tokens: of the text, with padding.
      height, width: of the image in patches.

    Returns:
      int64 [tokens + height * width, 3]: frame, row and column.
    """
    text = max(height // 2, width // 2) + np.arange(tokens)
    image = grid_positions(height, width) - [0, height - height // 2, width - width // 2]
    return np.concatenate([np.stack([text] * 3, axis=-1), image])


class _TimeEmbedding(nnx.Module):
    """Embeds the timestep, which modulates every block."""

    def __init__(self, config: QwenImageConfig, *, rngs: nnx.Rngs):
        self.timestep_embedder = EmbeddingMLP(SINUSOIDS, config.width, rngs=rngs)

    def __call__(self, timesteps: Array, dtype) -> Array:
        """Maps [batch] to [batch, width] in `dtype`."""
        return self.timestep_embedder(sinusoids(timesteps, SINUSOIDS).astype(dtype))


def _modulation(width: int, rngs: nnx.Rngs) -> nnx.List:
    """Makes the layers from an embedding to shift, scale and gate of two norms."""
    return nnx.List([nnx.silu, nnx.Linear(width, 6 * width, rngs=rngs)])


def _modulations(layers: nnx.List, embedding: Array) -> list[Array]:
    """Maps [batch, width] to six arrays of that shape."""
    for layer in layers:
        embedding = layer(embedding)
    return jnp.split(embedding, 6, axis=-1)


class _Block(nnx.Module):
    """Joint attention and feed-forward, each with a modulated norm, a gate and a residual."""

    def __init__(self, config: QwenImageConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.img_mod, self.txt_mod = _modulation(width, rngs), _modulation(width, rngs)
        self.attn = JointAttention(width, config.num_attention_heads, qk_norm=True, rngs=rngs)
        self.img_mlp, self.txt_mlp = FeedForward(width, rngs=rngs), FeedForward(width, rngs=rngs)

    def __call__(
        self, x: Array, context: Array, embedding: Array, mask: Array, angles: Array
    ) -> tuple[Array, Array]:
        """Maps the image's and the text's tokens to tokens of the same shapes."""
        shift, scale, gate, *of_mlp = _modulations(self.img_mod, embedding)
        text_shift, text_scale, text_gate, *of_text_mlp = _modulations(self.txt_mod, embedding)
        mixed, text_mixed = self.attn(
            modulated(x, shift, scale),
            modulated(context, text_shift, text_scale),
            angles=angles,
            mask=mask,
        )
        x = fed_forward(self.img_mlp, x + gate[:, None] * mixed, *of_mlp)
        context = context + text_gate[:, None] * text_mixed
        return x, fed_forward(self.txt_mlp, context, *of_text_mlp)


class QwenImageTransformer2DModel(nnx.Module):
    """Predicts the velocity of latents, noise minus image, from the timestep and the text."""

    def __init__(self, config: QwenImageConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        self.config, self.remat = config, remat
        self.time_text_embed = _TimeEmbedding(config, rngs=rngs)
        self.txt_norm = nnx.RMSNorm(config.joint_attention_dim, epsilon=EPSILON, rngs=rngs)
        self.img_in = nnx.Linear(config.in_channels, config.width, rngs=rngs)
        self.txt_in = nnx.Linear(config.joint_attention_dim, config.width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm_out = AdaLayerNorm(config.width, 2, rngs=rngs)
        self.proj_out = nnx.Linear(config.width, config.in_channels, rngs=rngs)

    def __call__(self, latents: Array, timesteps: Array, *, context: Array, mask: Array) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, out channels]; their dtype is that of the activations.
          timesteps: [batch], 0 to 1000, not necessarily whole: a thousand times the noise's share
            (sigma).
          context: [batch, tokens, joint attention dim], the text encoder's hidden states.
          mask: bool [batch, tokens], which tokens are seen; the others are padding on the right.

        Returns:
          [batch, h, w, out channels].

        Raises:
          ValueError: for a height or width that is no multiple of `patch_size`.
        """
        config, patch = self.config, self.config.patch_size
        batch, height, width, _ = latents.shape
        if height % patch or width % patch:
            raise ValueError(
                f"latents of {height}x{width}: each side must be a multiple of {patch}"
            )
        where = positions(context.shape[1], height // patch, width // patch)
        # In float32, as the released weights were trained with.
        angles = rotary_angles(where, config.axes_dims_rope, THETA, dtype=np.float32)
        # One constant; the barrier keeps XLA from folding the sines of every block into others.
        angles = jax.lax.optimization_barrier(jnp.asarray(angles))
        x = self.img_in(packed(latents, patch))
        mask = jnp.concatenate([mask, jnp.ones((batch, x.shape[1]), bool)], axis=1)
        context = self.txt_in(self.txt_norm(context))
        embedding = self.time_text_embed(timesteps, latents.dtype)
        for block in self.transformer_blocks:
            x, context = call(block, x, context, embedding, mask, angles, remat=self.remat)
        scale, shift = self.norm_out(embedding)  # in this order
        return unpacked(self.proj_out(modulated(x, shift, scale)), height, width, patch)
