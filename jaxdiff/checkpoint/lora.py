"""LoRA files: which layers of a checkpoint they change, and by how much. Imports no JAX.

For some layers, a file has two narrow matrices whose product is added to the layer's weight (Hu et
al., 2021, arXiv:2106.09685): weight + scale * up @ down. The product is added only when the weight
is read: `adapted` just records it with the weight's location, so an adapted checkpoint is like any
other and has its own fingerprint.

There are four naming schemes for layers: diffusers' current one, which is PEFT's with the network
in front; diffusers' first one (`attn1.processor.to_q_lora.down`); PEFT's own (`base_model.model.`);
and kohya's (`lora_unet_..._to_q.lora_down`), which replaces dots by underscores and uses the
original names for Stable Diffusion XL. With underscores throughout, all four can be matched.
"""

import difflib
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
from jaxdiff.checkpoint import sources
from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.checkpoint.json_files import read_json
from jaxdiff.checkpoint.safetensors_header import read_header, read_metadata
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.errors import InputError

MAX_WEIGHT = 100
SAID = re.compile(r"(.+\.safetensors)(?::(.*))?", re.DOTALL)
KEY = re.compile(
    r"""(?P<layer>.+?)
    ( [._]lora (_linear_layer)? [._] (?P<part> A | B | down | up | mid) (\.default)? \.weight
    | ([._]lora)? \.alpha )""",
    re.VERBOSE,
)
PARTS = {"A": "down", "B": "up", None: "alpha"}
PREFIXES = {
    **dict.fromkeys(("unet.", "lora_unet_"), "unet"),
    **dict.fromkeys(("text_encoder.", "lora_te_", "lora_te1_"), "text_encoder"),
    **dict.fromkeys(("text_encoder_2.", "lora_te2_"), "text_encoder_2"),
}
# diffusers' first names for the last part of a layer's name.
FIRST_NAMES = {
    **{"to_out_0": "to_out", "q_proj": "to_q", "k_proj": "to_k"},
    **{"v_proj": "to_v", "out_proj": "to_out"},
}
PEFT_PREFIX = "base_model.model."
MAX_PATTERN_CHARACTERS = 200  # of a key of PEFT's alpha_pattern
# A repeated group, or many repetitions: Python's regular expressions may take exponential time.
SLOW_PATTERN = re.compile(r"\)[*+?{]|([*+}].*){6}|\\[1-9]|\(\?")
# Ways of PEFT to begin a training that change the base model's weights too.
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "eva")
TEXT_PREFIX = "text_model."  # prefix of CLIP's layers in most files, but not in ours
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
    r"^(transformer\.|lora_transformer_|.*double_blocks)": "a LoRA for a transformer",
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
    """Reads "FILE.safetensors" or "FILE.safetensors:WEIGHT".

    Raises:
      InputError: if it has neither form, or the weight is not a number.
    """
    found = SAID.fullmatch(said)
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
        _reject_changed_base(path, configs)
        tensors = {network: dict(weights) for network, weights in checkpoint.tensors.items()}
        for (network, key), parts in _layers(path, stored, checkpoint).items():
            tensor = tensors[network][key]
            scale = lora.weight * _scale(path, key, parts, configs.get(network, {}))
            update = _update(path, parts, scale, tensor)
            tensors[network][key] = replace(tensor, updates=(*tensor.updates, update))
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


def _layers(
    path: Path, stored: Mapping[str, StoredTensor], checkpoint: Checkpoint
) -> dict[tuple[str, str], dict[str, StoredTensor]]:
    """Returns each weight's parts, by network and key: "down", "up", perhaps "mid" and "alpha"."""
    for key, (pattern, what) in ((key, other) for key in stored for other in OTHERS.items()):
        if re.search(pattern, key):
            raise InputError(
                f"lora {path} is {what} ({key}), which is not supported; use a plain LoRA"
            )
    names = {network: _names(checkpoint, network) for network in checkpoint.networks}
    layers: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    unknown = []
    for key, tensor in stored.items():
        found = KEY.fullmatch(key)
        place = found and _place(found["layer"], names)
        if not place:
            unknown.append(key)
            continue
        part = PARTS.get(found["part"], found["part"])
        if part in layers.setdefault(place, {}):
            raise InputError(f"lora {path}: {key} and {layers[place][part].key} are for one layer")
        layers[place][part] = tensor
        if not np.isfinite(tensor.read()).all():
            raise InputError(f"lora {path}: {key} is not finite; use one from an earlier step")
    if unknown or not layers:
        raise InputError(
            f"lora {path} does not fit {checkpoint.name}: {_misfit(unknown, len(stored), names)}; "
            "use a LoRA that was made for this model"
        )
    return layers


def _names(checkpoint: Checkpoint, network: str) -> dict[str, str]:
    """Returns the keys of a network's layers by each of their names, with underscores."""
    if network not in PREFIXES.values():
        return {}
    keys = {
        key.removesuffix(".weight").replace(".", "_"): key
        for key, tensor in checkpoint.weights(network).items()
        if key.endswith(".weight") and len(tensor.shape) in (2, 4)
    }
    names = dict(keys)
    for new, first in FIRST_NAMES.items():
        names |= {n.removesuffix(new) + first: key for n, key in keys.items() if n.endswith(new)}
    for original, key in checkpoint.family.kohya_names(checkpoint, network).items():
        names[original.removesuffix(".weight").replace(".", "_")] = key
    return names


def _place(layer: str, names: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """Returns the network and key of a layer; without a prefix, of the first network that fits."""
    prefix = next(filter(layer.startswith, PREFIXES), "")
    name = _plain(layer.removeprefix(prefix))
    for network in [PREFIXES[prefix]] if prefix else names:
        if name in names.get(network, {}):
            return network, names[network][name]
    return None


def _plain(layer: str) -> str:
    layer = layer.removeprefix(PEFT_PREFIX).replace(".processor", "").replace(".", "_")
    return layer.removeprefix(TEXT_PREFIX.replace(".", "_"))


def _misfit(unknown: list[str], count: int, names: Mapping[str, Mapping[str, str]]) -> str:
    """Describes which keys fit no layer, and the layer whose name is nearest to the first."""
    if not unknown:
        return "it is empty"
    found = KEY.fullmatch(unknown[0])
    name = _plain(found["layer"] if found else unknown[0])
    every = {name: f"{network}.{key}" for network in names for name, key in names[network].items()}
    near = difflib.get_close_matches(name, every, n=1)
    nearest = f", nearest to {every[near[0]]}" if near else ""
    return f"{len(unknown)} of its {count} keys fit no layer (the first is {unknown[0]}{nearest})"


def _is_peft(stored: Mapping[str, StoredTensor]) -> bool:
    return any(key.startswith(PEFT_PREFIX) for key in stored)


def _configs(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, dict]:
    """Returns PEFT's config for each network, empty if there is none."""
    networks = dict.fromkeys(PREFIXES.values())
    if _is_peft(stored):
        config = read_json(path.with_name(PEFT_CONFIG))
        return dict.fromkeys(networks, config)
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
        for network in networks
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


def _scale(path: Path, key: str, parts: Mapping[str, StoredTensor], config: dict) -> float:
    """Returns the factor of the product: alpha / rank, or 1 if no alpha is given."""
    rank = parts["down"].shape[0] if "down" in parts and parts["down"].shape else 1
    alpha = _alpha(path, key.removesuffix(".weight"), config)
    alpha = rank if alpha is None else alpha
    if "alpha" in parts:
        alpha = parts["alpha"].read().item() if parts["alpha"].size == 1 else None
    if type(alpha) not in (int, float) or not math.isfinite(alpha) or not rank:
        raise InputError(f"lora {path}: the alpha of {key} is not a number; copy it again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _alpha(path: Path, layer: str, config: dict):
    """Returns a layer's alpha by PEFT's config, None if it has none.

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
        if matches(layer) or matches(TEXT_PREFIX + layer):
            return alpha
    return config.get("lora_alpha")


def _update(
    path: Path, parts: Mapping[str, StoredTensor], scale: float, tensor: StoredTensor
) -> Update:
    """Makes an update, after checking that its parts fit each other and the weight."""
    if not {"down", "up"} <= parts.keys():
        key = next(iter(parts.values())).key
        raise InputError(f"lora {path}: {key} lacks its other half; copy the file again")
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank, core = down.shape[:1], (mid or down).shape
    if up.shape[1:2] != rank or (mid and mid.shape[:2] != rank * 2):
        raise InputError(
            f"lora {path}: {down.key} {list(down.shape)} and {up.key} {list(up.shape)} differ in "
            "rank; copy the file again"
        )
    product = (*up.shape[:1], *down.shape[1:2], *core[2:])
    inner = [up.shape[2:]] + [down.shape[2:]] * (mid is not None)
    if _matrix(product) != _matrix(tensor.shape) or any(map(_matrix, inner)):
        raise InputError(
            f"lora {path} does not fit: {up.key} and {down.key} make {list(product)}, but "
            f"{list(tensor.shape)} is needed; use a LoRA that was made for this model"
        )
    return Update(down, up, mid, scale, tensor.shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without the trailing 1 x 1 of a convolution that is really a matrix."""
    return shape[:-2] if shape[-2:] == (1, 1) else shape
