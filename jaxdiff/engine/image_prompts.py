"""Encodes image prompts on the devices, with an LRU cache."""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.devices import compilation, parallel
from jaxdiff.devices.programs import Program, wait
from jaxdiff.engine.embeddings import EmbeddingCache, digest
from jaxdiff.families.model import ImageAdapter
from jaxdiff.weights.load import StoredNetwork

# Images are encoded in batches of this size on each device, so that an image's prompt depends
# neither on the others nor on the size of the image batches.
BATCH = 4


class ImagePromptEncoder:
    """An IP-Adapter and its image encoder.

    Attributes:
      adapter: the networks.
      mesh: the devices that encode.
    """

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
        self._stored, self.mesh = stored, mesh
        encode = partial(adapter.encode, dtype=dtype)
        self._encode = Program(encode, mesh, (None, None, 0))
        self._nothing = compilation.jit(partial(adapter.negative, dtype=dtype), mesh)
        self._programs: dict[str, Future[jax.stages.Compiled]] = {}
        self._cache = EmbeddingCache(mesh)

    @property
    def device_bytes(self) -> int:
        """How much memory the weights take on each device."""
        return sum(stored.device_bytes for stored in self._stored)

    def load(self) -> None:
        """Reads the weights; after that, images can be encoded."""
        self._params = [stored.load() for stored in self._stored]
        self._negative = self._nothing(*self._params)

    def compile(self) -> "Future[jax.stages.Compiled]":
        """Starts compiling the encoder; returns its program at once."""
        if not self._programs:
            self._programs["encode"] = self._encode.compile(*self._abstract_arguments())
        return self._programs["encode"]

    def abstract(self) -> Any:
        """Returns the shapes of one image's prompt."""
        batch = self._encode.result(*self._abstract_arguments())
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

        def encode(images: list[np.ndarray]) -> Any:
            padded = images + images[-1:] * (self._slots - len(images))
            pixels = jax.device_put(np.stack(padded), parallel.batch_sharding(self.mesh))
            return wait(self._programs, "encode")(*self._params, pixels)

        names = [*map(digest, images)]
        found = self._cache(dict(zip(names, images, strict=True)), self._slots, encode)
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *(found[name] for name in names))

    @property
    def _slots(self) -> int:
        return BATCH * self.mesh.shape["data"]

    def _abstract_arguments(self) -> tuple:
        size = self.adapter.size
        pixels = jax.ShapeDtypeStruct(
            (self._slots, size, size, 3),
            np.uint8,
            sharding=parallel.batch_sharding(self.mesh),
        )
        return *(stored.places for stored in self._stored), pixels
