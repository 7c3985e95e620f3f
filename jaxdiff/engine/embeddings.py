"""An LRU cache of what encoders make of prompts and images."""

import hashlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdiff.devices import parallel

CACHED_BYTES = 2**28  # in each cache, on each device


def digest(array: np.ndarray) -> bytes:
    """Returns a digest of an array's shape and bytes, by which an image is known."""
    return hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=16).digest()


class EmbeddingCache:
    """Encodes what it does not know yet, and remembers the newest."""

    def __init__(self, mesh: jax.sharding.Mesh):
        """Makes an empty cache of arrays on `mesh`."""
        self._mesh = mesh
        self._cache: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._cache)

    def __call__(
        self, items: Mapping[Hashable, Any], slots: int, encode: Callable[[list], Any]
    ) -> dict[Hashable, Any]:
        """Returns the embedding of each item, a tree of arrays.

        Args:
          items: what is encoded, each under a name that no other item ever has.
          slots: how many are encoded at once at most. It must not depend on what else there is, so
            that an item's embedding does not either.
          encode: maps a list of items to a tree of arrays [slots, ...], whose first are theirs.
        """
        found = {name: self._cache.pop(name) for name in items if name in self._cache}
        new = [name for name in items if name not in found]
        for start in range(0, len(new), slots):
            part = new[start : start + slots]
            encoded = encode([items[name] for name in part])
            if not parallel.may_run_ahead(self._mesh):
                jax.block_until_ready(encoded)
            for i, name in enumerate(part):
                found[name] = jax.tree.map(lambda array, i=i: array[i], encoded)
        self._cache |= found  # the newest last
        embedding = next(iter(found.values()))
        most = CACHED_BYTES // sum(array.nbytes for array in jax.tree.leaves(embedding))
        while len(self._cache) > most:
            del self._cache[next(iter(self._cache))]
        return found
