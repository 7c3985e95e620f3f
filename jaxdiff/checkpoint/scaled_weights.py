"""Reads weights that ComfyUI's files store in 8 bits, each with a scale. Imports no JAX.

Next to `X.weight` there is a number: `X.scale_weight` or, in newer files, `X.weight_scale`. Their
product is the weight. The other keys are for arithmetic in 8 bits, which we do not do.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from jaxdiff.checkpoint.tensors import FLOATS, StoredTensor
from jaxdiff.errors import InputError

SCALES = (".scale_weight", ".weight_scale")
# The scale of a layer's input, in older and newer files, and the mark of older files.
IGNORED = re.compile(r".*\.(scale_input|input_scale)|(.*\.)?scaled_fp8")
FORMAT = ".comfy_quant"  # the mark of a layer in newer files: JSON as bytes
MAX_FORMAT_BYTES = 1000
FORMATS = ("float8_e4m3fn", "float8_e5m2")
WITHOUT_EFFECT = {"format", "full_precision_matrix_mult"}  # on the weight


def with_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors of a file with each scale noted in its weight.

    A scale without a weight is left in its place, where it counts as an unknown tensor.

    Raises:
      InputError: for a scale that is not one finite number, or a layer in another format.
    """
    weights = {key: tensor for key, tensor in stored.items() if not IGNORED.fullmatch(key)}
    for key in [key for key in weights if key.endswith(FORMAT)]:
        _refuse_other_formats(weights.pop(key))
    for ending in SCALES:
        for key in [key for key in weights if key.endswith(ending)]:
            name = f"{key.removesuffix(ending)}.weight"
            if name in weights:
                weights[name] = _scaled(weights[name], weights.pop(key))
    return weights


def _scaled(weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    if scale.size != 1 or scale.dtype not in FLOATS:
        raise InputError(
            f"{scale.file}: {scale.key} {list(scale.shape)} of {scale.dtype} is not one number; "
            "only weights with one scale each are supported"
        )
    if weight.scale is not None:
        raise InputError(f"{scale.file}: {weight.key} has two scales; copy it again")
    number = scale.read().astype(np.float32).item()
    if not math.isfinite(number):
        raise InputError(f"{scale.file}: {scale.key} = {number} is not finite; copy it again")
    return replace(weight, scale=number)


def _refuse_other_formats(mark: StoredTensor) -> None:
    """Raises InputError unless a layer's mark says that only a scale belongs to its weight."""
    try:
        if mark.dtype != "U8" or mark.size > MAX_FORMAT_BYTES:
            raise ValueError("it is not a short text")
        text = np.fromfile(mark.file, np.uint8, mark.size, offset=mark.offset).tobytes()
        said = json.loads(text)
        known = said.keys() <= WITHOUT_EFFECT and said["format"] in FORMATS
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{mark.file}: {mark.key} cannot be read; copy it again") from error
    if not known:
        raise InputError(
            f"{mark.file}: {mark.key} names a format that is not supported (only "
            f"{' and '.join(FORMATS)} are); use a file in one of them or in 16 bits"
        )
