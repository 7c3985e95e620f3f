"""Encodes images and captions once, before training, with a checkpoint's own networks."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.devices import batching, compilation, parallel
from jaxdiff.engine.program import to_float
from jaxdiff.engine.prompts import PromptEncoder
from jaxdiff.families.model import Codec, networks_of
from jaxdiff.families.tokenizers.tokenizer import of_checkpoint
from jaxdiff.training.data.encoded import EMBEDDINGS, latents_digest, weights_digest
from jaxdiff.weights.load import StoredNetwork, open_network

ACCELERATOR_PX = 1024 * 1024  # per batch and device; activations take far more memory than images


class Encoder:
    """A checkpoint's autoencoder, and its text encoders if captions are to be embedded.

    An image's latents and a caption's embedding do not depend on the rest of the batch.
    """

    def __init__(self, checkpoint: Checkpoint, *, embed: bool):
        """Loads the networks onto this host's devices, in float32.

        Raises:
          InputError: if they cannot be read.
        """
        self._mesh = parallel.make_mesh()
        model = networks_of(checkpoint)

        def stored(component: str) -> StoredNetwork:
            network, tensors = model.networks[component], checkpoint.weights(component)
            rules = network.sharding
            return open_network(network.shapes, rules, tensors, jnp.float32, self._mesh)

        codec = model.codec
        self._params = stored(codec.component).load()
        self._posterior = compilation.jit(
            parallel.over_data(partial(_posterior, codec), self._mesh, (None, 0))  # params, pixels
        )
        config = model.configs[codec.component]
        self.made_with = {"autoencoder": latents_digest(config, self._params)}
        self._prompts = None
        if embed:
            self._prompts = PromptEncoder(
                model,
                of_checkpoint(checkpoint),
                {name: stored(name) for name in model.text_encoders},
                jnp.float32,
                self._mesh,
                clip_skip=0,
                chunks=1,
            )
            self._prompts.load()
            self.made_with["text_encoders"] = weights_digest(self._prompts.params)

    def at_once(self, height: int, width: int) -> int:
        """Returns the batch size for images of a size."""
        if self._mesh.devices.flat[0].platform == "cpu":
            return batching.on_cpu(width, height) * self._mesh.shape["data"]
        most = max(1, ACCELERATOR_PX // (height * width))
        return min(most, batching.MOST) * self._mesh.shape["data"]

    def posterior(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes mean and standard deviation of the images' scaled latents.

        Args:
          pixels: uint8 [n, height, width, 3], n at most `at_once`.

        Returns:
          two arrays, float32 [n, h, w, channels].
        """
        count, height, width, _ = pixels.shape
        missing = self.at_once(height, width) - count
        padded = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
        padded = jax.device_put(padded, parallel.batch_sharding(self._mesh))
        mean, std = self._posterior(self._params, padded)
        return np.asarray(mean)[:count], np.asarray(std)[:count]

    def embeddings(
        self, captions: Sequence[str], *, negative: bool = False
    ) -> dict[str, np.ndarray]:
        """Embeds captions for the denoiser: arrays [n, ...] by name, or {} without `embed`."""
        if self._prompts is None:
            return {}
        found = self._prompts(captions, negative=negative)
        return {
            name: np.stack([np.asarray(getattr(text, name)) for text in found])
            for name in EMBEDDINGS
            if getattr(found[0], name) is not None
        }


def _posterior(codec: Codec, params: dict, pixels: Array) -> tuple[Array, Array]:
    mean, log_variance = codec.encode(params, to_float(pixels))
    std = jnp.exp(0.5 * log_variance)
    return codec.scale(mean), codec.scale(std) - codec.scale(jnp.zeros_like(std))
