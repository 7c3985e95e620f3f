"""What the tables of original names share. Imports no JAX.

A table is a function of a network's config. It pairs every key that the network has in diffusers or
transformers with its key in the file, so missing and unknown keys are always found. Single files
are read with these tables, and LoRA files may name layers by them. A config may lack keys that old
versions of diffusers did not write.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxdiff.checkpoint.tensors import StoredTensor
from jaxdiff.errors import InputError

# The key in diffusers or transformers, the key in the file, and the function that converts the
# file's tensor (None: no conversion). Neither key has the network's prefix.
Names = Iterator[tuple[str, str, Callable[[StoredTensor], StoredTensor] | None]]
Table = Callable[[dict], Names]

PARAMETERS = ("weight", "bias")
WEIGHT = ("weight",)
MOST_BLOCKS = 200  # of one kind, in a network; the largest published ones have about 60


def module(ours: str, theirs: str, parameters: tuple[str, ...] = PARAMETERS) -> Names:
    """Yields the names of a layer's parameters."""
    for parameter in parameters:
        yield f"{ours}.{parameter}", f"{theirs}.{parameter}", None


def swapped(ours: str, theirs: str, parameters: tuple[str, ...] = PARAMETERS) -> Names:
    """Yields the names of a modulation: (shift, scale) in the file, (scale, shift) in diffusers."""
    for parameter in parameters:
        yield f"{ours}.{parameter}", f"{theirs}.{parameter}", StoredTensor.swap


def fused(ours: str, theirs: str, parameters: tuple[str, ...] = PARAMETERS) -> Names:
    """Yields the names of queries, keys and values that are one layer in the file.

    Args:
      ours: our layers, with "*" for "q", "k" or "v".
      theirs: the file's layer.
      parameters: those of each layer.
    """
    for parameter in parameters:
        yield from thirds(f"{ours}.{parameter}", f"{theirs}.{parameter}")


def thirds(ours: str, theirs: str) -> Names:
    """Yields the keys of queries, keys and values that are one tensor in the file; see `fused`."""
    for third, letter in enumerate("qkv"):
        yield ours.replace("*", letter), theirs, partial(_third, third)


def rows(start: int, stop: int | None) -> Callable[[StoredTensor], StoredTensor]:
    """Returns a function that cuts these rows from a tensor; None stands for the last row."""
    return lambda tensor: tensor.rows(start, tensor.shape[0] if stop is None else stop)


def _third(third: int, tensor: StoredTensor) -> StoredTensor:
    rows, rest = divmod(tensor.shape[0], 3)
    if rest:
        raise ValueError(f"{tensor.shape[0]} rows cannot be split into queries, keys and values")
    return tensor.rows(third * rows, (third + 1) * rows)


@dataclass(frozen=True)
class Shapes:
    """The shapes of a network's tensors in a file, from which its config is found.

    Attributes:
      path: the file.
      name: of the model, for messages.
      prefix: of the network's keys.
      tensors: all of the file's, by key.
    """

    path: Path
    name: str
    prefix: str
    tensors: Mapping[str, StoredTensor]

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.tensors

    def size(self, key: str, axis: int) -> int:
        """Returns the length of an axis; raises InputError if the file does not tell."""
        tensor = self.tensors.get(self.prefix + key)
        if tensor is None or len(tensor.shape) <= axis:
            what = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}"
            raise InputError(
                f"{self.path} does not match {self.name}: {self.prefix}{key} {what}; copy it again"
            )
        return tensor.shape[axis]

    def count(self, blocks: str) -> int:
        """Returns the number of blocks, whose keys begin with `blocks`, a dot and a number.

        Raises:
          InputError: if there are none, or more than `MOST_BLOCKS`.
        """
        pattern = re.compile(rf"{re.escape(self.prefix + blocks)}\.([0-9]{{1,4}})\.")
        found = {match[1] for key in self.tensors if (match := pattern.match(key))}
        if not 0 < len(found) <= MOST_BLOCKS:
            raise InputError(
                f"{self.path} does not match {self.name}: it has {len(found)} {blocks}; copy it "
                "again"
            )
        return len(found)
