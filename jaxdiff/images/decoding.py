"""Reads untrusted image files: size from the header, pixels, and masks. Imports no JAX."""

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
ANIMATIONS = ("PNG", "WEBP")  # what else has several pictures are JPEGs with a preview or depths


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


def check_still(content: bytes, name: str) -> None:
    """Raises InputError, naming the image, if it is animated or not a readable image."""
    with _opened(io.BytesIO(content), name) as image:
        frames = getattr(image, "n_frames", 1)
        if image.format in ANIMATIONS and frames > 1:
            raise InputError(f"{name} is animated ({frames} frames); save one frame")


def decode(content: bytes, name: str) -> np.ndarray:
    """Decodes an image file to uint8 [height, width, 3], upright and composited on white.

    Of an animation, it takes the first frame.

    Raises:
      InputError: naming the image, if it cannot be decoded.
    """
    return _decoded(content, name, "white", "RGB")


def decode_grey(content: bytes, name: str) -> np.ndarray:
    """Decodes an image file to its brightness, uint8 [height, width], upright and on black.

    Raises:
      InputError: naming the image, if it cannot be decoded.
    """
    return _decoded(content, name, "black", "L")


def _decoded(content: bytes, name: str, background: str, mode: str) -> np.ndarray:
    with _opened(io.BytesIO(content), name) as image:
        return _plain(image, name, background, mode)


def rgb(image: Image.Image, name: str) -> np.ndarray:
    """Converts an open image as `decode` does; raises InputError as it does."""
    return _plain(image, name, "white", "RGB")


def grey(image: Image.Image, name: str) -> np.ndarray:
    """Converts an open image as `decode_grey` does; raises InputError as it does."""
    return _plain(image, name, "black", "L")


def decode_rgba(content: bytes, name: str) -> np.ndarray | None:
    """Decodes an image file with its transparency to uint8 [height, width, 4], upright.

    Returns:
      its pixels as they are stored, or None if it is opaque.

    Raises:
      InputError: naming the image, if it cannot be decoded.
    """
    with _opened(io.BytesIO(content), name) as image:
        return rgba(image)


def rgba(image: Image.Image) -> np.ndarray | None:
    """Converts an open image as `decode_rgba` does."""
    if not image.has_transparency_data:
        return None
    pixels = np.asarray(_upright(image).convert("RGBA"))
    return None if pixels[..., 3].min() == 255 else pixels


def _plain(image: Image.Image, name: str, background: str, mode: str) -> np.ndarray:
    if image.mode.startswith(("I", "F")):  # Pillow would clip the values at 255
        raise InputError(f"{name} has {image.mode} pixels; save it with 8 bits per channel")
    upright = _upright(image)
    if upright.has_transparency_data:
        behind = Image.new("RGBA", upright.size, background)
        upright = Image.alpha_composite(behind, upright.convert("RGBA"))
    return np.asarray(upright.convert(mode))


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if "exif" in image.info else image


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
        if isinstance(problem, Image.UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise InputError(
            f"{name} is not a readable image ({reason}); replace or remove it"
        ) from problem
