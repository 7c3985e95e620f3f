"""Checks what a request brings besides text, and fills in its strength. Imports no JAX."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jaxdiff.checks import BadValueError
from jaxdiff.diffusion.step_ranges import skipped_steps
from jaxdiff.request import Request

CONTROLS, ADAPTERS = "--controlnet", "--ip-adapter"


class ImageInputs(NamedTuple):
    """The images that a model takes.

    Attributes:
      strength: the default strength for an image.
      masked_strength: the default strength for an image with a mask.
      needed: whether every request needs an image and a mask.
    """

    strength: float
    masked_strength: float
    needed: bool = False


def with_controls(request: Request, scales: Sequence[float]) -> Request:
    """Returns a request with an image and a scale for each of the job's ControlNets.

    Args:
      request: its control image may be alone, and its scale a number for all nets.
      scales: the default scale of each net.

    Raises:
      BadValueError: unless there is an image for each net.
    """
    request = _for_each(request, "control_image", "controlnet_conditioning_scale", scales, CONTROLS)
    start, end = request.control_guidance_start, request.control_guidance_end
    if request.control_image is None:
        for name in ("control_guidance_start", "control_guidance_end"):
            if getattr(request, name) is not None:
                raise BadValueError(f"{name} needs a control_image; add one, or leave {name} out")
        return request
    start, end = start or 0.0, 1.0 if end is None else end
    if start >= end:
        raise BadValueError(
            f"control_guidance_start = {start:g} must be less than control_guidance_end = {end:g}"
        )
    return replace(request, control_guidance_start=start, control_guidance_end=end)


def with_prompts(request: Request, scales: Sequence[float]) -> Request:
    """Returns a request with an image and a scale for each of the job's IP-Adapters.

    The arguments and errors are those of `with_controls`.
    """
    return _for_each(request, "ip_adapter_image", "ip_adapter_scale", scales, ADAPTERS)


def _for_each(
    request: Request, name: str, scale_name: str, scales: Sequence[float], option: str
) -> Request:
    images, chosen = getattr(request, name), getattr(request, scale_name)
    if images is None:
        if chosen is not None:
            raise BadValueError(f"{scale_name} needs {name}; add it, or leave {scale_name} out")
        if scales:
            raise BadValueError(f"the job has {option}: give the row {name}")
        return request
    images = tuple(images) if isinstance(images, list | tuple) else (images,)
    if len(images) != len(scales):
        raise BadValueError(
            f"{name} has {len(images)} images, but the job has {option} {len(scales)} times; name "
            "one for each image"
        )
    chosen = scales if chosen is None else chosen
    chosen = tuple(chosen) if isinstance(chosen, Sequence) else (chosen,)
    chosen = chosen * len(scales) if len(chosen) == 1 else chosen
    if len(chosen) != len(scales):
        raise BadValueError(f"{scale_name} has {len(chosen)} numbers for {len(scales)} images")
    return replace(request, **{name: images, scale_name: chosen})


def with_strength(
    request: Request,
    takes: ImageInputs | None,
    strength: float | None = None,
    *,
    is_flow: bool,
) -> Request:
    """Returns a request with its strength.

    Args:
      request: its number of steps must be known.
      takes: the images that the model takes; None if it takes none.
      strength: the job's, for an image without its own.
      is_flow: whether the model was trained by flow matching.

    Raises:
      BadValueError: for an image that the model does not take, for what makes no sense without an
        image, or if no step is taken.
    """
    is_masked = request.mask_image is not None or request.outpaint is not None
    if request.image is None:
        for name in ("mask_image", "outpaint", "strength"):
            if getattr(request, name) is not None:
                raise BadValueError(f"{name} needs an image; add one, or leave {name} out")
        if takes is not None and takes.needed:
            raise BadValueError("this model only paints in images: give it image and mask_image")
        return request
    if takes is None:
        raise BadValueError("this model takes no images; leave image out, or use another model")
    if takes.needed and not is_masked:
        raise BadValueError("this model needs a mask: give it mask_image or outpaint")
    own = takes.masked_strength if is_masked else takes.strength
    chosen = next(value for value in (request.strength, strength, own) if value is not None)
    if skipped_steps(request.steps, chosen, is_flow=is_flow) == request.steps:
        raise BadValueError(
            f"strength = {chosen:g} takes none of {request.steps} steps; raise one of them"
        )
    return replace(request, strength=chosen)
