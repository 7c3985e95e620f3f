"""Writes files of random weights, as large as published ones."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (makes its dtypes known to NumPy by name)
import numpy as np

STORED = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
}
TILE = 2**24 - 3  # random numbers, repeated to fill a tensor; odd, so that few of its rows repeat


def write(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Writes a safetensors file tensor by tensor, because some do not fit into the memory.

    The safetensors library cannot do this. The weights are scaled to keep activations near 1, so
    that nothing overflows.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[key] = {"dtype": STORED[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header)
    text += " " * (-len(text) % 8)  # aligns the tensors to words, because they are memory-mapped
    tile = np.random.default_rng(0).standard_normal(TILE, np.float32)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        for key, shape in shapes.items():
            size = int(np.prod(shape))
            numbers = tile[:size]
            if len(shape) == 1:
                numbers = 0.1 * numbers + (0 if key.endswith("bias") else 1)
            else:
                numbers = numbers / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
            numbers = numbers.astype(dtype)
            for start in range(0, size, TILE):
                numbers[: size - start].tofile(file)
