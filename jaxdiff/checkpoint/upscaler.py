"""Recognises GAN upscalers in single files, by their keys alone. Imports no JAX.

A file holds one network, RRDBNet (Wang et al., 2018, arXiv:1809.00219) or SRVGGNetCompact (of
Real-ESRGAN, arXiv:2107.10833), in one of several namings; its config follows from the shapes.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from jaxdiff.checkpoint.component import Component
from jaxdiff.checkpoint.single_file_configs import Contents
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.errors import InputError

NETWORK = "upscaler"
RRDB, COMPACT = "RRDBNet", "SRVGGNetCompact"
COMPONENT = Component(library="diffusers", class_name=RRDB, other_class_names=(COMPACT,))
CONVERT = (
    "import torch, safetensors.torch as s; w = torch.load('IN.pth', weights_only=True); "
    "s.save_file(w.get('params_ema', w.get('params', w)), 'OUT.safetensors')"
)
# The namings of the first ESRGAN, by their first key: patterns and what they are called today.
BLOCK = r"(\d+)\.RDB(\d)\.conv(\d)"
NAMINGS = {
    "RRDB_trunk.0.RDB1.conv1.weight": {
        rf"RRDB_trunk\.{BLOCK}": r"body.\1.rdb\2.conv\3",
        "trunk_conv": "conv_body",
        r"upconv(\d)": r"conv_up\1",
        "HRconv": "conv_hr",
    },
    "model.1.sub.0.RDB1.conv1.0.weight": {
        r"model\.0": "conv_first",
        rf"model\.1\.sub\.{BLOCK}\.0": r"body.\1.rdb\2.conv\3",
        r"model\.1\.sub\.\d+": "conv_body",
        r"model\.3": "conv_up1",
        r"model\.6": "conv_up2",
        r"model\.8": "conv_hr",
        r"model\.10": "conv_last",
    },
}
ACTIVATION = re.compile(r"body\.\d*[13579]\.")  # of SRVGGNetCompact: every second layer
# RRDBNet upscales by 4 what it sees; more channels are the pixels of 2x2 or 4x4 squares.
SCALES = {3: 4, 12: 2, 48: 1}


def contents(path: Path, tensors: Mapping[str, StoredTensor]) -> Contents | None:
    """Returns what an upscaler's file contains; None for another kind of file.

    Raises:
      InputError: if it is an upscaler of a kind that is not supported, or is damaged.
    """
    keys = {key: key for key in tensors}
    for first, renamed in NAMINGS.items():
        if first in tensors:
            keys = {_renamed(key, renamed): key for key in tensors}
    found = {ours: tensors[key] for ours, key in keys.items()}
    if {"conv_first.weight", "body.0.rdb1.conv1.weight"} <= found.keys():
        config = _rrdb(path, found)
    elif {"body.0.weight", "body.2.weight"} <= found.keys():
        config = _compact(path, found)
    else:
        return None
    return Contents(
        index={"_class_name": config["_class_name"], NETWORK: ["", config["_class_name"]]},
        configs={NETWORK: config, "scheduler": {}},
        prefixes={NETWORK: ""},
        tokenizers={},
        name=f"an upscaler ({config['_class_name']})",
        names={NETWORK: lambda _: [(ours, key, None) for ours, key in keys.items()]},
    )


def _renamed(key: str, renamed: Mapping[str, str]) -> str:
    layer, dot, kind = key.rpartition(".")
    for pattern, ours in renamed.items():
        if match := re.fullmatch(pattern, layer):
            return match.expand(ours) + dot + kind
    return key


def _rrdb(path: Path, tensors: Mapping[str, StoredTensor]) -> dict:
    features, channels = _convolution(path, tensors, "conv_first")
    growth, _ = _convolution(path, tensors, "body.0.rdb1.conv1")
    if channels not in SCALES:
        raise InputError(
            f"{path} takes {channels} channels; use an upscaler of RGB images, which takes "
            f"{', '.join(map(str, SCALES))}"
        )
    return {
        "_class_name": RRDB,
        "features": features,
        "growth": growth,
        "blocks": 1 + _last(path, tensors),
        "scale": SCALES[channels],
    }


def _compact(path: Path, tensors: Mapping[str, StoredTensor]) -> dict:
    if not any(ACTIVATION.match(key) for key in tensors):
        raise InputError(
            f"{path} does not say which activations it has; use one with PReLU, as the published "
            "ones are"
        )
    features, channels = _convolution(path, tensors, "body.0")
    last = _last(path, tensors)
    out, _ = _convolution(path, tensors, f"body.{last}")
    scale = math.isqrt(out // 3)
    if channels != 3 or out != 3 * scale**2:
        raise InputError(
            f"{path} turns {channels} channels into {out}; use an upscaler of RGB images"
        )
    return {
        "_class_name": COMPACT,
        "features": features,
        "convs": (last - 2) // 2,
        "scale": scale,
    }


def _last(path: Path, tensors: Mapping[str, StoredTensor]) -> int:
    """Returns the largest N of "body.N."; raises InputError if one before it is missing."""
    numbers = {int(match[1]) for key in tensors if (match := re.match(r"body\.(\d{1,9})\.", key))}
    if len(numbers) != max(numbers) + 1:
        raise InputError(f"{path} lacks some of its layers body.N; download the file again")
    return max(numbers)


def _convolution(path: Path, tensors: Mapping[str, StoredTensor], layer: str) -> tuple[int, int]:
    """Returns the channels that a convolution makes and takes; raises InputError if it is none."""
    tensor = tensors.get(f"{layer}.weight")
    if tensor is None or len(tensor.shape) != 4 or 0 in tensor.shape:
        raise InputError(f"{path}: {layer}.weight is not a convolution's; download the file again")
    return tensor.shape[:2]
