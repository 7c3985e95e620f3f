"""Encodes images to latents on the devices, with an LRU cache."""

from collections.abc import Sequence
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.devices import batching, compilation, parallel
from jaxdiff.devices.programs import Program, wait
from jaxdiff.engine.embeddings import EmbeddingCache, digest
from jaxdiff.engine.program import to_float
from jaxdiff.families.model import Codec


class ImageEncoder:
    """The autoencoder's encoder, with an LRU cache of the latents of images.

    Images are encoded in batches of a size that depends on theirs alone, so that an image's latents
    never depend on the other images of its batch.
    """

    def __init__(self, codec: Codec, places: dict, mesh: jax.sharding.Mesh):
        """Prepares the encoder.

        Args:
          codec: the autoencoder.
          places: the shapes and shardings of its parameters.
          mesh: the devices.
        """
        self._places, self._mesh = places, mesh

        def encode(params: dict, pixels: Array, hidden: Array) -> Array:
            images = jnp.where(hidden[..., None], 0.0, to_float(pixels))
            mean, log_variance = codec.encode(params, images)
            return jnp.stack([mean, jnp.exp(log_variance / 2)], axis=1).astype(jnp.float32)

        def sample(encoded: Array, noise: Array) -> Array:
            return codec.scale(encoded[:, 0] + encoded[:, 1] * noise)

        self._encode = Program(encode, mesh, (None, 0, 0))
        self._sample = compilation.jit(parallel.over_data(sample, mesh, (0, 0)), mesh)
        self._programs: dict[tuple[int, int], Future[jax.stages.Compiled]] = {}
        self._cache = EmbeddingCache(mesh)

    def compile(self, height: int, width: int) -> "Future[jax.stages.Compiled]":
        """Starts compiling the encoder for images of this size; returns its program at once."""
        if (height, width) not in self._programs:
            shape = (self._slots(height, width), height, width)
            arrays = (
                jax.ShapeDtypeStruct(dims, dtype, sharding=parallel.batch_sharding(self._mesh))
                for dims, dtype in (((*shape, 3), np.uint8), (shape, bool))
            )
            self._programs[height, width] = self._encode.compile(self._places, *arrays)
        return self._programs[height, width]

    def __call__(
        self,
        params: dict,
        images: Sequence[np.ndarray],
        noise: Array,
        hidden: Sequence[np.ndarray] | None = None,
    ) -> Array:
        """Encodes a batch of images of one size.

        Args:
          params: the autoencoder's parameters.
          images: each uint8 [height, width, 3].
          noise: standard normal, float32 [batch, h, w, channels]: which sample of each image's
            distribution is drawn (Kingma and Welling, 2014, arXiv:1312.6114, 2.3).
          hidden: bool [height, width] for each image, True where it is made grey; None hides
            nothing.

        Returns:
          scaled latents, float32 [batch, h, w, channels].
        """
        if hidden is None:
            hidden = _nothing(images)
        place = parallel.batch_sharding(self._mesh)
        return self._sample(self._encoded(params, images, hidden), jax.device_put(noise, place))

    def means(self, params: dict, images: Sequence[np.ndarray]) -> Array:
        """Encodes a batch of images of one size to the means of their unscaled latents."""
        return self._encoded(params, images, _nothing(images))[:, 0]

    def _encoded(
        self, params: dict, images: Sequence[np.ndarray], hidden: Sequence[np.ndarray]
    ) -> Array:
        """Returns means and deviations of unscaled latents, float32 [batch, 2, h, w, channels]."""
        height, width, _ = images[0].shape
        self.compile(height, width)
        slots, place = self._slots(height, width), parallel.batch_sharding(self._mesh)

        def encode(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Array:
            padded = pairs + pairs[-1:] * (slots - len(pairs))
            arrays = [np.stack(part) for part in zip(*padded, strict=True)]
            program = wait(self._programs, (height, width))
            return program(params, *jax.device_put(arrays, place))

        names = [*map(_name, images, hidden)]
        pairs = zip(images, hidden, strict=True)
        found = self._cache(dict(zip(names, pairs, strict=True)), slots, encode)
        return jax.device_put(jnp.stack([found[name] for name in names]), place)

    def _slots(self, height: int, width: int) -> int:
        """Returns how many images are encoded at once."""
        return batching.on_cpu(width, height) * self._mesh.shape["data"]


def _nothing(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns masks that hide nothing of the images."""
    return [np.zeros(image.shape[:2], bool) for image in images]


def _name(image: np.ndarray, hidden: np.ndarray) -> tuple[bytes, bytes]:
    """Returns digests of an image and of what is hidden of it."""
    return digest(image), digest(np.packbits(hidden))
