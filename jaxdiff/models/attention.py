"""Scaled dot-product attention: which kernel computes it where is known only here."""

import jax
import jax.numpy as jnp
from jax import Array

BLOCKWISE = 2**16  # scores of one head from which blocks pay on a CPU: 256 tokens over 256
BLOCK = 2**20  # scores of a CPU's block: 4 MB in float32, which stay in the cache
MOST_SCORES = 2**28  # of another device's: 1 GB in float32, which keeps it busy


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
