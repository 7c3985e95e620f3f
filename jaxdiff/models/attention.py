"""Scaled dot-product attention; only this module chooses the kernel for a device."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from jaxdiff.models.platform import platform
from jaxdiff.models.products import dot_general

BLOCKWISE = 2**16  # scores per head from which blocks pay off on a CPU: 256 tokens over 256
BLOCK = 2**20  # scores per block on a CPU: 4 MB in float32, which stay in the cache
MOST_SCORES = 2**28  # scores per block on other devices: 1 GB in float32, to keep them busy
HIDDEN = -1e30  # added to the score of a token that is not seen: its weight becomes 0
LANES = 128  # of a TPU's registers; the block sizes of its kernel are multiples of it
TPU_BLOCK = 4 * LANES  # tokens per block on a TPU; the block's scores are 1 MB in float32
# The kernel's names for its block sizes.
TPU_ROWS = [f"block_q{of}" for of in ("", "_dq", "_dkv", "_major_dkv")]
TPU_COLUMNS = [f"block_k{of}" for of in ("", "_major", "_dq", "_major_dq", "_dkv", "_major_dkv")]


def attention(
    query: Array,
    key: Array,
    value: Array,
    num_heads: int,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
) -> Array:
    """Computes `attend` of heads that still have to be split.

    Args:
      query: [batch, tokens, width].
      key, value: [batch, context tokens, width].
      num_heads: divides the width.
      mask, is_causal: as in `attend`.

    Returns:
      [batch, tokens, width].
    """
    query, key, value = (split_heads(x, num_heads) for x in (query, key, value))
    return merge_heads(attend(query, key, value, mask=mask, is_causal=is_causal))


def split_heads(x: Array, num_heads: int) -> Array:
    """Maps [batch, tokens, width] to [batch, tokens, heads, head width]."""
    return x.reshape(*x.shape[:2], num_heads, -1)


def merge_heads(x: Array) -> Array:
    """Maps [batch, tokens, heads, head width] to [batch, tokens, width]."""
    return x.reshape(*x.shape[:2], -1)


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    repeats: np.ndarray | None = None,
) -> Array:
    """Computes scaled dot-product attention (Vaswani et al., 2017) with a float32 softmax.

    In bfloat16 it uses flash attention (Dao et al., 2022, arXiv:2205.14135): cuDNN's on NVIDIA
    GPUs, Pallas' on TPUs. Otherwise it processes one block of queries at a time, to bound memory.
    On a CPU, where XLA is fast only on plain matrices, a block covers one image and one head, which
    also keeps an image's arithmetic independent of the batch; elsewhere it covers the whole batch.
    Small and causal attention is not split into blocks. All paths are differentiable.

    The CPU paths and the blocks of other devices have been run. Pallas' kernel has been run only in
    its interpreter, and for cuDNN's it is only known that the program calls it.

    Args:
      query: [batch, tokens, heads, head width].
      key, value: [batch, context tokens, heads, head width]; with `is_causal` they may have fewer
        heads, a divisor, each of which serves a group of the query's (Ainslie et al., 2023,
        arXiv:2305.13245).
      mask: bool [batch, context tokens]: which context tokens are seen; None for all. Every row
        needs at least one.
      is_causal: whether a token attends only to itself and to earlier tokens.
      repeats: int [context tokens]: how many tokens like it each one stands for; None for one.
        It goes with neither of the other options.

    Returns:
      [batch, tokens, heads, head width].
    """
    kernel = partial(_attend_at_once, is_causal=True) if is_causal else _kernel(query, key)
    if repeats is not None and query.shape[1] * key.shape[1] < BLOCKWISE:
        # exp(score + log n) is n exp(score), the share of n such tokens in the softmax.
        bias = np.log(repeats).astype(query.dtype)[None, None, None, :]
        kernel = partial(_attend_at_once, bias=bias)
    elif repeats is not None:  # few among many, and the kernels for many take no bias
        key, value = (
            x.repeat(repeats, axis=1, total_repeat_length=repeats.sum()) for x in (key, value)
        )
    return _with_whole_heads(kernel, key.shape[2])(query, key, value, mask)


def _attend_at_once(query: Array, key: Array, value: Array, mask: Array | None, **options) -> Array:
    """Computes `attend` without blocks; the options are those of JAX's function."""
    seen = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=seen, **options)


def _kernel(query: Array, key: Array) -> Callable[..., Array]:
    """Returns the function for `attend` without `is_causal` on the devices of the program.

    `jax.lax.platform_dependent` would trace every kernel, but cuDNN's cannot be traced without
    cuDNN, and importing Pallas takes a quarter of a second.
    """
    device = platform()
    half, width = query.dtype == jnp.bfloat16, query.shape[-1]
    if device == "gpu" and half and width % 8 == 0 and width <= _widest_in_cudnn():
        return partial(_attend_at_once, implementation="cudnn")
    if query.shape[1] * key.shape[1] < BLOCKWISE:
        return _attend_at_once
    if device == "cpu":
        return _attend_by_matrices
    return _attend_by_pallas if device == "tpu" and half else _attend_by_queries


def _widest_in_cudnn() -> int:
    """Returns the widest head that cuDNN's flash attention supports on this host's GPUs, or 0."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # AMD's: "gfx942"
    if capability == "9.0":  # Hopper; JAX and PyTorch agree on its limit and on earlier GPUs'
        return 256
    major = capability.partition(".")[0]
    return 128 if major.isdigit() and int(major) >= 8 else 0


def _with_whole_heads(kernel: Callable, num_heads: int) -> Callable:
    """Wraps a kernel to keep each head on one device where XLA splits arrays over mesh axes.

    XLA cannot split the kernels of cuDNN and Pallas, and would not split the loops over heads. If
    the heads do not divide evenly, every device computes all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = mesh.auto_axes
    if not axes:
        return kernel
    divides = num_heads % np.prod([mesh.shape[axis] for axis in axes]) == 0
    heads = PartitionSpec(None, None, axes if divides else None)
    return jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, PartitionSpec()),
        out_specs=heads,
        axis_names=set(axes),
        check_vma=False,
    )


def _attend_by_pallas(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Computes `attend` on a TPU."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    batch, tokens, _, width = query.shape
    context = key.shape[1]

    def padded(x: Array) -> Array:  # to [b, heads, tokens, head width]
        wider = -width % LANES if width > LANES else 0
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, wider)))
        return x.transpose(0, 2, 1, 3)

    query, key, value = padded(query), padded(key), padded(value)
    rows, columns = _tpu_block(query.shape[2]), _tpu_block(key.shape[2])
    if mask is None:
        mask = jnp.ones((batch, context), bool)
    seen = jnp.pad(mask, ((0, 0), (0, key.shape[2] - context))).astype(jnp.int32)
    mixed = flash.flash_attention(
        query,
        key,
        value,
        segment_ids=flash.SegmentIds(
            jnp.ones((batch, query.shape[2]), jnp.int32),
            seen,
        ),
        sm_scale=width**-0.5,
        block_sizes=flash.BlockSizes(
            block_b=1,
            **dict.fromkeys(TPU_ROWS, rows),
            **dict.fromkeys(TPU_COLUMNS, columns),
        ),
    )
    return mixed.transpose(0, 2, 1, 3)[:, :tokens, :, :width]


def _tpu_block(tokens: int) -> int:
    """Returns the largest block size, a multiple of LANES, that divides the padded `tokens`."""
    return LANES * _divisor(tokens // LANES, TPU_BLOCK // LANES)


def _attend_by_queries(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Computes `attend`, one block of queries at a time."""
    batch, tokens, heads, width = query.shape
    rows = _divisor(tokens, MOST_SCORES // (batch * heads * key.shape[1]))
    blocks = query.reshape(batch, -1, rows, heads, width).swapaxes(0, 1)

    @jax.checkpoint  # otherwise a gradient would keep every block's scores
    def mixed(block: Array) -> Array:
        return _attend_at_once(block, key, value, mask)

    return jax.lax.map(mixed, blocks).swapaxes(0, 1).reshape(query.shape)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` that is at most `most`, or 1."""
    return max(n for n in range(1, max(1, min(number, most)) + 1) if number % n == 0)


def _attend_by_matrices(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Computes `attend` as products of plain matrices."""
    batch, tokens, heads, width = query.shape
    rows = _divisor(tokens, BLOCK // key.shape[1])
    # Added to the scores, so that each image's is one more matrix for its heads.
    hidden = None if mask is None else jnp.where(mask, 0.0, HIDDEN).repeat(heads, axis=0)

    def head(parts: tuple[Array, Array, Array, Array | None]) -> Array:
        queries, keys, values, hidden = parts

        @jax.checkpoint  # otherwise a gradient would keep every block's scores
        def mixed(block: Array) -> Array:
            scores = jnp.matmul(block, keys.T, preferred_element_type=jnp.float32) * width**-0.5
            weights = jax.nn.softmax(scores if hidden is None else scores + hidden, axis=-1)
            return dot_general(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))

        return jax.lax.map(mixed, queries.reshape(-1, rows, width)).reshape(tokens, width)

    def flat(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, width)

    mixed = jax.lax.map(head, (flat(query), flat(key), flat(value), hidden))
    return mixed.reshape(batch, heads, tokens, width).transpose(0, 2, 1, 3)
