"""Building blocks that the U-Net and the autoencoder share. Activations are NHWC.

Attribute names are the checkpoint's key names, so that loading needs no table per model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

BLOCKWISE = 2**16  # scores of one head from which blocks pay on a CPU: 256 tokens over 256
BLOCK = 2**20  # scores of a CPU's block: 4 MB in float32, which stay in the cache
MOST_SCORES = 2**28  # of another device's: 1 GB in float32, which keeps it busy


def conv(in_channels: int, out_channels: int, size: int, *, rngs: nnx.Rngs, stride=1, padding=None):
    """A square convolution over NHWC, padded to keep the size unless `padding` says otherwise."""
    if padding is None:
        padding = ((size // 2, size // 2),) * 2
    return nnx.Conv(
        in_channels, out_channels, (size, size), strides=stride, padding=padding, rngs=rngs
    )


def group_norm(channels: int, groups: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalisation (Wu and He, 2018) with the two-pass variance that PyTorch has."""
    return nnx.GroupNorm(
        channels, num_groups=groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs
    )


def attention(
    query: Array, key: Array, value: Array, num_heads: int, *, is_causal: bool = False
) -> Array:
    """Scaled dot-product attention (Vaswani et al., 2017), the softmax in float32.

    Many tokens are attended a block of queries at a time, so that memory is bounded. On a CPU,
    whose XLA is fast on plain matrices only, a block is of one image and one head, which also keeps
    an image's arithmetic independent of the batch; elsewhere it is of the whole batch.

    Args:
      query: [batch, tokens, width].
      key, value: [batch, context tokens, width].
      num_heads: divides the width.
      is_causal: whether a token sees only itself and those before it.

    Returns:
      [batch, tokens, width].
    """

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:2], num_heads, -1)  # [b, tokens, heads, head width]

    query, key, value = split(query), split(key), split(value)
    if is_causal or query.shape[1] * key.shape[1] < BLOCKWISE:
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
    elif jax.default_backend() == "cpu":
        mixed = _attend_by_matrices(query, key, value)
    else:
        mixed = _attend_by_queries(query, key, value)
    return mixed.reshape(*mixed.shape[:2], -1)


def _attend_by_queries(query: Array, key: Array, value: Array) -> Array:
    """As `attention`, of [b, tokens, heads, head width]."""
    batch, tokens, heads, width = query.shape
    rows = _divisor(tokens, MOST_SCORES // (batch * heads * key.shape[1]))
    blocks = query.reshape(batch, -1, rows, heads, width).swapaxes(0, 1)

    @jax.checkpoint  # else a gradient would keep every block's scores
    def attend(block: Array) -> Array:
        return jax.nn.dot_product_attention(block, key, value)

    return jax.lax.map(attend, blocks).swapaxes(0, 1).reshape(query.shape)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, at least 1."""
    return max(n for n in range(1, max(1, min(number, most)) + 1) if number % n == 0)


def _attend_by_matrices(query: Array, key: Array, value: Array) -> Array:
    """As `attention`, of [b, tokens, heads, head width], by products of plain matrices."""
    batch, tokens, heads, width = query.shape
    rows = _divisor(tokens, BLOCK // key.shape[1])

    def head(parts: tuple[Array, Array, Array]) -> Array:
        queries, keys, values = parts

        @jax.checkpoint  # else a gradient would keep every block's scores
        def attend(block: Array) -> Array:
            scores = jnp.matmul(block, keys.T, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores * width**-0.5, axis=-1)
            return weights.astype(values.dtype) @ values

        return jax.lax.map(attend, queries.reshape(-1, rows, width)).reshape(tokens, width)

    def flat(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, width)

    mixed = jax.lax.map(head, (flat(query), flat(key), flat(value)))
    return mixed.reshape(batch, heads, tokens, width).transpose(0, 2, 1, 3)


class Attention(nnx.Module):
    """Multi-head attention of `query` tokens over `context` tokens (or over themselves)."""

    def __init__(
        self, width: int, num_heads: int, *, rngs: nnx.Rngs, context_width=None, qkv_bias=False
    ):
        context_width = context_width or width
        self.num_heads = num_heads
        self.to_q = nnx.Linear(width, width, use_bias=qkv_bias, rngs=rngs)
        self.to_k = nnx.Linear(context_width, width, use_bias=qkv_bias, rngs=rngs)
        self.to_v = nnx.Linear(context_width, width, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(width, width, rngs=rngs)])

    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """[batch, tokens, width] and [batch, context tokens, context width] to x's shape."""
        context = x if context is None else context
        mixed = attention(self.to_q(x), self.to_k(context), self.to_v(context), self.num_heads)
        return self.to_out[0](mixed)


class ResnetBlock2D(nnx.Module):
    """norm, SiLU, convolution, twice, beside a shortcut; the timestep shifts the middle."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        epsilon: float,
        rngs: nnx.Rngs,
        time_width: int | None = None,
    ):
        self.norm1 = group_norm(in_channels, groups, epsilon, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels, 3, rngs=rngs)
        self.time_emb_proj = nnx.Linear(time_width, out_channels, rngs=rngs) if time_width else None
        self.norm2 = group_norm(out_channels, groups, epsilon, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, 3, rngs=rngs)
        self.conv_shortcut = (
            conv(in_channels, out_channels, 1, rngs=rngs) if in_channels != out_channels else None
        )

    def __call__(self, x: Array, time_embedding: Array | None = None) -> Array:
        """[batch, h, w, in] and [batch, time width] to [batch, h, w, out]."""
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(nnx.silu(time_embedding))[:, None, None, :]
        hidden = self.conv2(nnx.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Halves the height and the width by a convolution of stride 2."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs, stride=2, padding=(padding, padding))

    def __call__(self, x: Array) -> Array:
        """[batch, h, w, c] to [batch, h / 2, w / 2, c]."""
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles the height and the width by nearest neighbours, then convolves."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """[batch, h, w, c] to [batch, 2h, 2w, c], or cropped to an odd `size` (height, width)."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return self.conv(x)
