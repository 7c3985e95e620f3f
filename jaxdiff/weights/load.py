"""Loads weights from a checkpoint's files onto the devices, one tensor at a time.

The modules' attributes have the same names as the files' keys, so one rule converts between the
parameters and the tensors of a file: kernels are transposed, and `kernel`, `scale` and `embedding`
are all called `weight` in the file. A parameter's public name is its dotted path in the dict.
"""

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from jaxdiff.checkpoint.tensors import StoredTensor, describe_misfits
from jaxdiff.devices import parallel
from jaxdiff.errors import InputError
from jaxdiff.weights.quantization import Quantized, is_quantized, quantize, quantized_places

READERS = 4  # threads, each of which holds one or two tensors


def places(shapes: dict, dtype, shardings=None) -> dict:
    """Returns each parameter's shape, dtype and sharding as a `jax.ShapeDtypeStruct`.

    Args:
      shapes: a nested dict of leaves with a `.shape`, for example from `abstract_network`.
      dtype: the dtype of the parameters on the devices.
      shardings: one sharding for all, a tree of shardings like `shapes`, or None for the default
        device.
    """
    shardings = jax.tree.broadcast(shardings, shapes, is_leaf=lambda leaf: leaf is None)
    leaves, structure = jax.tree.flatten(shapes)
    each = jax.tree.leaves(shardings, is_leaf=lambda leaf: leaf is None)
    return structure.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, each, strict=True)
    )


class StoredNetwork(NamedTuple):
    """A network whose weights have not been read yet.

    Attributes:
      places: each parameter's shape, dtype and sharding, as `places` returns them.
      tensors: the weights in their files, by key.
    """

    places: dict
    tensors: Mapping[str, StoredTensor]

    @property
    def device_bytes(self) -> int:
        """How much memory the parameters take on each device."""
        return sum(
            math.prod(place.sharding.shard_shape(place.shape)) * place.dtype.itemsize
            for place in jax.tree.leaves(self.places)
        )

    def load(self, *, on_host: bool = False) -> dict:
        """Reads the parameters onto their devices or into the host's memory: see `load_params`."""
        return load_params(self.places, self.tensors, on_host=on_host)


def open_network(
    shapes: dict,
    rules: Sequence[tuple[str, int]],
    tensors: Mapping[str, StoredTensor],
    dtype,
    mesh: jax.sharding.Mesh,
    kind: str | None = None,
) -> StoredNetwork:
    """Checks a network's weights and chooses their shardings on `mesh`; reads no weights.

    Args:
      shapes: the shapes of its parameters, as `abstract_network` returns them.
      rules: how to split the parameters, as in `parallel.parameter_shardings`.
      tensors: the weights in their files, by key.
      dtype: the dtype of the parameters on the devices.
      mesh: the devices.
      kind: of `quantization.FORMATS`, for kernels that are quantised as they are read; or None.

    Raises:
      InputError: as in `load_params`, or if the mesh splits none of the parameters.
    """
    refuse_misfits(shapes, tensors)
    shardings = parallel.parameter_shardings(mesh, shapes, rules)
    placed = places(shapes, dtype, shardings)
    return StoredNetwork(placed if kind is None else quantized_places(placed, kind), tensors)


def load_params(
    places: dict, tensors: Mapping[str, StoredTensor], *, on_host: bool = False
) -> dict:
    """Reads one network's weights tensor by tensor, each straight to its device.

    Args:
      places: each parameter's shape, dtype and sharding, as the function `places` returns them.
      tensors: exactly these weights by key, as `Checkpoint.weights` returns them.
      on_host: whether the weights stay in the host's memory, ready for their devices.

    Returns:
      `places` with a JAX array at each leaf, or with a NumPy array if `on_host`.

    Raises:
      InputError: listing the weights that are missing, unknown or of the wrong shape; or for a
        weight that is not finite.
    """
    refuse_misfits(places, tensors)
    found = jax.tree_util.tree_leaves_with_path(places, is_leaf=is_quantized)
    paths, leaves = zip(*found, strict=True)

    def load(path, place: jax.ShapeDtypeStruct | Quantized) -> jax.Array | np.ndarray | Quantized:
        stored = tensors[key_of(path)]
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            tensor = stored.read()
            if not is_quantized(place):
                tensor = tensor.astype(place.dtype, copy=False)
        if not np.isfinite(tensor).all():  # cheap beside reading; it would spoil every image
            cause = "contains NaN or infinity; copy the checkpoint again"
            if stored.updates:
                cause = "is not finite with its LoRAs; use others, or smaller weights for them"
            raise InputError(f"{stored.file}: {key_of(path)} {cause}")
        turned = tensor.transpose(np.argsort(file_axes(path, tensor.ndim)))
        if is_quantized(place):
            turned = quantize(turned, place)
        if on_host:
            return jax.tree.map(lambda array: np.asarray(array, order="C"), turned)
        where = jax.tree.map(lambda each: each.sharding, place)
        # The transfer makes the array contiguous, faster than NumPy. Waiting for it keeps tensors
        # in transfer from piling up in memory.
        return jax.block_until_ready(jax.device_put(turned, where))

    with ThreadPoolExecutor(READERS) as readers:
        arrays = list(readers.map(load, paths, leaves))
    return jax.tree.unflatten(jax.tree.structure(places, is_leaf=is_quantized), arrays)


def refuse_misfits(shapes: dict, found: Mapping[str, StoredTensor]) -> None:
    """Raises InputError unless the weights found are exactly those of a network with `shapes`."""
    wanted = file_shapes(shapes)
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "of the wrong shape": [
            f"{key} {list(found[key].shape)} instead of {list(shape)}"
            for key, shape in wanted.items()
            if key in found and found[key].shape != shape
        ],
    }
    if misfits := describe_misfits(faults):
        file = min((str(tensor.file) for tensor in found.values()), default="an empty file")
        raise InputError(
            f"{file} does not match its config: of its weights, {misfits}; copy the checkpoint "
            "again"
        )


def file_shapes(shapes: dict) -> dict[str, tuple[int, ...]]:
    """Returns the keys, without a prefix, and shapes of a network's parameters in a file."""
    return {
        key_of(path): tuple(leaf.shape[axis] for axis in file_axes(path, len(leaf.shape)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_quantized)
    }


def name_of(path) -> str:
    """Returns a parameter's public name, such as "down_blocks.0.resnets.1.conv1.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def key_of(path) -> str:
    """Returns the tensor's key in the file, such as "down_blocks.0.resnets.1.conv1.weight"."""
    return re.sub(r"\b(kernel|scale|embedding)$", "weight", name_of(path))


def file_axes(path, ndim: int) -> tuple[int, ...]:
    """Returns the parameter's axes in the order that they have in the file."""
    if not name_of(path).endswith(".kernel"):
        return tuple(range(ndim))
    return ndim - 1, ndim - 2, *range(ndim - 2)  # file: [out, in, ...]; ours: [..., in, out]
