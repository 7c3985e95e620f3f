"""A second task for a denoiser that learns the shapes world: to tell where each shape lies.

The U-Net's last convolution gets a channel for every shape, which is taught from noisy latents and
the caption, as the noise is, and left out of what is exported. What an image shows is then asked
at every place and at every noise level, not only how it looks; alignment with another network's
features does as much for photographs (Yu et al., 2024, arXiv:2410.06940).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.families.model import Denoiser
from jaxdiff.training.components import Components
from jaxdiff.training.loop import Params
from jaxdiff.weights.load import abstract_network
from jaxdiff.worlds.shapes import SHAPES, Scene
from jaxdiff.worlds.shapes.scene import CANVAS

WIDTH = 1 / 4  # of a blob over its object's: so narrow that neighbours stay apart
SCALE = 16.0  # brings the maps' variance near 1, that of latents


def maps(scenes: Sequence[Scene], side: int) -> np.ndarray:
    """Where each shape lies: a Gaussian blob at each object, in its shape's channel.

    Returns:
      float32 [scenes, side, side, shapes], 0 to 1.
    """
    centres = (np.arange(side, dtype=np.float32) + 0.5) * (CANVAS / side)
    found = np.zeros((len(scenes), side, side, len(SHAPES)), np.float32)
    for map_, scene in zip(found, scenes, strict=True):
        for thing in scene.objects:
            squares = (centres[None] - thing.x) ** 2 + (centres[:, None] - thing.y) ** 2
            blob = np.exp(-squares / (WIDTH * thing.size) ** 2)
            channel = map_[..., SHAPES.index(thing.shape)]
            np.maximum(channel, blob, out=channel)
    return found


def widened_denoiser(parts: Components, remat: bool) -> Denoiser:
    """The U-Net with a channel for every shape beside its own."""
    component = parts.model.denoiser.component
    config = parts.model.configs[component]
    wide = replace(config, out_channels=config.out_channels + len(SHAPES))
    module = partial(parts.family.module(component, wide), remat=remat)
    graph, _ = abstract_network(module, wide)

    def evaluate(params, latents, timesteps, conditioning, guidance_scale, kept):
        unet = nnx.merge(graph, params)
        return unet.evaluate(latents, timesteps, deep=kept, **conditioning._asdict())

    return parts.model.denoiser._replace(evaluate=evaluate)


def widened(unet: Params) -> Params:
    """The U-Net's parameters with those channels, which say nothing yet."""

    def wider(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, len(SHAPES))])

    return _with_last(unet, wider)


def narrowed(unet: Params) -> Params:
    """The U-Net's own parameters: the inverse of `widened`."""
    return _with_last(unet, lambda leaf: leaf[..., : -len(SHAPES)])


def _with_last(unet: Params, change) -> Params:
    return {**unet, "conv_out": {name: change(leaf) for name, leaf in unet["conv_out"].items()}}


def errors(told: Array, wanted: Array) -> Array:
    """The mean squared error of each image's maps.

    Args:
      told: what the further channels say, [batch, side, side, shapes].
      wanted: `maps`.
    """
    return jnp.mean((told.astype(jnp.float32) - SCALE * wanted) ** 2, axis=(1, 2, 3))
