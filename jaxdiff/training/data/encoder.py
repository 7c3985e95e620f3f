"""What encodes images and captions once, before a training: a checkpoint's own networks."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.checkpoint.checkpoint import Checkpoint
from jaxdiff.devices import batching, compilation, parallel
from jaxdiff.engine.program import to_float
from jaxdiff.engine.prompts import PromptEncoder
from jaxdiff.families.networks import read_configs
from jaxdiff.models.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.training.data.encoded import EMBEDDINGS, latents_digest, weights_digest
from jaxdiff.weights.load import open_network

ACCELERATOR_PX = 1024 * 1024  # encoded at once; the activations are many times the images


class Encoder:
    """A checkpoint's autoencoder, and its text encoders if captions are to be embedded.

    An image's latents and a caption's embedding do not depend on what they are encoded with.
    """

    def __init__(self, checkpoint: Checkpoint, *, embed: bool):
        """Loads the networks onto this host's devices, in float32.

        Raises:
          InputError: if they cannot be read.
        """
        self._mesh = parallel.make_mesh()
        configs = read_configs(checkpoint)
        config, weights = configs["vae"], checkpoint.weights("vae")
        vae = open_network(AutoencoderKL, config, weights, jnp.float32, self._mesh)
        self._params = vae.load()
        posterior = partial(_posterior, vae.graph, config)
        self._posterior = compilation.jit(
            parallel.over_data(posterior, self._mesh, (None, 0))  # params, pixels
        )
        self.made_with = {"autoencoder": latents_digest(config, self._params)}
        self._prompts = None
        if embed:
            self._prompts = PromptEncoder(
                checkpoint, configs, jnp.float32, self._mesh, clip_skip=0, chunks=1
            )
            self._prompts.load()
            self.made_with["text_encoders"] = weights_digest(self._prompts.params)

    def at_once(self, height: int, width: int) -> int:
        """How many images of a size are encoded at once."""
        if self._mesh.devices.flat[0].platform == "cpu":
            return batching.on_cpu(width, height) * self._mesh.shape["data"]
        most = max(1, ACCELERATOR_PX // (height * width))
        return min(most, batching.MOST) * self._mesh.shape["data"]

    def posterior(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of images' scaled latents.

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

    def embeddings(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Captions as the denoiser is told them, by name, float32 [n, ...]; {} if none are made."""
        if self._prompts is None:
            return {}
        found = self._prompts(captions)
        return {
            name: np.stack([np.asarray(getattr(found[caption], name)) for caption in captions])
            for name in EMBEDDINGS
            if getattr(found[captions[0]], name) is not None
        }


def _posterior(
    graph: nnx.GraphDef, config: AutoencoderKLConfig, params: dict, pixels: Array
) -> tuple[Array, Array]:
    mean, log_variance = nnx.merge(graph, params).encode(to_float(pixels))
    std = jnp.exp(0.5 * log_variance)
    return config.scale(mean), config.scale(std) - config.scale(jnp.zeros_like(std))
