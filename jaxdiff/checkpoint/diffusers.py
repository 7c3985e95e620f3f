"""Weights in the diffusers directory layout, read into and written from nested dicts of arrays.

The modules' attribute names are the files' key names, so one rule turns a parameter into a tensor
of the file and back: kernels are transposed, and `kernel`, `scale` and `embedding` are all called
`weight` there. The public name of a parameter is its dotted path in the dict.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxdiff.checkpoint.layout import CONFIGS, NETWORKS, PIPELINE, TOKENIZER_FILES
from jaxdiff.checkpoint.safetensors_header import read_header
from jaxdiff.errors import InputError

# The axes of a kernel in the order of the file: linear [out, in], convolution [out, in, h, w].
FILE_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
FLOATS = ("F16", "BF16", "F32", "F64")
TEXT_PREFIX = "text_model."  # before each key of a text encoder in most files; not in ours
BUFFERS = ("embeddings.position_ids",)  # 0, 1, 2, ...: old CLIP files carry it
SHOWN = 4  # faults of a kind that an error spells out


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


def load_params(shapes: dict, files: Sequence[Path], dtype, sharding=None) -> dict:
    """Reads one network's weights, tensor by tensor, each straight to its device.

    Args:
      shapes: the network's parameters as a nested dict of anything that has a `.shape`, from
        `abstract_network`.
      files: safetensors files that together hold exactly these weights.
      dtype: what the parameters are turned into.
      sharding: one `jax.sharding.Sharding` for all, or a tree of them like `shapes`, or None for
        the default device.

    Returns:
      `shapes` with a jax array at each leaf.

    Raises:
      InputError: listing the weights that are missing, not known, or not of the right shape.
    """
    found = _tensors(files)
    _refuse_misfits(shapes, found, files)
    places = jax.tree.broadcast(sharding, shapes, is_leaf=lambda leaf: leaf is None)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="numpy")) for file in files}

        def load(path, _, place):
            file, key, _ = found[_key(path)]
            tensor = opened[file].get_tensor(key)
            tensor = tensor.transpose(np.argsort(_axes(path, tensor.ndim)))
            return jax.device_put(np.ascontiguousarray(tensor, dtype), place)

        return jax.tree_util.tree_map_with_path(load, shapes, places)


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
        tensors[prefix + _key(path)] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner's eyes only


def save_pipeline(
    directory: Path,
    *,
    configs: dict,
    params: dict[str, dict],
    scheduler: dict,
    tokenizer: Path,
    dtype=np.float16,
) -> None:
    """Writes a complete diffusers directory, whole or not at all.

    Args:
      directory: a new one, or a diffusers directory to be replaced.
      configs: the config dataclasses of "text_encoder", "unet" and "vae".
      params: their parameters, a nested dict of arrays each.
      scheduler: what becomes `scheduler_config.json`, `_class_name` included.
      tokenizer: a directory in the CLIPTokenizer format, whose files are copied.
      dtype: np.float16 or np.float32, what the weights are stored as.

    Raises:
      InputError: if `directory` holds anything that this function does not write.
    """
    index = {
        "_class_name": PIPELINE,
        **{component: [library, name] for component, (library, name, _) in NETWORKS.items()},
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    _refuse_foreign_files(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory.parent) as scratch:
        new = Path(scratch) / "new"
        for component in CONFIGS:
            (new / component).mkdir(parents=True)
        write_json(new / "model_index.json", index)
        write_json(new / "scheduler" / CONFIGS["scheduler"], scheduler)
        for component, (_, _, weights) in NETWORKS.items():
            config, prefix = configs[component].to_json(), ""
            if component == "text_encoder":
                # Without it transformers would compute in the dtype that the weights are stored in.
                config["dtype"] = "float32"
                prefix = TEXT_PREFIX
            write_json(new / component / CONFIGS[component], config)
            save_params(params[component], new / component / weights, dtype, prefix)
        (new / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, new / "tokenizer" / name)
        if directory.exists():  # killed right after this, we leave both in `scratch`, whole
            directory.rename(Path(scratch) / "old")
        new.rename(directory)


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON object as diffusers does: indented, its keys sorted."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_foreign_files(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: name a new directory")
    ours = {"model_index.json", "tokenizer", *CONFIGS}
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


def _tensors(files: Sequence[Path]) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """For each key, without a prefix: the file, the key as it stands there, and the shape."""
    found = {}
    for file in files:
        for key, tensor in read_header(file).items():
            dtype, shape = tensor.dtype, tensor.shape
            plain = key.removeprefix(TEXT_PREFIX)
            if plain in BUFFERS:
                continue
            if plain in found:
                raise InputError(f"{file}: {key} is there twice")
            if dtype not in FLOATS:
                raise InputError(f"{file}: {key} is stored as {dtype}; only {FLOATS} are read")
            found[plain] = file, key, shape
    return found


def _refuse_misfits(shapes: dict, found: dict, files: Sequence[Path]) -> None:
    wanted = file_shapes(shapes)
    faults = {
        "missing": [key for key in wanted if key not in found],
        "not known": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {list(found[key][2])} for {list(shape)}"
            for key, shape in wanted.items()
            if key in found and found[key][2] != shape
        ],
    }
    told = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:SHOWN])}{', ...' * (len(keys) > SHOWN)})"
        for kind, keys in faults.items()
        if keys
    ]
    if told:
        raise InputError(
            f"{files[0]} does not fit the config beside it: of the weights, {'; '.join(told)}"
        )
