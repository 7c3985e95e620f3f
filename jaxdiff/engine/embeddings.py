"""An LRU cache of what encoders make of prompts and images."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdiff.devices import parallel

CACHED_BYTES = 2**28  # in each cache, on each device
HELD_BYTES = 2**31  # in each cache in the host's memory


def digest(array: np.ndarray) -> bytes:
    """Returns a digest of an array's shape and bytes, by which an image is known."""
    return hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=16).digest()


class EmbeddingCache:
    """Encodes what it does not know yet, and remembers the newest."""

    def __init__(self, mesh: jax.sharding.Mesh, *, on_host: bool = False):
        """Makes an empty cache of arrays on `mesh`, or of NumPy arrays if `on_host`."""
        self._mesh, self._on_host = mesh, on_host
        self._cache: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._cache)

    def most(self, embedding: Any) -> int:
        """Returns how many embeddings like this one, a tree of arrays or shapes, are kept."""
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(embedding))
        return (HELD_BYTES if self._on_host else CACHED_BYTES) // sum(sizes)

    def knows(self, names: Iterable[Hashable]) -> bool:
        """Checks whether nothing of these names needs to be encoded."""
        return self._cache.keys() >= {*names}

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
        self._cache |= found  # the newest last
        new = [name for name in items if name not in found]
        for start in range(0, len(new), slots):
            part = new[start : start + slots]
            encoded = encode([items[name] for name in part])
            if not parallel.may_run_ahead(self._mesh):
                jax.block_until_ready(encoded)
            for i, name in enumerate(part):
                one = jax.tree.map(lambda array, i=i: array[i], encoded)
                found[name] = self._cache[name] = jax.device_get(one) if self._on_host else one
        most = self.most(next(iter(found.values())))
        while len(self._cache) > most:
            del self._cache[next(iter(self._cache))]
        return found
