"""`PixArtTransformer2DModel`: the denoiser of PixArt-Alpha and PixArt-Sigma.

A diffusion transformer (Peebles and Xie, 2022, arXiv:2212.09748) with cross-attention to the text,
whose blocks share one modulation and add a table of their own to it: Chen et al., 2023,
arXiv:2310.00426, section 2.3, and Chen et al., 2024, arXiv:2403.04692.
"""

from dataclasses import dataclass

from flax import nnx
from jax import Array

from jaxdiff.models.adaln_single import AdaLayerNormSingle, modulation_table, modulations
from jaxdiff.models.dit import EPSILON, TransformerConfig, modulated, residual, unpacked
from jaxdiff.models.embeddings import EmbeddingMLP, grid_sinusoids
from jaxdiff.models.feed_forward import FeedForward, gelu_tanh
from jaxdiff.models.layers import Attention, conv
from jaxdiff.models.linear import Linear
from jaxdiff.models.remat import call
from jaxdiff.models.sharding import COLUMNS, ROWS

WITH_SIZES = 128  # unless the config says, networks of this sample size are conditioned on sizes
# The published checkpoints have the old name, of a class that had other networks, too.
NAME, OLD_NAME = "PixArtTransformer2DModel", "Transformer2DModel"
# Keys that change what is computed; only these values are supported.
FIXED = {
    "_class_name": NAME,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": EPSILON,
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
class PixArtConfig(TransformerConfig):
    """The fields of `transformer/config.json` that shape the network, with diffusers' defaults.

    Attributes:
      out_channels: twice `in_channels` if the network also predicts the variance, which is dropped.
      interpolation_scale: how many times larger its images are than the smallest PixArt's.
      use_additional_conditions: whether it is conditioned on the image's size.
    """

    fixed = FIXED
    ignored = IGNORED

    @classmethod
    def from_json(cls, data: dict) -> "PixArtConfig":
        """Reads a parsed `config.json`, also one in which the class has its old name."""
        is_old = data.get("_class_name") == OLD_NAME
        return super().from_json({**data, "_class_name": NAME} if is_old else data)

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
    def takes_sizes(self) -> bool:
        """Whether the network is conditioned on the image's size, as in diffusers."""
        if self.use_additional_conditions is None:
            return self.sample_size == WITH_SIZES
        return self.use_additional_conditions


class _PatchEmbed(nnx.Module):
    """Maps latents to tokens, one for each patch, and adds the patch's position."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        self.config, patch = config, config.patch_size
        self.proj = conv(
            config.in_channels, config.width, patch, stride=patch, padding=0, rngs=rngs
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


class _Block(nnx.Module):
    """Self-attention, attention to the text and feed-forward, each with a residual."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        width, heads = config.width, config.num_attention_heads
        self.scale_shift_table = modulation_table(6, width, rngs=rngs)
        self.attn1, self.attn2 = (
            Attention(width, heads, qkv_bias=True, rngs=rngs) for _ in range(2)
        )
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(self, x: Array, shared: Array, context: Array, mask: Array) -> Array:
        """Maps [b, tokens, width], [b, 6, width] and the text, [b, text tokens, width]."""
        of_all = modulations(self.scale_shift_table, shared)
        x = residual(self.attn1, x, *of_all[:3])
        x = x + self.attn2(x, context, mask)
        return residual(self.ff, x, *of_all[3:])


class PixArtTransformer2DModel(nnx.Module):
    """Predicts the noise in latents from the timestep and the text."""

    def __init__(self, config: PixArtConfig, *, remat: bool = False, rngs: nnx.Rngs):
        """Makes the network; `remat` trades time for memory when gradients are taken.

        It keeps only the activations between blocks (Chen et al., 2016, arXiv:1604.06174).
        """
        width, patch = config.width, config.patch_size
        self.config, self.remat = config, remat
        self.pos_embed = _PatchEmbed(config, rngs=rngs)
        self.adaln_single = AdaLayerNormSingle(width, takes_sizes=config.takes_sizes, rngs=rngs)
        self.caption_projection = EmbeddingMLP(
            config.caption_channels, width, activation=gelu_tanh, rngs=rngs
        )
        self.transformer_blocks = nnx.List(
            [_Block(config, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.scale_shift_table = modulation_table(2, width, rngs=rngs)
        self.proj_out = Linear(width, patch**2 * config.out_channels, rngs=rngs)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        *,
        context: Array,
        mask: Array,
        sizes: Array | None = None,
    ) -> Array:
        """Evaluates the denoiser once.

        Args:
          latents: [batch, h, w, in channels]; the patch size divides h and w. Their dtype is that
            of the activations.
          timesteps: [batch], 0 to 999, as in training.
          context: [batch, tokens, caption channels], the encoded text.
          mask: bool [batch, tokens]: which tokens are seen.
          sizes: float32 [batch, 3], the image's height, width and height / width, in pixels, if the
            network is conditioned on them.

        Returns:
          the noise, in the shape and dtype of the latents.
        """
        _, height, width, channels = latents.shape
        embedding, shared = self.adaln_single(timesteps, latents.dtype, sizes)
        context = self.caption_projection(context)
        x = self.pos_embed(latents)
        for block in self.transformer_blocks:
            x = call(block, x, shared, context, mask, remat=self.remat)
        shift, scale = modulations(self.scale_shift_table, embedding[:, None])
        x = self.proj_out(modulated(x, shift, scale))
        x = unpacked(x, height, width, self.config.patch_size, channels_last=True)
        return x[..., :channels]
