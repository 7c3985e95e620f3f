"""Reads the header of a safetensors file without trusting its numbers. Imports no JAX.

The format (https://huggingface.co/docs/safetensors): eight little-endian bytes with the length of
a JSON header, the header, then the tensors' bytes without gaps.
"""

import json
import math
from pathlib import Path

from jaxdiff import checks
from jaxdiff.checkpoint.regular_file import opened
from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.errors import InputError

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_NAME_CHARACTERS = 300  # names are in messages
MAX_RANK = 8  # the product of a million sizes takes hours
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1},
}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of the safetensors file at `path`.

    Returns:
      the location of each tensor in the file, by its name.

    Raises:
      InputError: if the file is not a safetensors file, or not as long as its header implies.
    """
    text, file_bytes = _text(path)
    try:
        tensors = json.loads(text, object_pairs_hook=checks.without_duplicates)
        tensors.pop(METADATA, None)
        if any(len(name) > MAX_NAME_CHARACTERS for name in tensors):
            raise ValueError("a name is too long")
        end = _check_offsets(tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a broken safetensors header; copy it again") from error
    expected = 8 + len(text) + end
    if file_bytes != expected:
        raise InputError(
            f"{path} has {file_bytes} bytes, but its header implies {expected}; copy it again"
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
    """Returns the metadata of a file whose header has been read: strings by name.

    Raises:
      InputError: if the file can no longer be read.
    """
    metadata = json.loads(_text(path)[0]).get(METADATA)
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, str)}


def _text(path: Path) -> tuple[bytes, int]:
    """Returns the header's JSON and the file's size in bytes."""
    try:
        file_bytes = path.stat().st_size
        with opened(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise InputError(f"{path} is not a safetensors file or is cut off; copy it again")
            return file.read(header_bytes), file_bytes
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the checkpoint again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error


def _check_offsets(tensors: dict) -> int:
    """Returns where the last tensor ends; raises ValueError unless the tensors leave no gaps."""
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: entry["data_offsets"]):
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        if len(shape) > MAX_RANK:
            raise ValueError("a tensor has too many axes")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("a size or an offset is not a whole number")
        if start != end or stop - start != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError("a tensor's offsets do not fit its shape")
        end = stop
    return end
