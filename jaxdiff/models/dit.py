"""Building blocks shared by diffusion transformers (Peebles and Xie, 2022, arXiv:2212.09748)."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.models.attention import attend, merge_heads, split_heads
from jaxdiff.models.config import ComponentConfig
from jaxdiff.models.embeddings import rotate_pairs
from jaxdiff.models.linear import Linear

EPSILON = 1e-6  # of norms, unless a network has its own


class TransformerConfig(ComponentConfig):
    """Base of the configs of diffusion transformers."""

    component = "transformer"

    @property
    def width(self) -> int:
        """The width of the tokens."""
        return self.num_attention_heads * self.attention_head_dim


def refuse_axes(axes_dims_rope: tuple[int, ...], count: int, head_width: int) -> None:
    """Raises ValueError unless `count` even shares of a head's rotary embedding fill its width."""
    if len(axes_dims_rope) != count or any(width % 2 for width in axes_dims_rope):
        raise ValueError(f"axes_dims_rope = {list(axes_dims_rope)} must be {count} even numbers")
    if sum(axes_dims_rope) != head_width:
        raise ValueError(
            f"axes_dims_rope = {list(axes_dims_rope)} must add up to attention_head_dim = "
            f"{head_width}"
        )


def layer_norm(x: Array) -> Array:
    """Normalises [..., width] without scale or bias, in float32; returns the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y - y.mean(axis=-1, keepdims=True)
    y = y / jnp.sqrt((y * y).mean(axis=-1, keepdims=True) + EPSILON)
    return y.astype(x.dtype)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """Returns the layer norm of [batch, tokens, width], scaled and shifted by [batch, width]."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def residual(
    layers: Callable[[Array], Array], x: Array, shift: Array, scale: Array, gate: Array
) -> Array:
    """Adds to [batch, tokens, width] what the layers make of it, modulated and gated."""
    return x + gate[:, None] * layers(modulated(x, shift, scale))


class AdaLayerNorm(nnx.Module):
    """Maps an embedding to `count` modulations: arXiv:2212.09748, section 3.2, adaLN."""

    def __init__(self, width: int, count: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.count = count
        self.linear = Linear(width, count * width, use_bias=use_bias, rngs=rngs)

    def __call__(self, embedding: Array) -> Sequence[Array]:
        """Maps [batch, width] to `count` arrays of that shape."""
        return jnp.split(self.linear(nnx.silu(embedding)), self.count, axis=-1)


class SelfAttention(nnx.Module):
    """Multi-head self-attention, optionally with normalised and rotated queries and keys.

    Without `out` it returns the heads' values, without a last linear layer.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        use_bias: bool = True,
        out: bool = True,
        epsilon: float = EPSILON,
        rngs: nnx.Rngs,
    ):
        head_width = width // num_heads

        def linear():
            return Linear(width, width, use_bias=use_bias, rngs=rngs)

        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = (
            nnx.RMSNorm(head_width, epsilon=epsilon, rngs=rngs) if qk_norm else None
            for _ in range(2)
        )
        self.to_out = nnx.List([linear()]) if out else None

    def __call__(
        self, x: Array, *, angles: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Maps [batch, tokens, width] to the same shape; see `JointAttention` for the options."""
        layers, norms = (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k)
        heads = _heads(x, layers, norms, self.num_heads)
        mixed = _rotated_attention(*heads, angles, mask)
        return mixed if self.to_out is None else self.to_out[0](mixed)


class JointAttention(nnx.Module):
    """Attention over the tokens of a text and an image together, with weights for each.

    See Esser et al., 2024, arXiv:2403.03206, section 4 and figure 2.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool,
        context_out: bool = True,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        """Makes the layers.

        Args:
          width: of both kinds of tokens.
          num_heads: divides the width.
          qk_norm: whether queries and keys are normalised (RMSNorm).
          context_out: whether to return the text's tokens, too, which a last block need not.
          use_bias: whether the linear layers have biases.
          rngs: draws the weights.
        """
        self.num_heads = num_heads
        head_width = width // num_heads

        def linear():
            return Linear(width, width, use_bias=use_bias, rngs=rngs)

        def norm():
            return nnx.RMSNorm(head_width, epsilon=EPSILON, rngs=rngs) if qk_norm else None

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (norm() for _ in range(4))
        self.to_out = nnx.List([linear()])
        self.to_add_out = linear() if context_out else None

    def __call__(
        self,
        x: Array,
        context: Array,
        *,
        angles: Array | None = None,
        mask: Array | None = None,
        last_counts: int = 1,
    ) -> tuple[Array, Array | None]:
        """Computes attention over the text's tokens followed by the image's.

        Args:
          x: [batch, image tokens, width].
          context: [batch, text tokens, width].
          angles: as in `embeddings.rotate_pairs`, for all tokens; None rotates nothing.
          mask: bool [batch, all tokens]: which tokens are seen; None for all.
          last_counts: how often the last of the text's tokens is seen, without angles or mask.

        Returns:
          the image's and the text's tokens, in the shapes of the inputs; without `context_out`,
          None for the text's.
        """
        ours = (self.to_q, self.to_k, self.to_v)
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        image = _heads(x, ours, (self.norm_q, self.norm_k), self.num_heads)
        text = _heads(context, added, (self.norm_added_q, self.norm_added_k), self.num_heads)
        heads = (jnp.concatenate(both, axis=1) for both in zip(text, image, strict=True))
        repeats = None
        if last_counts > 1:  # seen so often, but what each of them sees is computed once
            repeats = np.ones(context.shape[1] + x.shape[1], int)
            repeats[context.shape[1] - 1] = last_counts
        mixed = _rotated_attention(*heads, angles, mask, repeats)
        of_text, of_image = jnp.split(mixed, [context.shape[1]], axis=1)
        return self.to_out[0](of_image), self.to_add_out and self.to_add_out(of_text)


def _heads(x: Array, layers, norms, num_heads: int) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values, each [batch, tokens, heads, head width]."""
    query, key, value = (split_heads(layer(x), num_heads) for layer in layers)
    norm_query, norm_key = norms
    if norm_query is not None:
        query, key = norm_query(query), norm_key(key)
    return query, key, value


def _rotated_attention(
    query: Array,
    key: Array,
    value: Array,
    angles: Array | None,
    mask: Array | None,
    repeats: np.ndarray | None = None,
) -> Array:
    """Returns what the heads attend to, [batch, tokens, width]."""
    if angles is not None:
        query, key = rotate_pairs(query, angles), rotate_pairs(key, angles)
    return merge_heads(attend(query, key, value, mask=mask, repeats=repeats))


def joint_block(
    attention: JointAttention,
    feed_forward: nnx.Module,
    context_feed_forward: nnx.Module,
    x: Array,
    context: Array,
    of_image: Sequence[Array],
    of_text: Sequence[Array],
    *,
    angles: Array,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """Applies joint attention, then a feed-forward layer for each kind of token.

    All are modulated and gated, and have a residual (arXiv:2403.03206, figure 2b).

    Args:
      attention, feed_forward, context_feed_forward: the layers.
      x: [batch, image tokens, width].
      context: [batch, text tokens, width].
      of_image, of_text: six modulations each, [batch, width]: shift, scale and gate of attention,
        then of the feed-forward layer.
      angles, mask: as in `JointAttention`.

    Returns:
      the image's and the text's tokens, in the shapes of the inputs.
    """
    shift, scale, gate, *of_image = of_image
    text_shift, text_scale, text_gate, *of_text = of_text
    mixed, text_mixed = attention(
        modulated(x, shift, scale),
        modulated(context, text_shift, text_scale),
        angles=angles,
        mask=mask,
    )
    x = x + gate[:, None] * mixed
    context = context + text_gate[:, None] * text_mixed
    x = residual(feed_forward, x, *of_image)
    return x, residual(context_feed_forward, context, *of_text)


def packed(latents: Array, patch: int = 2, *, channels_last: bool = False) -> Array:
    """Cuts [batch, h, w, c] into patches, [batch, h w / patch^2, c patch^2].

    In a patch the channels are the slowest to change or, with `channels_last`, the fastest.
    """
    batch, height, width, channels = latents.shape
    x = latents.reshape(batch, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5) if channels_last else x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, -1, channels * patch**2)


def unpacked(
    tokens: Array, height: int, width: int, patch: int = 2, *, channels_last: bool = False
) -> Array:
    """Undoes `packed` for latents of this height and width."""
    batch, _, size = tokens.shape
    grid, channels = (batch, height // patch, width // patch), size // patch**2
    if channels_last:
        x = tokens.reshape(*grid, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    else:
        x = tokens.reshape(*grid, channels, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, height, width, channels)
