"""Checks what a request brings besides text, and fills in the defaults. Imports no JAX."""

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
      masked_strength: the default strength for an image with a mask; None if it takes no masks: it
        edits the image of every request as the prompt says, and always takes all steps.
      needed: whether every request needs an image, and a mask if the model takes masks.
      guidance_scale: the default `Request.image_guidance_scale`; None if it is without effect.
      enlarges: by how much the model enlarges the image of the row, which determines width and
        height; None if it does not.
    """

    strength: float
    masked_strength: float | None
    needed: bool = False
    guidance_scale: float | None = None
    enlarges: int | None = None


EDITS = ImageInputs(strength=1.0, masked_strength=None, needed=True)


def with_controls(request: Request, scales: Sequence[float], kinds: Sequence[int] = ()) -> Request:
    """Returns a request with an image and a scale for each of the job's ControlNets.

    A union net that is the only one takes any number of images, each with a scale.

    Args:
      request: its control image may be alone, and its scale a number for all images.
      scales: the default scale of each net.
      kinds: the number of kinds of images that each net knows, if they are union nets.

    Raises:
      BadValueError: unless there is an image for each net, and a mode for each image of union nets.
    """
    images = request.control_image
    if len(kinds) == 1 and isinstance(images, list | tuple) and len(images) > 1:
        scales, kinds = (tuple(each) * len(images) for each in (scales, kinds))
    request = _for_each(request, "control_image", "controlnet_conditioning_scale", scales, CONTROLS)
    start, end = request.control_guidance_start, request.control_guidance_end
    if request.control_image is None:
        for name in ("control_guidance_start", "control_guidance_end", "control_mode"):
            if getattr(request, name) is not None:
                raise BadValueError(f"{name} needs a control_image; add one, or leave {name} out")
        return request
    start, end = start or 0.0, 1.0 if end is None else end
    if start >= end:
        raise BadValueError(
            f"control_guidance_start = {start:g} must be less than control_guidance_end = {end:g}"
        )
    request = replace(request, control_guidance_start=start, control_guidance_end=end)
    return replace(request, control_mode=_modes(request.control_mode, kinds))


def _modes(said: int | Sequence[int] | None, kinds: Sequence[int]) -> tuple[int, ...] | None:
    """Returns the kind of each control image, if the job's ControlNets are union nets.

    Args:
      said: the request's.
      kinds: how many kinds the net of each image knows; none for other nets.
    """
    if not kinds:
        if said is not None:
            raise BadValueError("control_mode is for union ControlNets only; leave it out")
        return None
    if said is None:
        raise BadValueError(
            "a union ControlNet must know of which kind each control image is: give the row "
            f"control_mode, from 0 to {kinds[0] - 1}"
        )
    modes = tuple(said) if isinstance(said, Sequence) else (said,)
    if len(modes) != len(kinds):
        raise BadValueError(
            f"control_mode has {len(modes)} numbers for {len(kinds)} images; give one for each"
        )
    for mode, count in zip(modes, kinds, strict=True):
        if mode >= count:
            raise BadValueError(
                f"control_mode = {mode} must be from 0 to {count - 1}, because the ControlNet "
                f"knows {count} kinds of images"
            )
    return modes


def with_control(request: Request) -> Request:
    """Returns a request with the control image that the model itself sees, in all steps.

    Raises:
      BadValueError: unless there is one image, or for what only a ControlNet can use.
    """
    usual = {
        "controlnet_conditioning_scale": None,
        "control_mode": None,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
    }
    for name, value in usual.items():
        if getattr(request, name) not in (None, value):
            raise BadValueError(
                f"{name} is for ControlNets, but this model itself sees control_image; leave it out"
            )
    images = request.control_image
    if images is None:
        raise BadValueError("this model follows a control image: give it control_image")
    images = tuple(images) if isinstance(images, list | tuple) else (images,)
    if len(images) != 1:
        raise BadValueError(f"control_image has {len(images)} images, but this model sees one")
    return replace(request, control_image=images, **usual)


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
    if not scales:
        raise BadValueError(f"{name} needs {option}; add that to the job, or leave {name} out")
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


def with_image(
    request: Request,
    takes: ImageInputs | None,
    strength: float | None = None,
    *,
    is_flow: bool,
) -> Request:
    """Returns a request with its strength and its image guidance scale.

    Args:
      request: its number of steps must be known.
      takes: the images that the model takes; None if it takes none.
      strength: the job's, for an image without its own.
      is_flow: whether the model was trained by flow matching.

    Raises:
      BadValueError: for an image that the model does not take, for what makes no sense without an
        image or has no effect on the model, or if no step is taken.
    """
    is_masked = request.mask_image is not None or request.outpaint is not None
    guidance_scale = None if takes is None else takes.guidance_scale
    if request.image_guidance_scale is not None:
        if guidance_scale is None:
            raise BadValueError("image_guidance_scale has no effect on this model; leave it out")
        guidance_scale = request.image_guidance_scale
    if request.image is None:
        for name in ("mask_image", "outpaint", "strength"):
            if getattr(request, name) is not None:
                raise BadValueError(f"{name} needs an image; add one, or leave {name} out")
        if takes is not None and takes.needed:
            what = "only paints in images: give it image and mask_image"
            what = "edits images: give it image" if takes.masked_strength is None else what
            what = "enlarges images: give it image" if takes.enlarges is not None else what
            raise BadValueError(f"this model {what}")
        return request
    if takes is None:
        raise BadValueError("this model takes no images; leave image out, or use another model")
    own = takes.masked_strength if is_masked else takes.strength
    chosen = next((each for each in (request.strength, strength) if each is not None), own)
    if takes.masked_strength is None:
        verb = "edits" if takes.enlarges is None else "enlarges"
        for name in ("mask_image", "outpaint"):
            if getattr(request, name) is not None:
                raise BadValueError(f"this model {verb} whole images; leave {name} out")
        if chosen != own:
            raise BadValueError(f"this model {verb} images in all steps; leave strength out")
    elif takes.needed and not is_masked:
        raise BadValueError("this model needs a mask: give it mask_image or outpaint")
    if skipped_steps(request.steps, chosen, is_flow=is_flow) == request.steps:
        raise BadValueError(
            f"strength = {chosen:g} takes none of {request.steps} steps; raise one of them"
        )
    return replace(request, strength=chosen, image_guidance_scale=guidance_scale)
