"""An auxiliary task for a denoiser that learns the shapes world: predicting each shape's place.

The denoiser's last layer gets an extra channel for every shape, which predicts the shape's places
from noisy latents and the caption; the exported model does not have it. So the denoiser also
learns what an image shows, everywhere and at all noise levels, not only how it looks; for
photographs, alignment with another network's features has this effect (Yu et al., 2024,
arXiv:2410.06940).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxdiff.families.model import Denoiser
from jaxdiff.training.components import Components
from jaxdiff.training.loop import Params
from jaxdiff.weights.network import abstract_network
from jaxdiff.worlds.shapes import SHAPES, Scene
from jaxdiff.worlds.shapes.scene import CANVAS

WIDTH = 1 / 4  # of a blob, relative to its object: narrow enough to keep neighbours apart
SCALE = 16.0  # scales the maps' variance to about 1, like that of latents


def maps(scenes: Sequence[Scene], side: int) -> np.ndarray:
    """Draws maps of the shapes' places: a Gaussian blob at each object, in its shape's channel.

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
    """Returns the denoiser with an extra output channel for every shape."""
    component, fixed = parts.model.denoiser.component, parts.model.denoiser.fixed
    config = parts.model.configs[component]
    wide = replace(config, out_channels=config.out_channels + len(SHAPES))
    module = partial(parts.family.networks().module(component, wide), remat=remat)
    graph, _ = abstract_network(module, wide)

    def evaluate(params, latents, timesteps, conditioning, guidance_scale, kept):
        named = conditioning if isinstance(conditioning, dict) else conditioning._asdict()
        return nnx.merge(graph, params)(latents, timesteps, **named, **fixed), None

    return parts.model.denoiser._replace(evaluate=evaluate)


def widened(denoiser: Params, channels: int) -> Params:
    """Returns the denoiser's parameters with the extra channels, initialized to zero.

    Args:
      denoiser: the parameters, whose last layer's outputs are the channels of the latents or, for a
        transformer, of each latent of a patch in turn.
      channels: the number of channels.
    """

    def wider(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, len(SHAPES))])

    return _with_last(denoiser, channels, wider)


def narrowed(denoiser: Params, channels: int) -> Params:
    """Returns the denoiser's parameters without the extra channels: the inverse of `widened`."""
    return _with_last(denoiser, channels + len(SHAPES), lambda leaf: leaf[..., :channels])


def _with_last(denoiser: Params, channels: int, change: Callable[[Array], Array]) -> Params:
    """Changes the channels, the last axis of what `change` gets, of the last layer."""
    last = "conv_out" if "conv_out" in denoiser else "proj_out"

    def changed(leaf: Array) -> Array:
        by_channel = change(leaf.reshape(*leaf.shape[:-1], -1, channels))
        return by_channel.reshape(*leaf.shape[:-1], -1)

    return {**denoiser, last: {name: changed(leaf) for name, leaf in denoiser[last].items()}}


def errors(predicted: Array, wanted: Array) -> Array:
    """Returns the mean squared error of each image's maps.

    Args:
      predicted: the output of the extra channels, [batch, side, side, shapes].
      wanted: the maps, as `maps` returns them.
    """
    return jnp.mean((predicted.astype(jnp.float32) - SCALE * wanted) ** 2, axis=(1, 2, 3))
