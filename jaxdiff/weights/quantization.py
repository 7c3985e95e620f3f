"""Weights of 8 bits: symmetric, with a scale for each output channel; activations stay as they are.

Of denoisers and text encoders, the kernels of the numbered blocks are quantised: nearly all of the
weights. Embeddings, the first and the last layers are outside of these and stay, as do norms and
biases.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

FORMATS = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
IN_BLOCK = re.compile(r"\.\d+\..*kernel$")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A kernel of 8 bits; the weights are values times scale.

    Attributes:
      values: int8 or float8_e4m3fn [..., in, out].
      scale: float32 [out].
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.values.shape


def is_quantized(leaf) -> bool:
    """Checks for a `Quantized`, for functions of `jax.tree`."""
    return isinstance(leaf, Quantized)


def quantized_places(places: dict, kind: str) -> dict:
    """Returns the places of a network's parameters with those of quantised kernels.

    Args:
      places: a `jax.ShapeDtypeStruct` with a sharding for each parameter, as a nested dict.
      kind: of `FORMATS`.
    """

    def place(path, leaf: jax.ShapeDtypeStruct):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not IN_BLOCK.search(name):
            return leaf
        values = jax.ShapeDtypeStruct(leaf.shape, FORMATS[kind], sharding=leaf.sharding)
        split = [*leaf.sharding.spec, *[None] * len(leaf.shape)][len(leaf.shape) - 1]
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(split))
        return Quantized(
            values, jax.ShapeDtypeStruct(leaf.shape[-1:], np.float32, sharding=sharding)
        )

    return jax.tree_util.tree_map_with_path(place, places)


def quantize(kernel: np.ndarray, dtype: np.dtype) -> Quantized:
    """Quantises a kernel [..., in, out], so that each output's largest weight is the largest value.

    Args:
      kernel: of any float.
      dtype: one of the values of `FORMATS`.
    """
    kernel = kernel.astype(np.float32, copy=False)
    is_integer = dtype == np.int8
    largest = 127.0 if is_integer else float(ml_dtypes.finfo(dtype).max)
    most = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    scale = np.where(most > 0, most / largest, 1).astype(np.float32)
    values = kernel / scale
    return Quantized((np.rint(values) if is_integer else values).astype(dtype), scale)


def restored(params: Any, dtype, after: Array | None = None) -> Any:
    """Returns parameters whose quantised kernels are floats again; for use inside a program.

    Args:
      params: a tree of arrays and `Quantized`.
      dtype: of the restored kernels.
      after: an array that must be computed before. In a loop, one that changes keeps the compiler
        from restoring all kernels once, before the loop, where they would fill the memory.
    """
    if not any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        return params
    if after is not None:
        params, _ = jax.lax.optimization_barrier((params, after))

    def restore(leaf):
        if not is_quantized(leaf):
            return leaf
        return (leaf.values.astype(jnp.float32) * leaf.scale).astype(dtype)

    return jax.tree.map(restore, params, is_leaf=is_quantized)
