"""Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598).

Both predictions come from one evaluation of the network on a batch that holds each image twice,
side by side, so that an image's pair stays on one device when the batch is split over several. They
are three where an image guides, too (Brooks et al., 2023, arXiv:2211.09800, section 3.2).
"""

import jax.numpy as jnp
from jax import Array


def paired(*each: Array) -> Array:
    """Interleaves two arrays [batch, ...], or more, to [2 batch, ...]: u0, c0, u1, c1, ..."""
    pairs = jnp.stack(each, axis=1)
    return pairs.reshape(-1, *each[0].shape[1:])


def guide(
    output: Array,
    scale: Array,
    rescale: Array | float | None = None,
    *,
    norm_patch: int | None = None,
    image_scale: Array | None = None,
) -> Array:
    """Combines each pair of predictions into the guided one.

    Args:
      output: [2 batch, ...], in the order of `paired`; [3 batch, ...] with `image_scale`: without
        the prompt and the image, with the image, and with both.
      scale: [batch]; 1 gives the conditional prediction, larger values go beyond it.
      rescale: [batch] or a number, phi of Lin et al., 2024, arXiv:2305.08891, section 3.4:
        how far each image's standard deviation is brought back to the conditional prediction's, to
        prevent overexposure; None or 0.0 leaves it unchanged.
      norm_patch: the side of the patches in each of which the norm is brought back to the
        conditional prediction's, for [batch, h, w, c] (Qwen-Image's pipeline); None for none.
      image_scale: [batch], how closely the image is followed; None if no image guides.

    Returns:
      [batch, ...]: unconditional + scale (conditional - unconditional), rescaled; with an image,
      unconditional + scale (conditional - image) + image_scale (image - unconditional).
    """
    count = 2 if image_scale is None else 3
    unconditional, *image, conditional = output.reshape(-1, count, *output.shape[1:]).swapaxes(0, 1)
    without_prompt = image[0] if image else unconditional
    ones = [1] * (unconditional.ndim - 1)
    guided = unconditional + scale.reshape(-1, *ones) * (conditional - without_prompt)
    if image_scale is not None:
        guided = guided + image_scale.reshape(-1, *ones) * (without_prompt - unconditional)
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
