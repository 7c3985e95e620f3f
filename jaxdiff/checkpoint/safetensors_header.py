"""The header of a safetensors file, read without trusting a number in it. Imports no JAX.

The format (https://huggingface.co/docs/safetensors): eight little-endian bytes with the length of
a JSON header, the header, then the tensors' bytes without a gap.
"""

import json
import math
from pathlib import Path

from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.errors import InputError

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1},
}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of the safetensors file at `path`.

    Returns:
      each tensor's name, with where it lies in the file.

    Raises:
      InputError: if the file is no safetensors file, or not exactly as long as its header says.
    """
    text, file_bytes = _text(path)
    try:
        tensors = json.loads(text)
        tensors.pop(METADATA, None)
        end = _check_offsets(tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a broken safetensors header; copy it again") from error
    expected = 8 + len(text) + end
    if file_bytes != expected:
        raise InputError(
            f"{path} has {file_bytes} bytes where its header promises {expected}; copy it again"
        )
    return {
        name: StoredTensor(
            file=path,
            key=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            offset=8 + len(text) + entry["data_offsets"][0],
        )
        for name, entry in tensors.items()
    }


def read_metadata(path: Path) -> dict:
    """What a file whose header has been read says of itself: texts by name, if it keeps the rules.

    Raises:
      InputError: if it cannot be read any more.
    """
    metadata = json.loads(_text(path)[0]).get(METADATA)
    return metadata if isinstance(metadata, dict) else {}


def _text(path: Path) -> tuple[bytes, int]:
    """The header's JSON, and the size of the file in bytes."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise InputError(f"{path} is no safetensors file, or is cut short; copy it again")
            return file.read(header_bytes), file_bytes
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the checkpoint again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def _check_offsets(tensors: dict) -> int:
    """Raises ValueError unless the tensors lie end to end; returns where the last one ends."""
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry["data_offsets"]):
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("a size or an offset is not a whole number")
        if start != end or stop - start != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError("a tensor's offsets do not fit its shape")
        end = stop
    return end
