"""`Transformer2DModel`: attention of a feature map to itself and to the text.

Rombach et al., 2022, arXiv:2112.10752, section 3.3 and appendix E.2.1.
"""

from collections.abc import Sequence
from itertools import repeat

from flax import nnx
from jax import Array

from jaxdiff.models.feed_forward import FeedForward
from jaxdiff.models.layers import Attention, ImagePrompt, conv, group_norm
from jaxdiff.models.linear import Linear


class BasicTransformerBlock(nnx.Module):
    """Self-attention, attention to the text and feed-forward, each with pre-norm and residual.

    With `text_only`, the first attention is to the text, too.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        context_width: int,
        *,
        text_only: bool = False,
        rngs: nnx.Rngs,
    ):
        self.text_only = text_only
        seen = context_width if text_only else None
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(width, num_heads, context_width=seen, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(width, num_heads, context_width=context_width, rngs=rngs)
        self.norm3 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.ff = FeedForward(width, gated=True, rngs=rngs)

    def __call__(self, x: Array, context: Array, prompts: Sequence[ImagePrompt] = ()) -> Array:
        """Maps [batch, h w, width] and [batch, tokens, context width] to x's shape.

        The attention to the text also attends to the image prompts.
        """
        x = x + self.attn1(self.norm1(x), context if self.text_only else None)
        x = x + self.attn2(self.norm2(x), context, prompts=prompts)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the positions of a feature map, with a shortcut around them."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        context_width: int,
        *,
        groups: int,
        linear_projection: bool,
        rngs: nnx.Rngs,
    ):
        def projection():
            if linear_projection:
                return Linear(channels, channels, rngs=rngs)
            return conv(channels, channels, 1, rngs=rngs)

        self.norm = group_norm(channels, groups, 1e-6, rngs=rngs)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(channels, num_heads, context_width, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.proj_out = projection()

    def __call__(
        self, x: Array, context: Array, prompts: Sequence[Sequence[ImagePrompt]] | None = None
    ) -> Array:
        """Maps [batch, h, w, channels] and [batch, tokens, context width] to x's shape.

        Each block has image prompts of its own; None for none.
        """
        hidden = self.proj_in(self.norm(x))
        tokens = hidden.reshape(x.shape[0], -1, x.shape[-1])  # [b, h w, c]
        for block, own in zip(self.transformer_blocks, prompts or repeat(()), strict=False):
            tokens = block(tokens, context, own)
        return x + self.proj_out(tokens.reshape(x.shape))
