"""`SanaTransformer2DModel`: the denoiser of Sana.

Xie et al., 2024, arXiv:2410.10629: a diffusion transformer (Peebles and Xie, 2022,
arXiv:2212.09748) with linear attention (Katharopoulos et al., 2020, arXiv:2006.16236), and with
convolutions in its feed-forward layers, which take the place of embedded positions.
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jaxdiff.models.adaln_single import AdaLayerNormSingle, modulation_table, modulations
from jaxdiff.models.attention import merge_heads, split_heads
from jaxdiff.models.dit import EPSILON, TransformerConfig, modulated, residual
from jaxdiff.models.efficient_vit import GatedConvolutions, attend_linearly, pointwise
from jaxdiff.models.embeddings import EmbeddingMLP
from jaxdiff.models.feed_forward import gelu_tanh
from jaxdiff.models.layers import Attention, conv
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

CAPTION_EPSILON = 1e-5  # of the norm of the text
# Keys that change what is computed; only these values are supported.
FIXED = {
    "_class_name": "SanaTransformer2DModel",
    "norm_eps": EPSILON,
    "patch_size": 1,
    "timestep_scale": 1.0,
}
# Keys without effect unless another key is set, which is rejected.
IGNORED = {"dropout", "guidance_embeds_scale"}

# Columns, then rows. The value and the gate of a feed-forward layer share its kernels, so each
# device must fetch its half of one or the other.
SHARDING = (
    (r"\.(to_[qkv]|linear_1|conv_inverted|conv_depth)\.kernel$", COLUMNS),
    (r"^time_embed\.linear\.kernel$", COLUMNS),
    (r"\.(to_out\.0|linear_2|conv_point)\.kernel$", ROWS),
)


@dataclass(frozen=True)
class SanaConfig(TransformerConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults.

    `sample_size` is the side of the latents that the weights were trained on; any other works.
    """

    fixed = FIXED
    ignored = IGNORED

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


class _LinearAttention(Attention):
    """Self-attention in linear time."""

    def __call__(self, x: Array) -> Array:
        """Maps [batch, tokens, width] to the same shape."""
        query, key, value = (
            split_heads(layer(x), self.num_heads) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](merge_heads(attend_linearly(query, key, value)))


class _Block(nnx.Module):
    """Linear self-attention, attention to the text and Mix-FFN, each with a residual."""

    def __init__(self, config: SanaConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.attn1 = _LinearAttention(
            width, config.num_attention_heads, qkv_bias=config.attention_bias, rngs=rngs
        )
        self.attn2 = Attention(width, config.num_cross_attention_heads, qkv_bias=True, rngs=rngs)
        self.ff = GatedConvolutions(width, int(config.mlp_ratio * width), rngs=rngs)
        self.scale_shift_table = modulation_table(6, width, rngs=rngs)

    def __call__(self, x: Array, shared: Array, context: Array, mask: Array) -> Array:
        """Maps [batch, h, w, width] to the same shape.

        Args:
          x: the features.
          shared: [batch, 6, width], the modulations from the timestep.
          context: [batch, tokens, width], the text.
          mask: bool [batch, tokens]: which of them are seen.
        """
        grid = x.shape

        def feed_forward(tokens: Array) -> Array:
            return self.ff(tokens.reshape(grid)).reshape(tokens.shape)

        of_all = modulations(self.scale_shift_table, shared)
        x = residual(self.attn1, x.reshape(grid[0], -1, grid[-1]), *of_all[:3])
        x = x + self.attn2(x, context, mask)
        return residual(feed_forward, x, *of_all[3:]).reshape(grid)


class SanaTransformer2DModel(nnx.Module):
    """Predicts the velocity of latents from the timestep and the text."""

    def __init__(self, config: SanaConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width = config.width
        self.config, self.remat = config, remat
        self.patch_embed = nnx.Dict(proj=conv(config.in_channels, width, 1, rngs=rngs))
        self.time_embed = AdaLayerNormSingle(width, rngs=rngs)
        self.caption_projection = EmbeddingMLP(
            config.caption_channels, width, activation=gelu_tanh, rngs=rngs
        )
        self.caption_norm = nnx.RMSNorm(width, epsilon=CAPTION_EPSILON, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.scale_shift_table = modulation_table(2, width, rngs=rngs)
        self.proj_out = Linear(width, config.out_channels, rngs=rngs)

    def __call__(self, latents: Array, timesteps: Array, *, context: Array, mask: Array) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, in channels], of any height and width. Their dtype is that of the
            activations.
          timesteps: [batch], 1000 times the noise level: from 0, an image, to 1000, noise.
          context: [batch, tokens, caption channels], the text encoder's hidden states.
          mask: bool [batch, tokens]: which of them are seen; at least one.

        Returns:
          the velocity, which is the noise minus the image, [batch, h, w, out channels] in the dtype
          of the latents.
        """
        embedding, shared = self.time_embed(timesteps, latents.dtype)
        context = self.caption_norm(self.caption_projection(context))
        x = pointwise(self.patch_embed.proj, latents)
        for block in self.transformer_blocks:
            x = call(block, x, shared, context, mask, remat=self.remat)
        shift, scale = modulations(self.scale_shift_table, embedding[:, None])
        tokens = modulated(x.reshape(len(x), -1, x.shape[-1]), shift, scale)
        return self.proj_out(tokens).reshape(*latents.shape[:-1], -1)
