"""`SanaTransformer2DModel`: the denoiser of Sana.

Xie et al., 2024, arXiv:2410.10629: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) with linear attention (Katharopoulos et al., 2020, arXiv:2006.16236), and with
convolutions in its feed-forward layers, which take the place of embedded positions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models import config as config_json
from jaxdiff.models.dit import EPSILON, merge_heads, modulated, split_heads
from jaxdiff.models.embeddings import EmbeddingMLP, sinusoids
from jaxdiff.models.layers import Attention, conv
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

SINUSOIDS = 256  # the width of the timestep's sinusoids
CAPTION_EPSILON = 1e-5  # of the norm of the text
SMALLEST = 1e-15  # added to what linear attention divides by
# Keys that change what is computed; only these values are supported.
FIXED = {
    "_class_name": "SanaTransformer2DModel",
    "norm_eps": EPSILON,
    "patch_size": 1,
    "timestep_scale": 1.0,
}
# Keys without effect unless another key is set, which is then rejected.
IGNORED = {"dropout", "guidance_embeds_scale"}

# Columns, then rows. The value and the gate of a feed-forward layer share its kernels, so each
# device must fetch its half of one or the other.
SHARDING = (
    (r"\.(to_[qkv]|linear_1|conv_inverted|conv_depth)\.kernel$", COLUMNS),
    (r"^time_embed\.linear\.kernel$", COLUMNS),
    (r"\.(to_out\.0|linear_2|conv_point)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class SanaConfig:
    """The fields of `transformer/config.json` that shape the network; the defaults are diffusers'.

    `sample_size` is the side of the latents that the weights were trained on; any other works.
    """

    in_channels: int = 32
    out_channels: int = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32

    def __post_init__(self):
        if self.num_cross_attention_heads * self.cross_attention_head_dim != self.width:
            raise ValueError("the heads of both attentions must have the same width in all")
        if self.cross_attention_dim != self.width:
            raise ValueError(f"cross_attention_dim must be the width of the heads, {self.width}")

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, data: dict) -> "SanaConfig":
        """Reads a parsed `transformer/config.json`; raises InputError if it is not supported."""
        kept = {key: value for key, value in data.items() if key not in IGNORED}
        return config_json.from_json(cls, "transformer", kept, FIXED)

    def to_json(self) -> dict:
        """Returns the `transformer/config.json` that diffusers reads."""
        return config_json.to_json(self, FIXED)


class _LinearAttention(Attention):
    """Self-attention in linear time: arXiv:2006.16236, equation 5, with ReLU as feature map."""

    def __call__(self, x: Array) -> Array:
        query, key, value = (
            split_heads(layer(x), self.num_heads).astype(jnp.float32)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        query, key = nnx.relu(query), nnx.relu(key)
        # By default, TPUs would round to bfloat16.
        sums = jnp.einsum("bnhd,bnhe->bhde", key, value, precision="highest")
        mixed = jnp.einsum("bnhd,bhde->bnhe", query, sums, precision="highest")
        weights = jnp.einsum("bnhd,bhd->bnh", query, key.sum(axis=1), precision="highest")
        mixed = mixed / (weights + SMALLEST)[..., None]
        return self.to_out[0](merge_heads(mixed).astype(x.dtype))


class _MixFeedForward(nnx.Module):
    """Sana's Mix-FFN: a gated feed-forward layer that also mixes neighbours by a convolution."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.conv_inverted = conv(width, 2 * hidden, 1, rngs=rngs)
        self.conv_depth = nnx.Conv(
            2 * hidden, 2 * hidden, (3, 3), padding=1, feature_group_count=2 * hidden, rngs=rngs
        )
        self.conv_point = nnx.Conv(hidden, width, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, width] to the same shape."""
        x = _depthwise(self.conv_depth, nnx.silu(_pointwise(self.conv_inverted, x)))
        value, gate = jnp.split(x, 2, axis=-1)
        return _pointwise(self.conv_point, value * nnx.silu(gate))


def _pointwise(layer: nnx.Conv, x: Array) -> Array:
    """Applies a 1x1 convolution as a matrix product: on a CPU up to four times as fast."""
    x = x @ layer.kernel[...][0, 0]
    return x if layer.bias is None else x + layer.bias[...]


def _depthwise(layer: nnx.Conv, x: Array) -> Array:
    """Applies a 3x3 depthwise convolution: on a CPU five times as fast as XLA's."""
    _, height, width, _ = x.shape
    kernel = layer.kernel[...].astype(jnp.float32)[:, :, 0]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = layer.bias[...].astype(jnp.float32)
    for i, j in np.ndindex(3, 3):
        total = total + padded[:, i : i + height, j : j + width] * kernel[i, j]
    return total.astype(x.dtype)


class _Block(nnx.Module):
    """Linear self-attention, attention to the text and Mix-FFN, each with a residual."""

    def __init__(self, config: SanaConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.attn1 = _LinearAttention(
            width, config.num_attention_heads, qkv_bias=config.attention_bias, rngs=rngs
        )
        self.attn2 = Attention(width, config.num_cross_attention_heads, qkv_bias=True, rngs=rngs)
        self.ff = _MixFeedForward(width, int(config.mlp_ratio * width), rngs=rngs)
        self.scale_shift_table = _table(6, width, rngs)

    def __call__(self, x: Array, modulations: Array, context: Array, mask: Array) -> Array:
        """Maps [batch, h, w, width] to the same shape.

        Args:
          x: the features.
          modulations: [batch, 6, width], from the timestep.
          context: [batch, tokens, width], the text.
          mask: bool [batch, tokens]: which of them are seen.
        """
        grid = x.shape
        x = x.reshape(grid[0], -1, grid[-1])  # [b, h w, width]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = jnp.unstack(
            self.scale_shift_table[...] + modulations, axis=1
        )
        x = x + gate[:, None] * self.attn1(modulated(x, shift, scale))
        x = x + self.attn2(x, context, mask)
        mixed = self.ff(modulated(x, ff_shift, ff_scale).reshape(grid))
        return x.reshape(grid) + ff_gate[:, None, None] * mixed


def _table(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Draws modulations that are learned beside those from the timestep."""
    return nnx.Param(jax.random.normal(rngs.params(), (rows, width)) / width**0.5)


class _TimeEmbedding(nnx.Module):
    """Embeds the timestep for all blocks: Chen et al., 2023, arXiv:2310.00426, adaLN-single."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.emb = nnx.Dict(timestep_embedder=EmbeddingMLP(SINUSOIDS, width, rngs=rngs))
        self.linear = nnx.Linear(width, 6 * width, rngs=rngs)

    def __call__(self, timesteps: Array, dtype) -> tuple[Array, Array]:
        """Maps [batch] to an embedding, [batch, width], and its modulations, [batch, 6, width]."""
        embedding = self.emb.timestep_embedder(sinusoids(timesteps, SINUSOIDS).astype(dtype))
        modulations = self.linear(nnx.silu(embedding))
        return embedding, modulations.reshape(len(embedding), 6, -1)


class _TextProjection(nnx.Module):
    def __init__(self, in_width: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(in_width, width, rngs=rngs)
        self.linear_2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class SanaTransformer2DModel(nnx.Module):
    """Predicts the velocity of latents from the timestep and the text."""

    def __init__(self, config: SanaConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width = config.width
        self.config = config
        self.remat = remat
        self.patch_embed = nnx.Dict(proj=conv(config.in_channels, width, 1, rngs=rngs))
        self.time_embed = _TimeEmbedding(width, rngs=rngs)
        self.caption_projection = _TextProjection(config.caption_channels, width, rngs=rngs)
        self.caption_norm = nnx.RMSNorm(width, epsilon=CAPTION_EPSILON, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.scale_shift_table = _table(2, width, rngs)
        self.proj_out = nnx.Linear(width, config.out_channels, rngs=rngs)

    def __call__(self, latents: Array, timesteps: Array, *, context: Array, mask: Array) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, in channels], any height and width.
          timesteps: [batch], 1000 times the noise level: from 0, an image, to 1000, noise.
          context: [batch, tokens, caption channels], the text encoder's hidden states.
          mask: bool [batch, tokens]: which of them are seen; at least one.

        Returns:
          the velocity, which is the noise minus the image, [batch, h, w, out channels] in the dtype
          of the latents.
        """
        embedding, modulations = self.time_embed(timesteps, latents.dtype)
        context = self.caption_norm(self.caption_projection(context))
        x = _pointwise(self.patch_embed.proj, latents)
        for block in self.transformer_blocks:
            x = call(block, x, modulations, context, mask, remat=self.remat)
        shift, scale = jnp.unstack(self.scale_shift_table[...] + embedding[:, None], axis=1)
        tokens = modulated(x.reshape(len(x), -1, x.shape[-1]), shift, scale)
        return self.proj_out(tokens).reshape(*latents.shape[:-1], -1)
