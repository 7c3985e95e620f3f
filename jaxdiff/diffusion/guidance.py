"""Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598).

Both predictions come from one evaluation of the network on a batch in which each image stands
twice, side by side: so an image's pair stays on one device when the batch is split over several.
"""

import jax.numpy as jnp
from jax import Array


def paired(unconditional: Array, conditional: Array) -> Array:
    """[batch, ...] twice to [2 batch, ...]: u0, c0, u1, c1, ..."""
    pairs = jnp.stack([unconditional, conditional], axis=1)
    return pairs.reshape(-1, *unconditional.shape[1:])


def guide(output: Array, scale: Array) -> Array:
    """Mixes the pairs of predictions.

    Args:
      output: [2 batch, ...], in the order of `paired`.
      scale: [batch]; 1 gives the conditional prediction, more goes beyond it.

    Returns:
      [batch, ...]: unconditional + scale (conditional - unconditional).
    """
    unconditional, conditional = output.reshape(-1, 2, *output.shape[1:]).swapaxes(0, 1)
    scale = scale.reshape(-1, *[1] * (unconditional.ndim - 1))
    return unconditional + scale * (conditional - unconditional)
