"""Products and convolutions on CPUs: Winograd's algorithm, fast bfloat16, and equal sums.

XLA for CPUs multiplies matrices of bfloat16 at twice the rate of float32, where the processor does
(AVX512-BF16, AMX), but only if the result is float32. Otherwise, and in every convolution, it turns
the operands into float32 first. So products are asked for in float32 here, and convolutions become
products. Other devices and dtypes are left to XLA.

The sums of both are float32 and rounded once; only the order of the additions differs.

A large 3x3 convolution of float32 takes half of the multiplications, by Winograd's algorithm (Lavin
and Gray, 2016, arXiv:1509.09308): four rows of the result are sums of six products instead of
twelve. Its rounding errors are about three times as large.

XLA's own convolutions compute `TILE` pixels of a batch at once. On processors without AVX-512 they
add up the products for a rest of fewer pixels in another order, so the last image of a batch would
have other bits than the same image in another place. There, convolutions compute some rows more, so
that no rest is left.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff import processor
from jaxdiff.models.platform import platform

FEWEST_CHANNELS = 16  # of a convolution's input and output; with fewer, XLA's own is faster
BLOCK = 2**22  # bytes of the patches that are multiplied at once, which stay in the cache
FEWEST_ROWS = 512  # of the patches; with fewer, packing the kernel for each block takes too long
TILE = 24
NHWC = ("NHWC", "HWIO", "NHWC")
# Winograd's F(4, 3), for the points 0, 1, -1, 2, -2 and infinity: the six factors of each row of
# the input, of each row of the kernel, and of each product in a row of the result.
OF_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
OF_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
OF_RESULT = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
FEWEST_PIXELS = 2048  # of a batch; with fewer, the kernel's sums take longer than is saved
MOST_BYTES = 2**31  # of the input's sums and the products; with more, they take too much memory


def dot_general(
    lhs: Array, rhs: Array, dimension_numbers, *, preferred_element_type=None, **options
) -> Array:
    """Computes `jax.lax.dot_general`, whose arguments it takes."""
    wanted = preferred_element_type
    converts = wanted is None and _converts(lhs, rhs)
    product = jax.lax.dot_general(
        lhs,
        rhs,
        dimension_numbers,
        preferred_element_type=jnp.float32 if converts else wanted,
        **options,
    )
    return product.astype(lhs.dtype) if converts else product


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    feature_group_count: int = 1,
    **options,
) -> Array:
    """Computes `jax.lax.conv_general_dilated`, whose arguments it takes, without dilation.

    The layout of the arrays is `NHWC`, with any number of axes in place of h and w.
    """
    padding = tuple(map(tuple, padding))
    is_product = feature_group_count == 1 and min(rhs.shape[2:]) >= FEWEST_CHANNELS
    if is_product and lhs.ndim == 4 and _converts(lhs, rhs):
        return _convolve(lhs, rhs, tuple(window_strides), padding)
    if is_product and _suits_winograd(lhs, rhs, window_strides):
        return _winograd(lhs, rhs, padding)
    sides = [
        (side + sum(pad) - kernel) // stride + 1
        for side, pad, kernel, stride in zip(
            lhs.shape[1:-1], padding, rhs.shape, window_strides, strict=False
        )
    ]
    more = _rows_to_add(len(lhs), sides)
    (low, high), *others = padding
    padding = (low, high + more * window_strides[0]), *others
    convolved = jax.lax.conv_general_dilated(
        lhs, rhs, window_strides, padding, feature_group_count=feature_group_count, **options
    )
    return convolved[:, : sides[0]] if more else convolved


def _rows_to_add(batch: int, sides: Sequence[int]) -> int:
    """Returns how many more rows a convolution must compute, so that no tile is left unfilled.

    Args:
      batch: its images.
      sides: of each image, the rows first.
    """
    if batch == 1 or platform() != "cpu" or "avx512f" in processor.features():
        return 0
    each = TILE // math.gcd(TILE, batch * math.prod(sides[1:]))
    return -sides[0] % each


def _converts(lhs: Array, rhs: Array) -> bool:
    """Returns whether XLA would turn the operands of a product into float32 first."""
    return lhs.dtype == rhs.dtype == jnp.bfloat16 and platform() == "cpu"


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(
    x: Array, kernel: Array, strides: tuple[int, int], padding: tuple[tuple[int, int], ...]
) -> Array:
    """Convolves [batch, h, w, in] with [rows, columns, in, out], one block of rows at a time."""
    rows, columns, _, features = kernel.shape
    # Moved as integers, because XLA turns bfloat16 into float32 and back when it moves it.
    padded = jax.lax.bitcast_convert_type(jnp.pad(x, ((0, 0), *padding, (0, 0))), jnp.uint16)
    batch, height, width, _ = padded.shape
    height = (height - rows) // strides[0] + 1
    width = (width - columns) // strides[1] + 1
    matrix = kernel.reshape(-1, features)

    def block(first: Array | int, size: int) -> Array:
        """Computes `size` rows of the result from row `first`."""
        seen = ((size - 1) * strides[0] + rows, (width - 1) * strides[1] + columns)
        part = jax.lax.dynamic_slice_in_dim(padded, first * strides[0], seen[0], axis=1)
        ends = size * strides[0], width * strides[1]
        patches = jnp.concatenate(
            [
                part[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
                for i in range(rows)
                for j in range(columns)
            ],
            axis=-1,
        )
        patches = jax.lax.bitcast_convert_type(patches, x.dtype)
        mapped = dot_general(patches, matrix, (((3,), (0,)), ((), ())))
        return jax.lax.bitcast_convert_type(mapped, jnp.uint16)

    most = max(BLOCK // (matrix.shape[0] * x.dtype.itemsize), FEWEST_ROWS) // (batch * width)
    number = 1 if rows == columns == 1 else -(-height // max(1, most))
    size = -(-height // number)
    blocks = jax.lax.map(lambda i: block(i * size, size), jnp.arange(height // size))
    mapped = blocks.swapaxes(0, 1).reshape(batch, -1, width, features)
    rest = height - mapped.shape[1]
    if rest:
        mapped = jnp.concatenate([mapped, block(height - rest, rest)], axis=1)
    return jax.lax.bitcast_convert_type(mapped, x.dtype)


def _suits_winograd(x: Array, kernel: Array, strides: Sequence[int]) -> bool:
    """Returns whether `_winograd` is the faster way."""
    is_possible = (
        x.dtype == kernel.dtype == jnp.float32
        and kernel.shape[:-2] == (3, 3)
        and tuple(strides) == (1, 1)
        and platform() == "cpu"
    )
    pixels = math.prod(x.shape[:-1])
    size = len(OF_INPUT) / len(OF_RESULT) * pixels * sum(kernel.shape[2:]) * x.dtype.itemsize
    return is_possible and pixels >= FEWEST_PIXELS and size <= MOST_BYTES


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _winograd(x: Array, kernel: Array, padding: tuple[tuple[int, int], ...]) -> Array:
    """Convolves [batch, h, w, in] with [3, 3, in, out] by Winograd's algorithm, along the rows."""
    (low, high), columns = padding
    made = x.shape[1] + low + high - 2
    step = len(OF_RESULT)
    tiles = -(-made // step)
    x = jnp.pad(x, ((0, 0), (low, high + tiles * step - made), (0, 0), (0, 0)))
    rows = [x[:, first::step][:, :tiles] for first in range(len(OF_INPUT))]
    products = [
        conv_general_dilated(
            _sum(of_input, rows),
            _sum(of_kernel, kernel)[None],
            (1, 1),
            ((0, 0), columns),
            dimension_numbers=NHWC,
        )
        for of_input, of_kernel in zip(OF_INPUT, OF_KERNEL, strict=True)
    ]
    mapped = jnp.stack([_sum(of_result, products) for of_result in OF_RESULT], axis=2)
    return mapped.reshape(len(x), -1, *mapped.shape[3:])[:, :made]


def _sum(factors: np.ndarray, terms: Sequence[Array] | Array) -> Array:
    return sum(float(factor) * term for factor, term in zip(factors, terms, strict=True) if factor)


def _forward(x: Array, kernel: Array, strides, padding):
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _winograd_forward(x: Array, kernel: Array, padding):
    return _winograd(x, kernel, padding), (x, kernel)


def _backward(strides, padding, saved, gradient: Array):
    _, pull_back = jax.vjp(
        lambda x, kernel: jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=NHWC
        ),
        *saved,
    )
    return pull_back(gradient)


_convolve.defvjp(_forward, _backward)
_winograd.defvjp(_winograd_forward, partial(_backward, (1, 1)))
