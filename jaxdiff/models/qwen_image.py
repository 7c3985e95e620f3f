"""`QwenImageTransformer2DModel`: the denoiser of Qwen-Image.

Wu et al., 2025, arXiv:2508.02324, section 2.4: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) with joint attention to text and image (Esser et al., 2024, arXiv:2403.03206) and
rotary positions (Su et al., 2021, arXiv:2104.09864) in which the text goes on along the diagonal of
the image.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.dit import (
    EPSILON,
    AdaLayerNorm,
    JointAttention,
    TransformerConfig,
    joint_block,
    modulated,
    packed,
    refuse_axes,
    unpacked,
)
from jaxdiff.models.embeddings import (
    NumberEmbedding,
    constant_angles,
    grid_positions,
    rotary_angles,
)
from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.layers import Chain
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

THETA = 10_000  # the base of the rotary frequencies
# Keys that change what is computed; only these values are supported.
FIXED = {"_class_name": "QwenImageTransformer2DModel"}
IGNORED = {"pooled_projection_dim"}  # left from an early version: there is no pooled text

# The modulations are a third of all weights.
SHARDING = (
    (r"\.(to_[qkv]|add_[qkv]_proj|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|to_add_out|net\.2|linear_2)\.kernel$", ROWS),
    (r"(_mod\.1|norm_out\.linear)\.kernel$", COLUMNS),
)


@dataclass(frozen=True)
class QwenImageConfig(TransformerConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults."""

    fixed = FIXED
    ignored = IGNORED

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
        refuse_axes(self.axes_dims_rope, 3, self.attention_head_dim)


def positions(tokens: int, height: int, width: int, images: int = 1) -> np.ndarray:
    """Returns the positions of a text's tokens, then of the images' patches, on three axes.

    See arXiv:2508.02324, section 2.4 (MSRoPE): the origin is in the middle of the image, and the
    text begins on the diagonal where the longer side of the image ends.

    Args:
      tokens: of the text, with padding.
      height, width: of each image in patches.
      images: how many there are; their number is the frame.

    Returns:
      int64 [tokens + images * height * width, 3]: frame, row and column.
    """
    text = max(height // 2, width // 2) + np.arange(tokens)
    image = grid_positions(height, width) - [0, height - height // 2, width - width // 2]
    frames = [image + np.array([frame, 0, 0]) for frame in range(images)]
    return np.concatenate([np.stack([text] * 3, axis=-1), *frames])


class _Block(nnx.Module):
    """Joint attention and feed-forward, each with a modulated norm, a gate and a residual."""

    def __init__(self, config: QwenImageConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.img_mod, self.txt_mod = (
            Chain([nnx.silu, Linear(width, 6 * width, rngs=rngs)]) for _ in range(2)
        )
        self.attn = JointAttention(width, config.num_attention_heads, qk_norm=True, rngs=rngs)
        self.img_mlp, self.txt_mlp = FeedForward(width, rngs=rngs), FeedForward(width, rngs=rngs)

    def __call__(
        self, x: Array, context: Array, embedding: Array, mask: Array, angles: Array
    ) -> tuple[Array, Array]:
        """Maps the image's and the text's tokens to the same shapes, as `dit.joint_block`."""
        of_image, of_text = (
            jnp.split(layers(embedding), 6, axis=-1) for layers in (self.img_mod, self.txt_mod)
        )
        layers = self.attn, self.img_mlp, self.txt_mlp
        return joint_block(*layers, x, context, of_image, of_text, angles=angles, mask=mask)


class QwenImageTransformer2DModel(nnx.Module):
    """Predicts the velocity of latents, noise minus image, from the timestep and the text."""

    def __init__(self, config: QwenImageConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        self.config, self.remat = config, remat
        self.time_text_embed = nnx.Dict(timestep_embedder=NumberEmbedding(config.width, rngs=rngs))
        self.txt_norm = nnx.RMSNorm(config.joint_attention_dim, epsilon=EPSILON, rngs=rngs)
        self.img_in = Linear(config.in_channels, config.width, rngs=rngs)
        self.txt_in = Linear(config.joint_attention_dim, config.width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm_out = AdaLayerNorm(config.width, 2, rngs=rngs)
        self.proj_out = Linear(config.width, config.in_channels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        mask: Array,
        reference: Array | None = None,
    ) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, out channels]; their dtype is that of the activations.
          timesteps: [batch], 0 to 1000, not necessarily whole: a thousand times the noise's share
            (sigma).
          context: [batch, tokens, joint attention dim], the text encoder's hidden states.
          mask: bool [batch, tokens], which tokens are seen; the others are padding on the right.
          reference: the latents of an image that is seen, in the latents' shape, as further tokens
            of the next frame (arXiv:2508.02324, section 2.4); None for networks but the editing
            ones.

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
        images = 1 if reference is None else 2
        where = positions(context.shape[1], height // patch, width // patch, images)
        # In float32, as when the weights were trained.
        angles = constant_angles(
            rotary_angles(where, config.axes_dims_rope, THETA, dtype=np.float32)
        )
        x = packed(latents, patch)
        count = x.shape[1]
        if reference is not None:
            x = jnp.concatenate([x, packed(reference, patch)], axis=1)
        x = self.img_in(x)
        mask = jnp.concatenate([mask, jnp.ones((batch, x.shape[1]), bool)], axis=1)
        context = self.txt_in(self.txt_norm(context))
        embedding = self.time_text_embed.timestep_embedder(timesteps, latents.dtype)
        for block in self.transformer_blocks:
            x, context = call(block, x, context, embedding, mask, angles, remat=self.remat)
        scale, shift = self.norm_out(embedding)  # in this order
        x = modulated(x[:, :count], shift, scale)
        return unpacked(self.proj_out(x), height, width, patch)
