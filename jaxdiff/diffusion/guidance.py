"""Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598).

Both predictions come from one evaluation of the network on a batch that holds each image twice,
side by side, so that an image's pair stays on one device when the batch is split over several.
"""

import jax.numpy as jnp
from jax import Array


def paired(unconditional: Array, conditional: Array) -> Array:
    """Interleaves two arrays [batch, ...] to [2 batch, ...]: u0, c0, u1, c1, ..."""
    pairs = jnp.stack([unconditional, conditional], axis=1)
    return pairs.reshape(-1, *unconditional.shape[1:])


def guide(
    output: Array,
    scale: Array,
    rescale: Array | float | None = None,
    *,
    norm_patch: int | None = None,
) -> Array:
    """Combines each pair of predictions into the guided one.

    Args:
      output: [2 batch, ...], in the order of `paired`.
      scale: [batch]; 1 gives the conditional prediction, larger values go beyond it.
      rescale: [batch] or a number, phi of Lin et al., 2024, arXiv:2305.08891, section 3.4:
        how far each image's standard deviation is brought back to the conditional prediction's, to
        prevent overexposure; None or 0.0 leaves it unchanged.
      norm_patch: the side of the patches in each of which the norm is brought back to the
        conditional prediction's, for [batch, h, w, c] (Qwen-Image's pipeline); None for none.

    Returns:
      [batch, ...]: unconditional + scale (conditional - unconditional), rescaled.
    """
    unconditional, conditional = output.reshape(-1, 2, *output.shape[1:]).swapaxes(0, 1)
    ones = [1] * (unconditional.ndim - 1)
    guided = unconditional + scale.reshape(-1, *ones) * (conditional - unconditional)
    if norm_patch is not None:
        guided = guided * _patch_norms(conditional, norm_patch) / _patch_norms(guided, norm_patch)
    if rescale is None or (isinstance(rescale, float) and rescale == 0.0):
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
    return guided * (1.0 + jnp.reshape(rescale, (-1, *ones)) * (ratio - 1.0))


def _patch_norms(x: Array, patch: int) -> Array:
    """Returns the norm of each patch of [batch, h, w, c], at all its places: [batch, h, w, 1]."""
    batch, height, width, _ = x.shape
    patches = x.reshape(batch, height // patch, patch, width // patch, patch, -1)
    norms = jnp.sqrt(jnp.square(patches).sum(axis=(2, 4, 5)))
    return jnp.repeat(jnp.repeat(norms, patch, axis=1), patch, axis=2)[..., None]
