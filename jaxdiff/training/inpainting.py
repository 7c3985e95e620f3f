"""Widens a U-Net for inpainting, and draws the masks that it is trained on.

As in Stable Diffusion's own inpainting models (the model card of runwayml/stable-diffusion-
inpainting): the mask and the latents of the masked image are further channels, whose weights are
zero at first.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.training.components import Components

# The pipelines of models with and without the channels.
PIPELINES = {
    "StableDiffusionPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLInpaintPipeline",
}
WHOLE = 0.25  # the share of masks that hide the whole image, which keeps it able to make one
MOST_RECTANGLES = 4
SMALLEST, LARGEST = 0.15, 0.8  # sides of a mask's rectangles, relative to the image's


def widened(parts: Components, *, remat: bool) -> Components:
    """Returns the model with the channels for a mask, if it does not have them yet.

    Raises:
      InputError: if its family has no models for inpainting of this kind.
    """
    if parts.model.denoiser.inpainting is not None:
        return parts
    networks, component = parts.family.networks(), parts.model.denoiser.component
    pipeline = parts.pipeline["_class_name"]
    if pipeline not in PIPELINES:
        raise InputError(
            f'method = "inpaint" does not work with a {pipeline}; use one of {", ".join(PIPELINES)}'
        )
    pipeline = {**parts.pipeline, "_class_name": PIPELINES[pipeline]}
    model = networks.build(networks.for_inpainting(parts.model.configs), pipeline, remat=remat)
    denoiser = parts.params[component]
    kernel = denoiser["conv_in"]["kernel"]
    more = [(0, 0), (0, 0), (0, model.denoiser.inpainting.channels), (0, 0)]
    first = {**denoiser["conv_in"], "kernel": jnp.pad(kernel, more)}
    params = {**parts.params, component: {**denoiser, "conv_in": first}}
    return replace(parts, model=model, params=params, pipeline=pipeline)


def masks(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Draws masks, bool [count, height, width], True where the image is hidden.

    A quarter of them hide everything. The others are one to four rectangles, or, as in outpainting,
    all that is outside of one.
    """
    found = np.zeros((count, height, width), bool)
    for mask in found:
        if rng.random() < WHOLE:
            mask[:] = True
            continue
        inverted = rng.random() < 0.2
        for _ in range(1 if inverted else rng.integers(1, MOST_RECTANGLES + 1)):
            sides = rng.uniform(SMALLEST, LARGEST, 2) * (height, width)
            top, left = rng.random(2) * ((height, width) - sides)
            bottom, right = top + sides[0], left + sides[1]
            mask[round(top) : round(bottom), round(left) : round(right)] = True
        if inverted:
            mask[:] = ~mask
    return found
