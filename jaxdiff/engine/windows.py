"""Denoises latents in windows, fused in every step (Bar-Tal et al., 2023, arXiv:2302.08113)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.diffusion.sampling import Denoiser
from jaxdiff.images import tiles
from jaxdiff.images.tiles import Tiling

Crop = Callable[[Array], Array]  # maps arrays [..., k h, k w, c] to the part in a window


def fused(of_window: Callable[[Crop], Denoiser], tiling: Tiling | None) -> Denoiser:
    """Makes a denoiser whose estimate of x_0 is the weighted mean of those in all windows.

    A step of a sampler is linear in the estimate, so this is the mean of the windows' steps, the
    paper's equation 5. Where windows overlap, they fade into each other.

    Args:
      of_window: makes the denoiser of a window; its argument crops what belongs to the latents.
      tiling: the windows, in latents; None for one that shows them whole.
    """
    if tiling is None:
        return of_window(lambda array: array)
    height, width = tiling.height, tiling.width
    down, across = (
        tiles.weights(starts, side, overlap=side // tiles.SHARED, margin=0)
        for starts, side in ((tiling.tops, height), (tiling.lefts, width))
    )
    places = [*tiling.places]
    windows = {
        "top": np.array([tiling.tops[row] for row, _ in places]),
        "left": np.array([tiling.lefts[column] for _, column in places]),
        "weight": np.stack([np.outer(down[row], across[column]) for row, column in places]),
    }

    def denoise(
        x: Array, timestep: Array, alpha: Array, sigma: Array, kept: Any
    ) -> tuple[Array, Any]:
        def add(total: Array, given: tuple[dict[str, Array], Any]) -> tuple[Array, Any]:
            window, features = given

            def crop(array: Array) -> Array:
                *outer, rows, _, channels = array.shape
                scale = rows // x.shape[1]
                begin = (*[0] * len(outer), scale * window["top"], scale * window["left"], 0)
                size = (*outer, scale * height, scale * width, channels)
                return jax.lax.dynamic_slice(array, begin, size)

            estimate, features = of_window(crop)(crop(x), timestep, alpha, sigma, features)
            part = crop(total) + window["weight"][..., None] * estimate
            begin = (0, window["top"], window["left"], 0)
            return jax.lax.dynamic_update_slice(total, part, begin), features

        return jax.lax.scan(add, jnp.zeros_like(x), (windows, kept))

    return denoise
