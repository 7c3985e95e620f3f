"""GGUF files: weights in blocks of few bits, as ComfyUI-GGUF and others write them. Imports no JAX.

The format (github.com/ggml-org/ggml, docs/gguf.md) is read with its authors' library, the extra
`gguf`. Weights are restored as they are read; `--weights` keeps them in 8 bits.
"""

from pathlib import Path

import numpy as np

from jaxdiff.checkpoint.tensors import FLOATS, StoredTensor
from jaxdiff.errors import InputError

SUFFIX = ".gguf"


class BlockTensor(StoredTensor):
    """A weight in a GGUF file; `dtype` is the name of its type of blocks, such as "Q8_0"."""

    @property
    def is_float(self) -> bool:
        """Whether it is stored as floating-point numbers, or can be restored to them."""
        return True

    def _bytes(self, count: int) -> int:
        import gguf

        size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.dtype]]
        if count % size:
            raise ValueError(f"cannot cut a block of {self}")
        return count // size * block_bytes

    def _flat(self, count: int) -> np.ndarray:
        import gguf

        held = self._bytes(count)
        stored = np.fromfile(self.file, np.uint8, held, offset=self.offset)
        if stored.size != held:  # which `read` reports
            return np.empty(0, np.float32)
        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[self.dtype])


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Returns the location of each weight of a GGUF file by its key; reads no weights.

    Raises:
      InputError: if the library is missing, the file is not whole, or a type is not supported.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(f"{path} needs the library gguf: pip install 'jaxdiff[gguf]'") from None
    try:
        found = gguf.GGUFReader(path).tensors
    except OSError:
        raise
    except Exception as error:  # of many types, depending on what is wrong with the file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} is no whole GGUF file ({reason}); copy it again") from error
    tensors = {}
    for each in found:
        kind = each.tensor_type.name
        if kind not in FLOATS and not _restores(each.tensor_type):
            raise InputError(
                f"{path}: {each.name} is stored as {kind}, which cannot be restored; use a file of "
                "another type, such as Q8_0 or Q4_K"
            )
        of = StoredTensor if kind in FLOATS else BlockTensor
        shape = tuple(map(int, each.shape[::-1]))  # GGUF has the last axis first
        tensors[each.name] = of(path, each.name, kind, shape, int(each.data_offset))
    return tensors


def _restores(kind) -> bool:
    """Checks whether the library can restore a type of blocks."""
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros(size, np.uint8), kind)
    except NotImplementedError:
        return False
    return True
