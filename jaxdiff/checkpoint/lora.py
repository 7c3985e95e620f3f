"""LoRA files: which layers of a checkpoint they change, and by how much. Imports no JAX.

For some layers, a file has two narrow matrices whose product is added to the layer's weight (Hu et
al., 2021, arXiv:2106.09685): weight + scale * up @ down. The product is added only when the weight
is read: `adapted` just records it with the weight's location, so an adapted checkpoint is like any
other and has its own fingerprint.

How files name the layers: see `lora_keys`.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdiff import checks
from jaxdiff.checkpoint import lora_keys, sources
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.lora_names import Layer
from jaxdiff.checkpoint.safetensors_header import read_header, read_metadata
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.errors import InputError

MAX_WEIGHT = 100
SAID = re.compile(r"(.+\.safetensors)(?::(.*))?", re.DOTALL)
MAX_PATTERN_CHARACTERS = 200  # of a key of PEFT's alpha_pattern
# A repeated group, or many repetitions: Python's regular expressions may take exponential time.
SLOW_PATTERN = re.compile(r"\)[*+?{]|([*+}].*){6}|\\[1-9]|\(\?")
# Ways of PEFT to begin a training that change the base model's weights too.
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "eva")
PEFT_CONFIG = "adapter_config.json"  # next to PEFT's own files, which lack the alpha
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # the same inside a file written by diffusers
# Other kinds of files that change layers, by a pattern in their keys.
OTHERS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"hada_[wt]\d": "a LoHa",
    r"lokr_[wt]\d": "a LoKr",
    r"oft_(blocks|diag)": "an OFT",
    r"\.(diff|diff_b|set_weight)$": "a file of full weight differences",
    r"(lora_B|lora_up|lora)\.bias$": "a LoRA with biases",
}


class Lora(NamedTuple):
    """A requested LoRA: a path or a URL, and its weight."""

    file: str
    weight: float

    @property
    def name(self) -> str:
        """The name in records and cards, for example "heart:0.5"."""
        stem = os.fsencode(Path(self.file).stem).decode("utf-8", "backslashreplace")
        return f"{stem}:{self.weight:g}"


@dataclass(frozen=True)
class Update:
    """The update that is added to one weight.

    Attributes:
      down: [rank, in] or [rank, in, height, width]; with a `mid`, [rank, in, 1, 1].
      up: [out, rank] or [out, rank, 1, 1].
      mid: None, or [rank, rank, height, width] between the two, as in LyCORIS's convolutions.
      scale: the factor of the product.
      shape: the weight's shape.
    """

    down: StoredTensor
    up: StoredTensor
    mid: StoredTensor | None
    scale: float
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Returns the scaled product, float32 of the weight's shape."""
        rank = self.down.shape[0]
        down = self.down.read().astype(np.float32).reshape(rank, -1)
        up = self.up.read().astype(np.float32).reshape(-1, rank)
        if self.mid is None:
            product = up @ down
        else:
            mid = self.mid.read().astype(np.float32)
            product = np.einsum("or,rshw,si->oihw", up, mid, down, optimize=True)
        with np.errstate(over="ignore"):  # refused when the weight is loaded
            return np.float32(self.scale) * product.reshape(self.shape)


def parse(said: str) -> Lora:
    """Reads "FILE.safetensors" or "FILE.safetensors:WEIGHT"; a directory means the file in it.

    Raises:
      InputError: if it has neither form, the weight is not a number, or a directory has not one
        .safetensors file.
    """
    found = SAID.fullmatch(_in_directory(said))
    if not found:
        raise InputError(
            f"lora {said!r} must be FILE.safetensors or FILE.safetensors:WEIGHT; other kinds of "
            "files are not safe to read"
        )
    file, weight = found.groups("1")
    try:
        what = f"lora {said!r}: the weight"
        return Lora(file, checks.number(what, weight, -MAX_WEIGHT, MAX_WEIGHT))
    except checks.BadValueError as problem:
        raise InputError(str(problem)) from None


def _in_directory(said: str) -> str:
    """Names the file in place of its directory, as diffusers and our training write one."""
    folder, colon, weight = said, "", ""
    if not os.path.isdir(said):
        folder, colon, weight = said.rpartition(":")
    if not folder or not os.path.isdir(folder):
        return said
    files = sorted(str(path) for path in Path(folder).glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(
            f"lora {folder} is a directory with {len(files)} .safetensors files; name one file"
        )
    return files[0] + colon + weight


def adapted(checkpoint: Checkpoint, loras: Sequence[str]) -> Checkpoint:
    """Returns the checkpoint with LoRAs added to its weights, in order.

    Args:
      loras: each in the form that `parse` reads, with a path or, as for a model, a URL.

    Raises:
      InputError: naming the file, if one cannot be read or does not fit the model.
    """
    for number, lora in enumerate(map(parse, loras)):
        path = _local(lora.file)
        stored = read_header(path)
        configs = _configs(path, stored)
        _reject_others(path, stored)
        _reject_changed_base(path, configs)
        tensors = {network: dict(weights) for network, weights in checkpoint.tensors.items()}
        for (network, layer), parts in _layers(path, stored, checkpoint).items():
            weights, config = tensors[network], configs.get(network, {})
            prefix = checkpoint.family.components[network].prefix
            scales = [
                lora.weight * _scale(path, (key, f"{prefix}{key}"), parts, config)
                for key in layer.keys
            ]
            shapes = [weights[key].shape for key in layer.keys]
            updates = _updates(path, parts, layer, shapes, scales)
            for key, update in zip(layer.keys, updates, strict=True):
                weights[key] = replace(weights[key], updates=(*weights[key].updates, update))
        # The name and the weight are part of the images' records, so the fingerprint covers them.
        files = {f"lora-{number}/{lora.weight!r}/{lora.name}": path}
        if _is_peft(stored):
            files[f"lora-{number}/{PEFT_CONFIG}"] = path.with_name(PEFT_CONFIG)
        checkpoint = replace(
            checkpoint,
            name=f"{checkpoint.name} + {lora.name}",
            tensors=tensors,
            files=checkpoint.files | files,
        )
    return checkpoint


def _local(file: str) -> Path:
    path = sources.local_path(file, None, {})
    if not path.is_file():
        raise InputError(f"lora {file}: no such file")
    return path


def _reject_others(path: Path, stored: Mapping[str, StoredTensor]) -> None:
    for key, (pattern, what) in itertools.product(stored, OTHERS.items()):
        if re.search(pattern, key):
            raise InputError(
                f"lora {path} is {what} ({key}), which is not supported; use a plain LoRA"
            )


def _layers(
    path: Path, stored: Mapping[str, StoredTensor], checkpoint: Checkpoint
) -> dict[tuple[str, Layer], dict[str, StoredTensor]]:
    """Returns each layer's parts, by network and layer: "down", "up", perhaps "mid" and "alpha"."""
    names = lora_keys.names_of(checkpoint)
    layers: dict[tuple[str, Layer], dict[str, StoredTensor]] = {}
    owners: dict[tuple[str, str], Layer] = {}  # of each weight; fused layers have several weights
    unknown = []
    for key, tensor in stored.items():
        place = lora_keys.find(key, names)
        if not place:
            unknown.append(key)
            continue
        network, layer, part = place
        parts = layers.setdefault((network, layer), {})
        rivals = [owners.setdefault((network, ours), layer) for ours in layer.keys]
        other = next((rival for rival in rivals if rival != layer), layer)
        if part in parts or other != layer:
            clash = parts.get(part) or next(iter(layers[network, other].values()))
            raise InputError(f"lora {path}: {key} and {clash.key} are for one layer")
        parts[part] = tensor
        if not np.isfinite(tensor.read()).all():
            raise InputError(f"lora {path}: {key} is not finite; use one from an earlier step")
    if unknown or not layers:
        misfit = lora_keys.describe_misfit(unknown, len(stored), names)
        raise InputError(
            f"lora {path} does not fit {checkpoint.name}: {misfit}; use a LoRA that was made for "
            "this model"
        )
    return layers


def _is_peft(stored: Mapping[str, StoredTensor]) -> bool:
    return any(key.startswith(lora_keys.PEFT_PREFIX) for key in stored)


def _configs(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, dict]:
    """Returns PEFT's config for each network, empty if there is none."""
    if _is_peft(stored):
        config = read_json(path.with_name(PEFT_CONFIG))
        return dict.fromkeys(lora_keys.NETWORKS, config)
    text = read_metadata(path).get(DIFFUSERS_CONFIG, "{}")
    try:
        said = json.loads(text).items()
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"lora {path}: its {DIFFUSERS_CONFIG} is not a JSON object") from error
    return {
        network: {
            name.removeprefix(f"{network}."): value
            for name, value in said
            if name.startswith(f"{network}.")
        }
        for network in lora_keys.NETWORKS
    }


def _reject_changed_base(path: Path, configs: Mapping[str, dict]) -> None:
    """Rejects LoRAs whose training began by changing the base model's weights as well."""
    for config in configs.values():
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().partition("_")[0] in CHANGED_BASE:
            raise InputError(
                f"lora {path} was trained with init_lora_weights {checks.shown(start)}, which "
                "changes the base model's weights as well; convert it with PEFT: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )


def _scale(
    path: Path, keys: Sequence[str], parts: Mapping[str, StoredTensor], config: dict
) -> float:
    """Returns the factor of the product: alpha / rank, or 1 if no alpha is given.

    Args:
      keys: the weight's, first ours and then the one that has the network's prefix.
    """
    rank = parts["down"].shape[0] if "down" in parts and parts["down"].shape else 1
    alpha = _alpha(path, [key.removesuffix(".weight") for key in keys], config)
    alpha = rank if alpha is None else alpha
    if "alpha" in parts:
        alpha = parts["alpha"].read().item() if parts["alpha"].size == 1 else None
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or not rank:
        raise InputError(f"lora {path}: the alpha of {keys[0]} is not a number; copy it again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _alpha(path: Path, layers: Sequence[str], config: dict):
    """Returns the alpha by PEFT's config of a layer with these names, None if it has none.

    As in PEFT, a key of `alpha_pattern` is a regular expression for the end of the layer's name,
    from the start or from a dot on, and the first key that matches applies.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"lora {path}: alpha_pattern is not a table; copy the file again")
    for pattern, alpha in patterns.items():
        if len(pattern) > MAX_PATTERN_CHARACTERS or SLOW_PATTERN.search(pattern):
            raise InputError(
                f"lora {path}: alpha_pattern has {pattern[:40]!r}, which could take forever to "
                "match; write it without repeated groups"
            )
        try:
            matches = re.compile(rf"(.*\.)?({pattern})$").match
        except re.error as problem:
            raise InputError(
                f"lora {path}: alpha_pattern has {pattern!r}, which is not a regular expression "
                f"({problem})"
            ) from None
        if any(map(matches, layers)):
            return alpha
    return config.get("lora_alpha")


def _updates(
    path: Path,
    parts: Mapping[str, StoredTensor],
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
    scales: Sequence[float],
) -> list[Update]:
    """Makes the updates of a layer's weights, after checking that parts and weights fit.

    Args:
      shapes, scales: those of each weight, in the layer's order.
    """
    if not {"down", "up"} <= parts.keys():
        key = next(iter(parts.values())).key
        raise InputError(f"lora {path}: {key} lacks its other half; copy the file again")
    _refuse_misfits(path, parts, layer, shapes)
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    if layer.halves_swapped:
        return [Update(down, up.swap(), mid, scales[0], shapes[0])]
    ends = itertools.accumulate(shape[0] for shape in shapes)
    return [
        Update(down, up.rows(end - shape[0], end), mid, scale, shape)
        for end, shape, scale in zip(ends, shapes, scales, strict=True)
    ]


def _refuse_misfits(
    path: Path,
    parts: Mapping[str, StoredTensor],
    layer: Layer,
    shapes: Sequence[tuple[int, ...]],
) -> None:
    """Raises InputError unless the parts fit each other and the weights."""
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank, core = down.shape[:1], (mid or down).shape
    if mid and len(mid.shape) != 4:
        raise InputError(
            f"lora {path}: {mid.key} {list(mid.shape)} is not for a convolution; copy the file "
            "again"
        )
    if up.shape[1:2] != rank or (mid and mid.shape[:2] != rank * 2):
        raise InputError(
            f"lora {path}: {down.key} {list(down.shape)} and {up.key} {list(up.shape)} differ in "
            "rank; copy the file again"
        )
    product = (*up.shape[:1], *down.shape[1:2], *core[2:])
    inner = [up.shape[2:]] + [down.shape[2:]] * (mid is not None)
    rows = sum(shape[0] for shape in shapes)
    needed = [(rows, *shape[1:]) for shape in shapes]
    odd = layer.halves_swapped and rows % 2
    if odd or any(map(_matrix, inner)) or {_matrix(product)} != set(map(_matrix, needed)):
        raise InputError(
            f"lora {path} does not fit: {up.key} and {down.key} make {list(product)}, but "
            f"{list(needed[0])} is needed; use a LoRA that was made for this model"
        )


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without the trailing 1 x 1 of a convolution that is really a matrix."""
    return shape[:-2] if shape[-2:] == (1, 1) else shape
