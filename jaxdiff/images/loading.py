"""Reads the images of a request and fits them to its size."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff.checks import BadValueError
from jaxdiff.images import decoding, fitting, preprocessing, sources
from jaxdiff.images.clip_pixels import centre_of_resized
from jaxdiff.request import NOT_SAMPLED, Request, Source


def prepared(
    request: Request,
    root: str = "",
    preprocess: str = "none",
    prompt_sizes: Sequence[int] = (),
    enlarges: int = 1,
) -> Request:
    """Returns a request whose images are arrays of its size, ready for the engine.

    Args:
      request: with its width and height, and with several images as a tuple.
      root: the folder or URL that addresses are relative to.
      preprocess: as in `Options`.
      prompt_sizes: the height and width in which each image prompt is seen; without them, image
        prompts keep their sizes.
      enlarges: by how much the model enlarges `image`.

    Returns:
      the request with `image`, uint8 [height / enlarges, width / enlarges, 3], and, if a part of it
      is to be painted, `mask_image`, bool [height, width], True where it is; `outpaint` is None.
      An image with transparent parts is [..., 4] if a GAN upscaler enlarges it; else it is
      composited on white. Images in `control_image` are as `image`, those in `ip_adapter_image` of
      their own sizes.

    Raises:
      BadValueError: naming the image that cannot be read, has changed since the row was planned, or
        does not fit.
    """
    if request.control_image is not None:
        size = request.height, request.width
        seen = [fitting.fitted(_pixels(image, root), *size) for image in request.control_image]
        seen = tuple(preprocessing.preprocessed(pixels, preprocess) for pixels in seen)
        request = replace(request, control_image=seen)
    if request.ip_adapter_image is not None:
        prompts = [_pixels(image, root) for image in request.ip_adapter_image]
        if prompt_sizes:
            prompts = map(centre_of_resized, prompts, prompt_sizes)
        request = replace(request, ip_adapter_image=tuple(prompts))
    if request.image is None:
        return request
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    inner = [side // enlarges for side in inner_size(request)]
    keeps_alpha = request.sampler == NOT_SAMPLED  # other models see three channels
    original, mask = _pixels(request.image, root, keeps_alpha=keeps_alpha), None
    pixels = fitting.fitted(original, *inner)
    if request.mask_image is not None:
        grey = _mask(request.mask_image, root)
        mask = fitting.fitted_mask(grey, *inner)
        check_mask(grey.shape, original.shape[:2], not mask.any())
    if request.outpaint is not None:
        pixels, border = fitting.outpainted(pixels, left, top, right, bottom)
        if mask is not None:
            border |= np.pad(mask, ((top, bottom), (left, right)))
        mask = border
    return replace(request, image=pixels, mask_image=mask, outpaint=None)


def enlarged_size(height: int, width: int, enlarges: int, multiple: int) -> tuple[int, int]:
    """Returns the height and width in pixels of what a model makes of an image that it enlarges.

    Args:
      height, width: of the image.
      enlarges: by how much it is enlarged.
      multiple: what the sides must be multiples of; an image that does not fit is cropped.
    """
    return tuple(max(multiple, side * enlarges // multiple * multiple) for side in (height, width))


def sized(request: Request, enlarges: int, multiple: int) -> Request:
    """Returns a request for an image to enlarge with its width and height, and the image read.

    The other arguments are those of `enlarged_size`; BadValueError is raised as by `prepared`.
    """
    if request.image is None:
        return request
    pixels = _pixels(request.image, "", keeps_alpha=True)
    height, width = enlarged_size(*pixels.shape[:2], enlarges, multiple)
    return replace(request, image=Image.fromarray(pixels), height=height, width=width)


def inner_size(request: Request) -> tuple[int, int]:
    """Returns the height and width of the image inside its painted borders, in pixels.

    Raises:
      BadValueError: if they leave no room for it.
    """
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    height, width = request.height - top - bottom, request.width - left - right
    if min(height, width) < 1:
        raise BadValueError(
            f"outpaint leaves no room for the image in {request.width}x{request.height}; make "
            "width or height larger"
        )
    return height, width


def blank(request: Request, prompt_sizes: Sequence[int], enlarges: int = 1) -> Request:
    """Returns a request of the same bucket with grey in the place of its images, if any.

    The arguments are those of `prepared`.
    """
    size = request.height // enlarges, request.width // enlarges
    grey = np.full((*size, 3), 128, np.uint8)
    if request.control_image is not None:
        request = replace(request, control_image=(grey,) * len(request.control_image))
    if request.ip_adapter_image is not None:
        squares = (np.full((side, side, 3), 128, np.uint8) for side in prompt_sizes)
        request = replace(request, ip_adapter_image=tuple(squares))
    if request.image is None:
        return request
    masked = request.bucket.masked
    return replace(
        request,
        image=grey,
        mask_image=np.ones(size, bool) if masked else None,
        outpaint=None,
    )


def check_mask(size: tuple[int, int], image_size: tuple[int, int], is_black: bool) -> None:
    """Raises BadValueError unless a mask has the (height, width) of its image and some white."""
    if size != image_size:
        (height, width), (image_height, image_width) = size, image_size
        raise BadValueError(
            f"mask_image is {width}x{height}, but image is {image_width}x{image_height}; make them "
            "equal"
        )
    if is_black:
        raise BadValueError("mask_image is black: nothing would be painted; white is painted")


def _pixels(said, root: str, *, keeps_alpha: bool = False) -> np.ndarray:
    """Returns an image as uint8 [h, w, 3], or [h, w, 4] if it keeps transparent parts."""
    if isinstance(said, np.ndarray):
        return _checked("image", said, 3)
    if isinstance(said, Image.Image):
        pixels = decoding.rgb(said, "image")
        stored = decoding.rgba(said) if keeps_alpha else None
    else:
        content, name = _content(said, root), _name(said)
        pixels = sources.opened(content, name)  # which checks it
        stored = decoding.decode_rgba(content, name) if keeps_alpha else None
    return pixels if stored is None else stored


def _mask(said, root: str) -> np.ndarray:
    if isinstance(said, np.ndarray):
        grey = said.astype(np.uint8) * 255 if said.dtype == bool else said
        return _checked("mask_image", grey, 2)
    if isinstance(said, Image.Image):
        return decoding.grey(said, "mask_image")
    return sources.mask(_content(said, root), _name(said))


def _checked(name: str, pixels: np.ndarray, axes: int) -> np.ndarray:
    wanted = "uint8 [h, w, 3]" if axes == 3 else "uint8 or bool [h, w]"
    fits = pixels.ndim == axes and pixels.size and (axes == 2 or pixels.shape[-1] == 3)
    if pixels.dtype != np.uint8 or not fits:
        raise BadValueError(f"{name} must be {wanted}, not {pixels.dtype} {[*pixels.shape]}")
    return pixels


def _content(said: Source | str | Path, root: str) -> bytes:
    if not isinstance(said, Source):
        path = Path(said).resolve()  # the caller's own, so links are followed
        return sources.read(path.name, str(path.parent))
    content = sources.read(said.address, root)
    if hashlib.sha256(content).hexdigest() != said.sha256:
        raise BadValueError(f"{said.address} has changed since the job was planned")
    return content


def _name(said: Source | str | Path) -> str:
    return said.address if isinstance(said, Source) else str(said)
