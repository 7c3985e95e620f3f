"""Weights in the diffusers directory layout, read into and written from nested dicts of arrays.

The modules' attribute names are the files' key names, so one rule turns a parameter into a tensor
of the file and back: kernels are transposed, and `kernel`, `scale` and `embedding` are all called
`weight` there. The public name of a parameter is its dotted path in the dict.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxdiff.checkpoint.checkpoint import PIPELINE, XL_PIPELINES
from jaxdiff.checkpoint.components import (
    CONFIGS,
    INDEX,
    NETWORKS,
    TOKENIZER_FILES,
    TOKENIZERS,
)
from jaxdiff.checkpoint.tensors import StoredTensor, told_misfits
from jaxdiff.checkpoint.weight_files import TEXT_PREFIX
from jaxdiff.devices import parallel
from jaxdiff.errors import InputError

# The axes of a kernel in the order of the file: linear [out, in], convolution [out, in, h, w].
FILE_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
UNCHECKED = {  # no network looks over what these pipelines make
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
UNPREFIXED = "text_projection"  # transformers has it beside the text model, not in it
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


class StoredNetwork(NamedTuple):
    """A network whose weights still lie in their files.

    Attributes:
      graph: `nnx.merge(graph, params)` is the network.
      params: a `jax.ShapeDtypeStruct` for each parameter, with its sharding.
      tensors: the weights, by key.
    """

    graph: nnx.GraphDef
    params: dict
    tensors: Mapping[str, StoredTensor]

    def load(self) -> dict:
        """The parameters on their devices, as `load_params` gives them."""
        dtype = jax.tree.leaves(self.params)[0].dtype
        places = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        return load_params(self.params, self.tensors, dtype, places)


def open_network(
    model_class, config, tensors: Mapping[str, StoredTensor], dtype, mesh: jax.sharding.Mesh
) -> StoredNetwork:
    """Finds a network's weights and their places on `mesh`; reads none of them.

    Raises:
      InputError: as `load_params`, and if the mesh splits none of the parameters.
    """
    graph, shapes = abstract_network(model_class, config)
    refuse_misfits(shapes, tensors)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        shapes,
        parallel.parameter_shardings(mesh, shapes),
    )
    return StoredNetwork(graph, params, tensors)


def load_params(shapes: dict, tensors: Mapping[str, StoredTensor], dtype, sharding=None) -> dict:
    """Reads one network's weights, tensor by tensor, each straight to its device.

    Args:
      shapes: the network's parameters as a nested dict of anything that has a `.shape`, from
        `abstract_network`.
      tensors: exactly these weights, by key: `Checkpoint.weights` of the network.
      dtype: what the parameters are turned into.
      sharding: one `jax.sharding.Sharding` for all, or a tree of them like `shapes`, or None for
        the default device.

    Returns:
      `shapes` with a jax array at each leaf.

    Raises:
      InputError: listing the weights that are missing, not known, or not of the right shape.
    """
    refuse_misfits(shapes, tensors)
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(shapes), strict=True)
    places = jax.tree.broadcast(sharding, shapes, is_leaf=lambda leaf: leaf is None)
    places = jax.tree.leaves(places, is_leaf=lambda leaf: leaf is None)

    def load(path, place) -> jax.Array:
        tensor = tensors[_key(path)].read().astype(dtype, copy=False)
        turned = tensor.transpose(np.argsort(_axes(path, tensor.ndim)))
        # The transfer makes it contiguous, faster than NumPy does. It is waited for, lest the
        # tensors that are still to be transferred pile up in memory.
        return jax.device_put(turned, place).block_until_ready()

    with ThreadPoolExecutor(READERS) as readers:
        leaves = list(readers.map(load, paths, places))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def refuse_misfits(shapes: dict, found: Mapping[str, StoredTensor]) -> None:
    """Raises InputError unless the weights found are those of a network, `shapes` as above."""
    wanted = file_shapes(shapes)
    faults = {
        "missing": [key for key in wanted if key not in found],
        "not known": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {list(found[key].shape)} for {list(shape)}"
            for key, shape in wanted.items()
            if key in found and found[key].shape != shape
        ],
    }
    if misfits := told_misfits(faults):
        file = min((str(tensor.file) for tensor in found.values()), default="an empty file")
        raise InputError(f"{file} does not fit its config: of the weights, {misfits}")


def file_shapes(shapes: dict) -> dict[str, tuple[int, ...]]:
    """The keys and the shapes that a network's parameters have in a file, without a prefix."""
    return {
        _key(path): tuple(leaf.shape[axis] for axis in _axes(path, len(leaf.shape)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def save_params(params: dict, file: Path, dtype, prefix: str = "") -> None:
    """Writes one network's parameters as a safetensors file that PyTorch's libraries read.

    Args:
      params: a nested dict of arrays.
      file: written over, if it is there.
      dtype: np.float16 or np.float32, what the tensors are stored as.
      prefix: goes before each key.

    Raises:
      ValueError: if a weight does not fit into `dtype`.
    """
    tensors = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        tensor = np.asarray(value).transpose(_axes(path, value.ndim))
        with np.errstate(over="ignore"):  # said better below
            tensor = np.ascontiguousarray(tensor, dtype)
        if not np.isfinite(tensor).all():
            raise ValueError(f"{_name(path)} is not finite as {np.dtype(dtype)}")
        key = _key(path)
        tensors[key if key.startswith(UNPREFIXED) else prefix + key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner's eyes only


def save_pipeline(
    directory: Path,
    *,
    configs: dict,
    params: dict[str, dict],
    scheduler: dict,
    tokenizers: Mapping[str, Path],
    pipeline: Mapping = MappingProxyType({"_class_name": PIPELINE}),
    dtype=np.float16,
) -> None:
    """Writes a complete diffusers directory, whole or not at all.

    Args:
      directory: a new one, or a diffusers directory to be replaced.
      configs: the config dataclasses of the text encoders, "unet" and "vae".
      params: their parameters, a nested dict of arrays each.
      scheduler: what becomes `scheduler_config.json`, `_class_name` included.
      tokenizers: for each text encoder a directory in the CLIPTokenizer format; its files are
        copied.
      pipeline: what `model_index.json` says beside its components, `_class_name` included.
      dtype: np.float16 or np.float32, what the weights are stored as.

    Raises:
      InputError: if `directory` holds anything that this function does not write.
    """
    folders = {TOKENIZERS[name]: folder for name, folder in tokenizers.items()}
    unchecked = {} if pipeline["_class_name"] in XL_PIPELINES else UNCHECKED
    index = {
        **pipeline,
        **unchecked,
        **{network: list(NETWORKS[network][:2]) for network in configs},
        **{folder: ["transformers", "CLIPTokenizer"] for folder in folders},
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    _refuse_foreign_files(directory, {INDEX, "scheduler", *folders, *configs})
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory.parent) as scratch:
        new = Path(scratch) / "new"
        for component in ("scheduler", *configs):
            (new / component).mkdir(parents=True)
        write_json(new / INDEX, index)
        write_json(new / "scheduler" / CONFIGS["scheduler"], scheduler)
        for network, config in configs.items():
            _save_network(new / network, config.to_json(), params[network], dtype)
        for folder, source in folders.items():
            (new / folder).mkdir()
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, new / folder / name)
        if directory.exists():  # killed right after this, we leave both in `scratch`, whole
            directory.rename(Path(scratch) / "old")
        new.rename(directory)


def _save_network(folder: Path, config: dict, params: dict, dtype) -> None:
    network = folder.name
    is_text = network in TOKENIZERS
    if is_text:
        # Without it transformers would compute in the dtype that the weights are stored in.
        config["dtype"] = "float32"
    write_json(folder / CONFIGS[network], config)
    save_params(params, folder / NETWORKS[network][2], dtype, TEXT_PREFIX if is_text else "")


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object as diffusers does: indented, its keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_foreign_files(directory: Path, ours: set[str]) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: name a new directory")
    foreign = sorted({path.name for path in directory.glob("*")} - ours)
    if foreign:
        raise InputError(
            f"{directory} holds {foreign[0]}, which is no part of a checkpoint: name a new "
            "directory, so that nothing is lost"
        )


def _name(path) -> str:
    """The public name of a parameter, for instance "down_blocks.0.resnets.1.conv1.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _key(path) -> str:
    """The tensor's key in the file, for instance "down_blocks.0.resnets.1.conv1.weight"."""
    return re.sub(r"\b(kernel|scale|embedding)$", "weight", _name(path))


def _axes(path, ndim: int) -> tuple[int, ...]:
    """The parameter's axes in the order of the file."""
    return FILE_AXES[ndim] if _name(path).endswith(".kernel") else tuple(range(ndim))
