"""Reads untrusted image files: size from the header, pixels, and resized crops."""

import contextlib
import io
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # some of Pillow's other formats run external programs
MOST_PX = 2**26  # per image, 192 MiB as RGB; each loading thread may hold one image
EXIF_ORIENTATION, ROTATED = 0x0112, (5, 6, 7, 8)  # the values that swap height and width


def read_size(file: BinaryIO, name: str) -> tuple[int, int]:
    """Reads height and width in pixels, as displayed, from the header only.

    Raises:
      InputError: naming the image, if it is unreadable or too large.
    """
    with _opened(file, name) as image:
        width, height = image.size
        # An orientation that Pillow could find only by decoding the image is ignored.
        rotated = "exif" in image.info and image.getexif().get(EXIF_ORIENTATION) in ROTATED
        return (width, height) if rotated else (height, width)


def decode(content: bytes, name: str) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, 3], upright and composited on white.

    Raises:
      InputError: naming the image, if it cannot be decoded.
    """
    with _opened(io.BytesIO(content), name) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip the values at 255
            raise InputError(f"{name} has {image.mode} pixels; save it with 8 bits per channel")
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
    except Exception as problem:  # Pillow's plugins raise many kinds of errors
        reason, *_ = str(problem).splitlines() or [type(problem).__name__]
        reason = "unknown format" if isinstance(problem, Image.UnidentifiedImageError) else reason
        raise InputError(
            f"{name} is not a readable image ({reason}); replace or remove it"
        ) from problem


def fitted(
    pixels: np.ndarray, height: int, width: int, position: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Crops the largest part of an image with the target aspect ratio, and resizes it.

    Args:
      pixels: uint8 [h, w, 3].
      position: of the crop, (vertical, horizontal), from 0 (top, left) to 1 (bottom, right).

    Returns:
      uint8 [height, width, 3], resampled with a Lanczos filter, antialiased when shrinking.
    """
    full_height, full_width, _ = pixels.shape
    scale = min(full_height / height, full_width / width)
    top = position[0] * (full_height - scale * height)
    left = position[1] * (full_width - scale * width)
    bottom = min(full_height, top + scale * height)  # rounding may exceed the edge slightly
    right = min(full_width, left + scale * width)
    box = (left, top, right, bottom)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(image)
