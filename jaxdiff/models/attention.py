"""Scaled dot-product attention: which kernel computes it where is known only here."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

BLOCKWISE = 2**16  # scores of one head from which blocks pay on a CPU: 256 tokens over 256
BLOCK = 2**20  # scores of a CPU's block: 4 MB in float32, which stay in the cache
MOST_SCORES = 2**28  # of another device's: 1 GB in float32, which keeps it busy
LANES = 128  # of a TPU's registers: what its kernel's blocks are multiples of
TPU_BLOCK = 4 * LANES  # tokens of a TPU's block; its scores are 1 MB in float32
TPU_ROWS = [f"block_q{of}" for of in ("", "_dq", "_dkv", "_major_dkv")]  # names of sizes, there
TPU_COLUMNS = [f"block_k{of}" for of in ("", "_major", "_dq", "_major_dq", "_dkv", "_major_dkv")]


def attention(
    query: Array, key: Array, value: Array, num_heads: int, *, is_causal: bool = False
) -> Array:
    """Scaled dot-product attention (Vaswani et al., 2017), the softmax in float32.

    In bfloat16 there is flash attention (Dao et al., 2022, arXiv:2205.14135): cuDNN's on NVIDIA's
    GPUs, Pallas' on TPUs. Everything else attends a block of queries at a time, so that memory is
    bounded. On a CPU, whose XLA is fast on plain matrices only, a block is of one image and one
    head, which also keeps an image's arithmetic independent of the batch; elsewhere it is of the
    whole batch. Few scores, and causal ones, are computed plainly. All paths are differentiable.

    The paths of CPUs and the blocks of other devices have been run; Pallas' kernel in its
    interpreter only, and of cuDNN's it is only known that the program asks for it.

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
    if is_causal:
        attend = partial(jax.nn.dot_product_attention, is_causal=True)
    else:
        attend = _kernel(query, key)
    mixed = _with_whole_heads(attend, num_heads)(query, key, value)
    return mixed.reshape(*mixed.shape[:2], -1)


def _kernel(query: Array, key: Array) -> Callable[[Array, Array, Array], Array]:
    """What attends without a mask, of [b, tokens, heads, head width], on this host's devices.

    Not by `jax.lax.platform_dependent`, which traces every platform's kernel on each: cuDNN's
    cannot be traced where there is no cuDNN, and Pallas takes a quarter second to import.
    """
    platform, half, width = jax.default_backend(), query.dtype == jnp.bfloat16, query.shape[-1]
    if platform == "gpu" and half and width % 8 == 0 and width <= _widest_in_cudnn():
        return partial(jax.nn.dot_product_attention, implementation="cudnn")
    if query.shape[1] * key.shape[1] < BLOCKWISE:
        return jax.nn.dot_product_attention
    if platform == "cpu":
        return _attend_by_matrices
    return _attend_by_pallas if platform == "tpu" and half else _attend_by_queries


def _widest_in_cudnn() -> int:
    """The widest head that cuDNN's flash attention takes on this host's GPUs, or 0."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "")  # AMD's: "gfx942"
    if capability == "9.0":  # JAX and PyTorch agree on the limit of Hopper and of what was before
        return 256
    major = capability.partition(".")[0]
    return 128 if major.isdigit() and int(major) >= 8 else 0


def _with_whole_heads(attend: Callable, num_heads: int) -> Callable:
    """`attend`, with each head on one device, where XLA splits arrays over axes of a mesh.

    It cannot split the kernels of cuDNN and Pallas, nor would it split the loops over heads. Heads
    that do not divide evenly are computed by every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = mesh.auto_axes
    if not axes:
        return attend
    divides = num_heads % np.prod([mesh.shape[axis] for axis in axes]) == 0
    heads = PartitionSpec(None, None, axes if divides else None)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads),
        out_specs=heads,
        axis_names=set(axes),
        check_vma=False,
    )


def _attend_by_pallas(query: Array, key: Array, value: Array) -> Array:
    """As `attention`, of [b, tokens, heads, head width], on a TPU."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    batch, tokens, _, width = query.shape
    context = key.shape[1]

    def padded(x: Array) -> Array:  # to [b, heads, tokens, head width]
        wider = -width % LANES if width > LANES else 0
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), (0, 0), (0, wider)))
        return x.transpose(0, 2, 1, 3)

    query, key, value = padded(query), padded(key), padded(value)
    rows, columns = _tpu_block(query.shape[2]), _tpu_block(key.shape[2])
    is_token = (jnp.arange(key.shape[2]) < context).astype(jnp.int32)  # not padding
    mixed = flash.flash_attention(
        query,
        key,
        value,
        segment_ids=flash.SegmentIds(
            jnp.ones((batch, query.shape[2]), jnp.int32),
            jnp.broadcast_to(is_token, (batch, key.shape[2])),
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
    """The largest block, of LANES, that so many padded tokens divide into."""
    return LANES * _divisor(tokens // LANES, TPU_BLOCK // LANES)


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
