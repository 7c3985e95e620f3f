"""Lets ControlNets steer a denoiser (Zhang et al., 2023, arXiv:2302.05543)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxdiff.diffusion import guidance
from jaxdiff.families.model import Control
from jaxdiff.weights.quantization import restored

# Maps (latents [b, h, w, c], timestep, the prompts' conditioning, that of the whole step, whose
# batch is twice as large if it is guided) to the sum of what the nets add to the denoiser's layers.
Steer = Callable[[Array, Array, Any, Any], Any]


def steer(
    controls: Sequence[Control],
    weights: Sequence[dict],
    inputs: Sequence[tuple[Array, ...]],
    guidance_scale: Array,
    guesses: bool,
) -> Steer:
    """Returns the function that evaluates all nets and adds up their scaled residuals.

    Args:
      controls, weights: the nets and their parameters, which may be quantised.
      inputs: for each net, what it sees and how strongly it steers, as in `Inputs.controls`.
      guidance_scale: [batch], for nets that take it.
      guesses: whether each net steers only the prompt's half of a guided step, and its outer layers
        less than the deeper ones.
    """

    def steer(latents: Array, timestep: Array, positive: Any, conditioning: Any) -> Any:
        batch = len(latents)
        guided = len(jax.tree.leaves(conditioning)[0]) == 2 * batch

        def residuals(net: Control, params: dict, seen: Array, scales: Array, *modes: Array) -> Any:
            union = {}
            if net.is_union:
                scales, weights = _scales_and_weights(scales)
                union = {"modes": modes[0], "weights": weights}
            if not net.sees_latents:
                seen = seen.astype(jnp.float32) / 255.0
            halved = guided and (guesses or net.is_pooled)
            x, given = latents, positive
            if guided and not halved:
                x, seen = guidance.paired(latents, latents), guidance.paired(seen, seen)
                given, scales = conditioning, guidance.paired(scales, scales)
                union = {name: guidance.paired(array, array) for name, array in union.items()}
            options = {"guidance_scale": guidance_scale} if net.guidance_is_input else {}
            times = jnp.full(len(x), timestep)
            params = restored(params, latents.dtype, after=latents)
            found = net.evaluate(params, x, times, given, seen, **options, **union)
            leaves, structure = jax.tree.flatten(found)
            weights = jnp.ones(len(leaves))
            if guesses and not net.is_pooled:
                weights = jnp.logspace(-1, 0, len(leaves))
            leaves = [
                (leaf * jnp.expand_dims(weight * scales, range(1, leaf.ndim))).astype(leaf.dtype)
                for leaf, weight in zip(leaves, weights, strict=True)
            ]
            if halved:
                leaves = [guidance.paired(jnp.zeros_like(leaf), leaf) for leaf in leaves]
            return jax.tree.unflatten(structure, leaves)

        each = [
            residuals(net, params, *given)
            for net, params, given in zip(controls, weights, inputs, strict=True)
        ]
        return jax.tree.map(lambda *leaves: sum(leaves), *each)

    return steer


def _scales_and_weights(scales: Array) -> tuple[Array, Array]:
    """Returns how strongly a union net steers, [batch], and its images' weights, [batch, images].

    As in diffusers, one image's scale is that of the net; several images are weighed by theirs.
    """
    if scales.shape[1] == 1:
        return scales[:, 0], jnp.ones_like(scales)
    return jnp.ones_like(scales[:, 0]), scales
