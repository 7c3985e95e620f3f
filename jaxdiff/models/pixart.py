"""`PixArtTransformer2DModel`: the denoiser of PixArt-Alpha and PixArt-Sigma.

A diffusion transformer (Peebles and Xie, 2022, arXiv:2212.09748) with cross-attention to the text,
whose blocks share one modulation and add a table of their own to it: Chen et al., 2023,
arXiv:2310.00426, section 2.3, and Chen et al., 2024, arXiv:2403.04692.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models import config as config_json
from jaxdiff.models.dit import fed_forward, modulated, unpacked
from jaxdiff.models.embeddings import EmbeddingMLP, grid_sinusoids, sinusoids
from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.layers import Attention
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

SINUSOIDS = 256  # of timesteps and of sizes
WITH_SIZES = 128  # the sample size of networks that are conditioned on it, if the config is silent
FIXED = {
    "_class_name": "PixArtTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
}
# Keys without effect; attention is always computed with a float32 softmax.
IGNORED = {"caption_projection", "dropout", "norm_num_groups", "upcast_attention"}

SHARDING = (
    (r"\.(to_[qkv]|net\.0\.proj|linear_1)\.kernel$", COLUMNS),
    (r"\.(to_out\.0|net\.2|linear_2)\.kernel$", ROWS),
    (r"^adaln_single\.linear\.kernel$", COLUMNS),
)


@dataclass(frozen=True)
class PixArtConfig:
    """The fields of `transformer/config.json` that shape the network; the defaults are diffusers'.

    Attributes:
      out_channels: twice `in_channels` if the network also predicts the variance, which is dropped.
      interpolation_scale: how much larger than the smallest PixArt's its images are.
      use_additional_conditions: whether it is conditioned on the image's size.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    sample_size: int = 128
    patch_size: int = 2
    interpolation_scale: int | float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int = 4096

    def __post_init__(self):
        if self.cross_attention_dim != self.width:
            raise ValueError(f"cross_attention_dim must be {self.width}, the blocks' width")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError("out_channels must be once or twice in_channels")
        if self.takes_sizes and self.width % 3:
            raise ValueError("use_additional_conditions needs a width that 3 divides")
        if self.width % 4:
            raise ValueError(f"the width {self.width} must be a multiple of 4")

    @property
    def width(self) -> int:
        """The number of numbers for each token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def takes_sizes(self) -> bool:
        """Whether the network is conditioned on the image's size, as in diffusers."""
        if self.use_additional_conditions is None:
            return self.sample_size == WITH_SIZES
        return self.use_additional_conditions

    @classmethod
    def from_json(cls, data: dict) -> "PixArtConfig":
        """Reads a parsed `transformer/config.json`; raises InputError if it is not supported."""
        kept = {key: value for key, value in data.items() if key not in IGNORED}
        return config_json.from_json(cls, "transformer", kept, FIXED)

    def to_json(self) -> dict:
        """Returns the `transformer/config.json` that diffusers reads."""
        return config_json.to_json(self, FIXED)


class _PatchEmbed(nnx.Module):
    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        self.config, patch = config, config.patch_size
        self.proj = nnx.Conv(
            config.in_channels,
            config.width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            rngs=rngs,
        )

    def __call__(self, latents: Array) -> Array:
        config, patches = self.config, self.proj(latents)  # [b, rows, columns, width]
        batch, rows, columns, width = patches.shape
        places = grid_sinusoids(
            rows,
            columns,
            width,
            base=config.sample_size // config.patch_size,
            scale=config.interpolation_scale or max(config.sample_size // 64, 1),
        )
        return patches.reshape(batch, -1, width) + places.astype(patches.dtype)


class _Embeddings(nnx.Module):
    """Embeds timesteps and sizes."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        self.timestep_embedder = EmbeddingMLP(SINUSOIDS, config.width, rngs=rngs)
        third, takes = config.width // 3, config.takes_sizes
        self.resolution_embedder, self.aspect_ratio_embedder = (
            EmbeddingMLP(SINUSOIDS, third, rngs=rngs) if takes else None for _ in range(2)
        )

    def __call__(self, timesteps: Array, sizes: Array | None, dtype) -> Array:
        embedded = self.timestep_embedder(sinusoids(timesteps, SINUSOIDS).astype(dtype))
        if self.resolution_embedder is None:
            return embedded
        waves = sinusoids(sizes, SINUSOIDS).astype(dtype)  # [b, 3, sinusoids]
        sides = self.resolution_embedder(waves[:, :2]).reshape(len(sizes), -1)
        return embedded + jnp.concatenate([sides, self.aspect_ratio_embedder(waves[:, 2])], axis=-1)


class _AdaLayerNormSingle(nnx.Module):
    """The modulation that all blocks share (arXiv:2310.00426, adaLN-single)."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        self.emb = _Embeddings(config, rngs=rngs)
        self.linear = nnx.Linear(config.width, 6 * config.width, rngs=rngs)

    def __call__(self, timesteps: Array, sizes: Array | None, dtype) -> tuple[Array, Array]:
        """Returns the modulation, [batch, 6, width], and the embedding, [batch, width]."""
        embedded = self.emb(timesteps, sizes, dtype)
        shared = self.linear(nnx.silu(embedded))
        return shared.reshape(len(shared), 6, -1), embedded


class _Block(nnx.Module):
    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        width, heads = config.width, config.num_attention_heads
        draw = nnx.initializers.normal(width**-0.5)
        self.scale_shift_table = nnx.Param(draw(rngs.params(), (6, width)))
        self.attn1, self.attn2 = (
            Attention(width, heads, qkv_bias=True, rngs=rngs) for _ in range(2)
        )
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(self, x: Array, shared: Array, context: Array, mask: Array) -> Array:
        """Maps [b, tokens, width], [b, 6, width] and the text, [b, text tokens, width]."""
        modulation = (self.scale_shift_table[...] + shared).swapaxes(0, 1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
        x = x + gate[:, None] * self.attn1(modulated(x, shift, scale))
        x = x + self.attn2(x, context, mask)
        return fed_forward(self.ff, x, ff_shift, ff_scale, ff_gate)


class PixArtTransformer2DModel(nnx.Module):
    """Predicts the noise in latents from a timestep and a text."""

    def __init__(self, config: PixArtConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the layers.

        Args:
          config: the network's config.
          remat: whether the gradient recomputes each block's activations instead of storing them.
          rngs: draws the weights.
        """
        width, patch = config.width, config.patch_size
        self.config, self.remat = config, remat
        self.pos_embed = _PatchEmbed(config, rngs=rngs)
        self.adaln_single = _AdaLayerNormSingle(config, rngs=rngs)
        self.caption_projection = _CaptionProjection(config.caption_channels, width, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        draw = nnx.initializers.normal(width**-0.5)
        self.scale_shift_table = nnx.Param(draw(rngs.params(), (2, width)))
        self.proj_out = nnx.Linear(width, patch**2 * config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        mask: Array,
        sizes: Array | None = None,
    ) -> Array:
        """Predicts the noise.

        Args:
          latents: [batch, h, w, in channels], of sides that the patch size divides.
          timesteps: [batch], of the training's.
          context: [batch, tokens, caption channels], the encoded text.
          mask: bool [batch, tokens]: which tokens are seen.
          sizes: float32 [batch, 3], the image's height, width and height / width, in pixels, if the
            network is conditioned on them.

        Returns:
          [batch, h, w, in channels].
        """
        _, height, width, channels = latents.shape
        shared, embedded = self.adaln_single(timesteps, sizes, latents.dtype)
        context = self.caption_projection(context)
        x = self.pos_embed(latents)
        for block in self.transformer_blocks:
            x = call(block, x, shared, context, mask, remat=self.remat)
        shift, scale = (self.scale_shift_table[...] + embedded[:, None]).swapaxes(0, 1)
        x = self.proj_out(modulated(x, shift, scale))
        x = unpacked(x, height, width, self.config.patch_size, channels_last=True)
        return x[..., :channels]


class _CaptionProjection(nnx.Module):
    def __init__(self, in_width: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(in_width, width, rngs=rngs)
        self.linear_2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, context: Array) -> Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(context), approximate=True))
