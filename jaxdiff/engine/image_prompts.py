"""Encodes image prompts on the devices, with an LRU cache."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.devices import compilation, parallel
from jaxdiff.families.model import ImageAdapter
from jaxdiff.weights.load import StoredNetwork

# Images are encoded in batches of this size on each device, so that an image's prompt depends
# neither on the others nor on the size of the image batches.
BATCH = 4
CACHED_BYTES = 2**28  # of prompts, on each device


class ImagePromptEncoder:
    """An IP-Adapter and its image encoder."""

    def __init__(
        self,
        adapter: ImageAdapter,
        stored: tuple[StoredNetwork, StoredNetwork],
        dtype,
        mesh: jax.sharding.Mesh,
    ):
        """Prepares the networks; `load` reads their weights.

        Args:
          adapter: the networks.
          stored: the weights of the adapter and of its encoder in their files.
          dtype: of the arithmetic.
          mesh: the devices.
        """
        self.adapter = adapter
        self._stored, self._mesh = stored, mesh
        encode = partial(adapter.encode, dtype=dtype)
        self._encode = compilation.jit(parallel.over_data(encode, mesh, (None, None, 0)))
        self._nothing = compilation.jit(partial(adapter.negative, dtype=dtype))
        self._programs: dict[str, Future[jax.stages.Compiled]] = {}
        self._cache: dict[bytes, Any] = {}

    def load(self) -> None:
        """Reads the weights; after that, images can be encoded."""
        self._params = [stored.load() for stored in self._stored]
        self._negative = self._nothing(*self._params)

    def compile(self) -> None:
        """Starts compiling the encoder; returns at once."""
        if not self._programs:
            self._programs["encode"] = compilation.ahead(self._encode, *self._abstract_arguments())

    def abstract(self) -> Any:
        """Returns the shapes of one image's prompt."""
        batch = jax.eval_shape(self._encode, *self._abstract_arguments())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)

    def negative(self, count: int) -> Any:
        """Returns the prompts of the unguided half, for `count` images."""
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), self._negative)

    def __call__(self, images: Sequence[np.ndarray]) -> Any:
        """Returns the prompts of images, a tree of arrays [images, ...].

        Args:
          images: uint8 [size, size, 3], as `centre_of_resized` returns them.
        """
        self.compile()
        names = [hashlib.blake2b(image, digest_size=16).digest() for image in images]
        found = {name: self._cache.pop(name) for name in set(names) & self._cache.keys()}
        new = {name: image for name, image in zip(names, images, strict=True) if name not in found}
        slots, place = self._slots, parallel.batch_sharding(self._mesh)
        for start in range(0, len(new), slots):
            part = [*new][start : start + slots]
            padded = part + part[-1:] * (slots - len(part))
            pixels = jax.device_put(np.stack([new[name] for name in padded]), place)
            encoded = compilation.wait(self._programs, "encode")(*self._params, pixels)
            for i, name in enumerate(part):
                found[name] = jax.tree.map(lambda array, i=i: array[i], encoded)
        self._cache |= found  # the newest last
        most = CACHED_BYTES // sum(array.nbytes for array in jax.tree.leaves(found[names[0]]))
        while len(self._cache) > max(1, most):
            del self._cache[next(iter(self._cache))]
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *(found[name] for name in names))

    @property
    def _slots(self) -> int:
        return BATCH * self._mesh.shape["data"]

    def _abstract_arguments(self) -> tuple:
        size = self.adapter.size
        pixels = jax.ShapeDtypeStruct(
            (self._slots, size, size, 3),
            np.uint8,
            sharding=parallel.batch_sharding(self._mesh),
        )
        return *(stored.places for stored in self._stored), pixels
