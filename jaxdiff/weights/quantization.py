"""Weights of 8 bits: symmetric, with a scale for each output channel.

Activations stay as they are, except for w8a8: there, the inputs of linear layers are quantised as
well, each vector with a scale of its own (Yao et al., 2022, arXiv:2206.01861), so that products are
of 8-bit integers.

Of denoisers, ControlNets and text encoders, the kernels of the numbered blocks are quantised:
nearly all of the weights. Embeddings, the first and the last layers are outside of these and stay,
as do norms and biases.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

INT8 = np.dtype(np.int8)
FORMATS = {"int8": INT8, "fp8": np.dtype(ml_dtypes.float8_e4m3fn), "w8a8": INT8}
LARGEST = 127  # of symmetric int8
# The layers of `controlnet_`, though numbered, are the first and the last ones of a ControlNet.
IN_BLOCK = re.compile(r"^(?!controlnet_).*\.\d+\..*kernel$")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["multiplies"],
)
@dataclass(frozen=True)
class Quantized:
    """A kernel of 8 bits; the weights are values times scale.

    Attributes:
      values: int8 or float8_e4m3fn [..., in, out].
      scale: float32 [out].
      multiplies: whether it is never restored, but multiplied by `product`.
    """

    values: Any
    scale: Any
    multiplies: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.values.shape

    def product(self, x: Array) -> Array:
        """Multiplies [..., in], quantised to int8 vector by vector, by the kernel."""
        most = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
        scale = jnp.where(most > 0, most / LARGEST, 1)
        values = jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8)
        sums = jax.lax.dot_general(
            values,
            self.values,
            (((x.ndim - 1,), (0,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        return (sums.astype(jnp.float32) * scale * self.scale).astype(x.dtype)


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
        scale = jax.ShapeDtypeStruct(leaf.shape[-1:], np.float32, sharding=sharding)
        return Quantized(values, scale, multiplies=kind == "w8a8" and len(leaf.shape) == 2)

    return jax.tree_util.tree_map_with_path(place, places)


def quantize(kernel: np.ndarray, place: Quantized) -> Quantized:
    """Quantises a kernel [..., in, out], so that each output's largest weight is the largest value.

    Args:
      kernel: of any float.
      place: as from `quantized_places`.
    """
    kernel, dtype = kernel.astype(np.float32, copy=False), place.values.dtype
    is_integer = dtype == INT8
    largest = LARGEST if is_integer else float(ml_dtypes.finfo(dtype).max)
    most = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)))
    scale = np.where(most > 0, most / largest, 1).astype(np.float32)
    values = kernel / scale
    values = (np.rint(values) if is_integer else values).astype(dtype)
    return Quantized(values, scale, place.multiplies)


def restored(params: Any, dtype, after: Array | None = None) -> Any:
    """Returns parameters whose quantised kernels are floats again, if they do not multiply so.

    This is for use inside a program.

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
        if not is_quantized(leaf) or leaf.multiplies:
            return leaf
        return (leaf.values.astype(jnp.float32) * leaf.scale).astype(dtype)

    return jax.tree.map(restore, params, is_leaf=is_quantized)
