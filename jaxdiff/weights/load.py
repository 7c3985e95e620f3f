"""Weights from the files of a checkpoint onto the devices, each straight to its place.

The modules' attribute names are the files' key names, so one rule turns a parameter into a tensor
of the file and back: kernels are transposed, and `kernel`, `scale` and `embedding` are all called
`weight` there. The public name of a parameter is its dotted path in the dict.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxdiff.checkpoint.tensors import StoredTensor, describe_misfits
from jaxdiff.devices import parallel
from jaxdiff.errors import InputError

READERS = 4  # threads, which hold a tensor or two each


def abstract_network(model_class, config) -> tuple[nnx.GraphDef, dict]:
    """A network without weights, at no cost but the tracing.

    Args:
      model_class: an `nnx.Module` that is made as `model_class(config, rngs=...)`.

    Returns:
      its graph, and the shapes of its parameters as a nested dict: `load_params` fills it, and
      `nnx.merge(graph, params)` is the network.
    """
    # No weight is drawn, so one key does for all; `nnx.Rngs` would count the keys in the traced
    # program, which takes ten times as long (9 s for Stable Diffusion's U-Net).
    rngs = SimpleNamespace(params=lambda: jax.random.key(0))
    graph, state = nnx.split(nnx.eval_shape(lambda: model_class(config, rngs=rngs)))
    return graph, nnx.to_pure_dict(state)


def places(shapes: dict, dtype, shardings=None) -> dict:
    """Where each parameter goes: a `jax.ShapeDtypeStruct` with its sharding.

    Args:
      shapes: nested dict of anything with a `.shape`, such as `abstract_network` gives.
      dtype: what the parameters are turned into.
      shardings: one for all, or a tree of them like `shapes`, or None for the default device.
    """
    shardings = jax.tree.broadcast(shardings, shapes, is_leaf=lambda leaf: leaf is None)
    leaves, structure = jax.tree.flatten(shapes)
    each = jax.tree.leaves(shardings, is_leaf=lambda leaf: leaf is None)
    return structure.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, each, strict=True)
    )


class StoredNetwork(NamedTuple):
    """A network whose weights still lie in their files.

    Attributes:
      places: as `places` gives them; each parameter has a dtype and a sharding of its own.
      tensors: the weights, by key.
    """

    places: dict
    tensors: Mapping[str, StoredTensor]

    def load(self) -> dict:
        """The parameters on their devices, as `load_params` gives them."""
        return load_params(self.places, self.tensors)


def open_network(
    shapes: dict,
    rules: Sequence[tuple[str, int]],
    tensors: Mapping[str, StoredTensor],
    dtype,
    mesh: jax.sharding.Mesh,
) -> StoredNetwork:
    """Finds a network's weights and their places on `mesh`; reads none of them.

    Args:
      shapes: of its parameters, as `abstract_network` gives them.
      rules: by which they are split, as in `parallel.parameter_shardings`.

    Raises:
      InputError: as `load_params`, and if the mesh splits none of the parameters.
    """
    refuse_misfits(shapes, tensors)
    shardings = parallel.parameter_shardings(mesh, shapes, rules)
    return StoredNetwork(places(shapes, dtype, shardings), tensors)


def load_params(places: dict, tensors: Mapping[str, StoredTensor]) -> dict:
    """Reads one network's weights, tensor by tensor, each straight to its device.

    Args:
      places: as the function of this name gives them.
      tensors: exactly these weights, by key: `Checkpoint.weights` of the network.

    Returns:
      `places` with a jax array at each leaf.

    Raises:
      InputError: listing the weights that are missing, not known, or not of the right shape.
    """
    refuse_misfits(places, tensors)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(places), strict=True)

    def load(path, place: jax.ShapeDtypeStruct) -> jax.Array:
        tensor = tensors[key_of(path)].read().astype(place.dtype, copy=False)
        turned = tensor.transpose(np.argsort(file_axes(path, tensor.ndim)))
        # The transfer makes it contiguous, faster than NumPy does. Waiting for it keeps tensors
        # that are still being transferred from piling up in memory.
        return jax.device_put(turned, place.sharding).block_until_ready()

    with ThreadPoolExecutor(READERS) as readers:
        arrays = list(readers.map(load, paths, leaves))
    return jax.tree.unflatten(jax.tree.structure(places), arrays)


def refuse_misfits(shapes: dict, found: Mapping[str, StoredTensor]) -> None:
    """Raises InputError unless the weights found are those of a network, `shapes` as above."""
    wanted = file_shapes(shapes)
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {list(found[key].shape)} for {list(shape)}"
            for key, shape in wanted.items()
            if key in found and found[key].shape != shape
        ],
    }
    if misfits := describe_misfits(faults):
        file = min((str(tensor.file) for tensor in found.values()), default="an empty file")
        raise InputError(f"{file} does not fit its config: of the weights, {misfits}")


def file_shapes(shapes: dict) -> dict[str, tuple[int, ...]]:
    """The keys and the shapes that a network's parameters have in a file, without a prefix."""
    return {
        key_of(path): tuple(leaf.shape[axis] for axis in file_axes(path, len(leaf.shape)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def name_of(path) -> str:
    """The public name of a parameter, for instance "down_blocks.0.resnets.1.conv1.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def key_of(path) -> str:
    """The tensor's key in the file, for instance "down_blocks.0.resnets.1.conv1.weight"."""
    return re.sub(r"\b(kernel|scale|embedding)$", "weight", name_of(path))


def file_axes(path, ndim: int) -> tuple[int, ...]:
    """The parameter's axes in the order of the file."""
    if not name_of(path).endswith(".kernel"):
        return tuple(range(ndim))
    return ndim - 1, ndim - 2, *range(ndim - 2)  # [out, in, ...], ours [..., in, out]
