"""One tensor of a file: where its bytes are and how to read them. Imports no JAX."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdiff.errors import InputError

FLOATS = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
SHOWN = 4  # keys of each kind that an error lists


@dataclass(frozen=True)
class StoredTensor:
    """A weight in a safetensors or GGUF file, whose bytes only `read` reads.

    Attributes:
      file: the file.
      key: the tensor's name in it.
      dtype: the format's name for it: "F16", "BF16", "F32", "F64", ...
      shape: the shape of the array that `read` returns.
      offset: in bytes, from the start of the file to the first element.
      transposed: whether the file holds the axes in reverse order.
      swapped: whether the file holds the second half of the first axis before the first half.
      taps: how many times as much the file holds, of which `last_tap` reads the last.
      scale: what the stored numbers are multiplied by, in float32; None: they are the weight.
      updates: objects whose `read` returns float32 of this shape, to add to the stored weight.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    transposed: bool = False
    swapped: bool = False
    taps: int = 1
    scale: float | None = None
    updates: tuple[Any, ...] = ()

    @property
    def _reordered(self) -> bool:
        return self.transposed or self.swapped or self.taps > 1

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it is stored as floating-point numbers."""
        return self.dtype in FLOATS

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Returns a slice along the first axis, so that only these rows are read."""
        if self._reordered or not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"cannot slice rows {start} to {stop} of {self}")
        shape = (stop - start, *self.shape[1:])
        begin = self._bytes(start * math.prod(self.shape[1:]))
        return replace(self, shape=shape, offset=self.offset + begin)

    def reshape(self, *shape: int) -> "StoredTensor":
        """Returns the same elements, in the same order, in another shape."""
        if self._reordered or math.prod(shape) != self.size:
            raise ValueError(f"cannot reshape {self} to {shape}")
        return replace(self, shape=shape)

    def swap(self) -> "StoredTensor":
        """Returns the tensor with the halves of its first axis in the other order."""
        if self._reordered or not self.shape or self.shape[0] % 2:
            raise ValueError(f"cannot swap the halves of {self}")
        return replace(self, swapped=True)

    def last_tap(self) -> "StoredTensor":
        """Returns the last of the third axis of a kernel, [out, in, time, h, w]: one frame's."""
        if self._reordered or len(self.shape) != 5:
            raise ValueError(f"{self} has no axis of time")
        out_size, in_size, taps, *rest = self.shape
        return replace(self, shape=(out_size, in_size, *rest), taps=taps)

    def transpose(self) -> "StoredTensor":
        """Returns the tensor with its axes in reverse order."""
        if self.swapped or self.taps > 1:
            raise ValueError(f"cannot transpose {self}")
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def read(self) -> np.ndarray:
        """Reads only this tensor's bytes; returns a view with other strides if it is transposed.

        With a scale or updates, its numbers are float32. The file is not memory-mapped, because
        mapped pages would count as resident memory.

        Raises:
          InputError: if it is not stored as floating-point numbers, or the file has changed.
        """
        tensor = self._stored()
        if self.swapped:
            tensor = np.roll(tensor, len(tensor) // 2, axis=0)
        if self.scale is not None:
            tensor = tensor.astype(np.float32) * np.float32(self.scale)
        for update in self.updates:
            tensor = tensor.astype(np.float32, copy=False) + update.read()
        return tensor

    def _stored(self) -> np.ndarray:
        if not self.is_float:
            raise InputError(
                f"{self.file}: {self.key} is stored as {self.dtype}; only {', '.join(FLOATS)} "
                "are supported"
            )
        try:
            held = self.size * self.taps
            flat = self._flat(held)
        except OSError as error:
            raise InputError(f"{self.file} cannot be read ({error.strerror})") from error
        if flat.size != held:
            raise InputError(f"{self.file} was truncated while it was read; copy it again")
        if self.taps > 1:
            return flat.reshape(*self.shape[:2], self.taps, *self.shape[2:])[:, :, -1]
        return flat.reshape(self.shape[::-1]).T if self.transposed else flat.reshape(self.shape)

    def _bytes(self, count: int) -> int:
        """Returns how many bytes the first `count` elements take in the file."""
        return count * FLOATS[self.dtype].itemsize

    def _flat(self, count: int) -> np.ndarray:
        """Reads `count` elements, or fewer at the end of the file."""
        return np.fromfile(self.file, FLOATS[self.dtype], count, offset=self.offset)


class Identity(StoredTensor):
    """An identity matrix that a file leaves out; its offset means nothing."""

    def _stored(self) -> np.ndarray:
        return np.eye(*self.shape, dtype=np.float32)


def describe_misfits(faults: dict[str, Collection[str]]) -> str:
    """Lists keys by what is wrong with them: "2 missing (a, b); 1 unknown (c)", or ""."""
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:SHOWN])}{', ...' * (len(keys) > SHOWN)})"
        for kind, keys in faults.items()
        if keys
    )
