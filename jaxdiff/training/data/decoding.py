"""Image files of strangers: their size from the header, their pixels, and those at another size."""

import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # some of Pillow's others start programs
MOST_PX = 2**26  # of one image, 192 MiB as RGB; each loading thread may hold one
EXIF_ORIENTATION, ROTATED = 0x0112, (5, 6, 7, 8)  # the values that swap height and width


def read_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Height and width in pixels as shown, from the header alone.

    Raises:
      InputError: naming the image, if it is none that can be read, or too large to be decoded.
    """
    with _opened(file, name) as image:
        width, height = image.size
        # Where Pillow would have to decode the image to find an orientation, there is none.
        rotated = "exif" in image.info and image.getexif().get(EXIF_ORIENTATION) in ROTATED
        return (width, height) if rotated else (height, width)


def decode(content: bytes, name: str) -> np.ndarray:
    """The pixels of an image file, uint8 [height, width, 3]: upright, on white if transparent.

    Raises:
      InputError: naming the image, if it cannot be decoded.
    """
    with _opened(io.BytesIO(content), name) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would cut the values off at 255
            raise InputError(f"{name} has {image.mode} pixels; save it with 8 bits a channel")
        upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
        if upright.has_transparency_data:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        return np.asarray(upright.convert("RGB"))


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PX:
                raise InputError(
                    f"{name} has {image.width}x{image.height} pixels, more than "
                    f"{MOST_PX // 10**6} million; make it smaller or remove it"
                )
            yield image
    except InputError:
        raise
    except Exception as problem:  # Pillow's plugins raise errors of many kinds
        reason, *_ = str(problem).splitlines() or [type(problem).__name__]
        reason = "no such format" if isinstance(problem, Image.UnidentifiedImageError) else reason
        raise InputError(
            f"{name} is no image that can be read ({reason}); replace or remove it"
        ) from problem


def fitted(
    pixels: np.ndarray, height: int, width: int, position: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """The largest part of an image that has the ratio of `height` and `width`, in that size.

    Args:
      pixels: uint8 [h, w, 3].
      position: where the part lies in what is too long, from 0 (top, left) to 1 (bottom, right).

    Returns:
      uint8 [height, width, 3], resampled with Lanczos' kernel, which is widened where it shrinks.
    """
    full_height, full_width, _ = pixels.shape
    scale = min(full_height / height, full_width / width)
    top = position[0] * (full_height - scale * height)
    left = position[1] * (full_width - scale * width)
    bottom = min(full_height, top + scale * height)  # rounding may lead a hair over the edge
    right = min(full_width, left + scale * width)
    box = (left, top, right, bottom)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(image)
