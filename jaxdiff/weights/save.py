"""Saves weights and whole checkpoints in the diffusers layout, readable by PyTorch's libraries."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxdiff.checkpoint.component import (
    CONFIG,
    INDEX,
    SCHEDULER_CONFIG,
    TOKENIZER_FILES,
    Component,
)
from jaxdiff.checkpoint.json_files import read_json, write_json
from jaxdiff.errors import InputError
from jaxdiff.weights.load import file_axes, key_of, name_of

UNPREFIXED = "text_projection"  # in transformers, it is not a part of the text model


def save_params(params: dict, file: Path, dtype, prefix: str = "") -> None:
    """Writes one network's parameters to a safetensors file that PyTorch's libraries can read.

    Args:
      params: a nested dict of arrays.
      file: the file, which is overwritten if it exists.
      dtype: the dtype of the stored tensors, np.float16 or np.float32.
      prefix: the prefix of each key.

    Raises:
      ValueError: if a weight overflows `dtype`.
    """
    tensors = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        tensor = np.asarray(value).transpose(file_axes(path, value.ndim))
        with np.errstate(over="ignore"):  # checked below
            tensor = np.ascontiguousarray(tensor, dtype)
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name_of(path)} is not finite as {np.dtype(dtype)}")
        key = key_of(path)
        tensors[key if key.startswith(UNPREFIXED) else prefix + key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it readable by the owner only


def save_pipeline(
    directory: Path,
    *,
    components: Mapping[str, Component],
    configs: dict,
    params: dict[str, dict],
    scheduler: dict,
    tokenizers: Mapping[str, Path],
    pipeline: Mapping,
    dtype=np.float16,
) -> None:
    """Writes a complete diffusers directory atomically.

    Args:
      directory: a new directory, or a diffusers directory to replace.
      components: the networks' components, as their family lists them.
      configs: the networks' config dataclasses.
      params: the networks' parameters, a nested dict of arrays for each.
      scheduler: the contents of `scheduler_config.json`, including `_class_name`.
      tokenizers: each text encoder's tokenizer directory, whose files are copied.
      pipeline: the entries of `model_index.json` other than components, including `_class_name`.
      dtype: the dtype of the stored weights, np.float16 or np.float32.

    Raises:
      InputError: if `directory` contains anything that this function does not write.
    """
    folders = {components[name].tokenizer: folder for name, folder in tokenizers.items()}
    index = {
        **pipeline,
        **{name: [components[name].library, components[name].class_name] for name in configs},
        **{folder: ["transformers", _class(source)] for folder, source in folders.items()},
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    _refuse_foreign_files(directory, {INDEX, "scheduler", *folders, *configs})
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory.parent) as scratch:
        new = Path(scratch) / "new"
        for component in ("scheduler", *configs):
            (new / component).mkdir(parents=True)
        write_json(new / INDEX, index)
        write_json(new / "scheduler" / SCHEDULER_CONFIG, scheduler)
        for network, config in configs.items():
            _save_network(
                new / network, components[network], config.to_json(), params[network], dtype
            )
        for folder, source in folders.items():
            (new / folder).mkdir()
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, new / folder / name)
        if directory.exists():  # if killed right after this, both are in `scratch`, complete
            directory.rename(Path(scratch) / "old")
        new.rename(directory)


def _class(tokenizer: Path) -> str:
    """Returns the class of the tokenizer in a directory, which only some files name."""
    config = tokenizer / "tokenizer_config.json"
    return (read_json(config) if config.is_file() else {}).get("tokenizer_class", "CLIPTokenizer")


def _save_network(folder: Path, component: Component, config: dict, params: dict, dtype) -> None:
    if component.library == "transformers":
        # Without this, transformers would compute in the dtype of the stored weights.
        config["dtype"] = "float32"
    write_json(folder / CONFIG, config)
    save_params(params, folder / component.weights_file, dtype, component.prefix)


def _refuse_foreign_files(directory: Path, ours: set[str]) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; choose a new directory")
    foreign = sorted({path.name for path in directory.glob("*")} - ours)
    if foreign:
        raise InputError(
            f"{directory} contains {foreign[0]}, which is not part of a checkpoint and would be "
            "lost; choose a new directory"
        )
