"""Brings images and masks to the size that is wanted: crops, resizes, extends. Imports no JAX."""

import numpy as np
from PIL import Image


def fitted(
    pixels: np.ndarray, height: int, width: int, position: tuple[float, float] = (0.5, 0.5)
) -> np.ndarray:
    """Crops the largest part of an image with the target aspect ratio, and resizes it.

    Args:
      pixels: uint8 [h, w, 3], or [h, w] for a grey image.
      position: of the crop, (vertical, horizontal), from 0 (top, left) to 1 (bottom, right).

    Returns:
      uint8 [height, width, 3] or [height, width], resampled with a Lanczos filter, antialiased
      when shrinking.
    """
    full_height, full_width = pixels.shape[:2]
    scale = min(full_height / height, full_width / width)
    top = position[0] * (full_height - scale * height)
    left = position[1] * (full_width - scale * width)
    bottom = min(full_height, top + scale * height)  # rounding may exceed the edge slightly
    right = min(full_width, left + scale * width)
    box = (left, top, right, bottom)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS, box)
    return np.asarray(image)


def enlarged(side: int, factor: float) -> int:
    """Returns the side in pixels of an image that is enlarged by `factor`."""
    return max(1, round(side * factor))


def fitted_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops and resizes a mask as `fitted` does an image, in the middle.

    Args:
      mask: uint8 [h, w]; white is repainted.

    Returns:
      bool [height, width], True where the mask is at least half white, as diffusers' mask
      processors have it.
    """
    return fitted(mask, height, width) >= 128  # 127 / 255 < 0.5 < 128 / 255


def outpainted(
    pixels: np.ndarray, left: int, top: int, right: int, bottom: int
) -> tuple[np.ndarray, np.ndarray]:
    """Surrounds an image with borders to be painted, which repeat its outermost pixels.

    Args:
      pixels: uint8 [h, w, 3].
      left, top, right, bottom: the borders' widths in pixels, 0 or more.

    Returns:
      The canvas, uint8 [top + h + bottom, left + w + right, 3], and a mask of its height and
      width, bool, True on the borders.
    """
    borders = ((top, bottom), (left, right))
    canvas = np.pad(pixels, (*borders, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], bool), borders, constant_values=True)
    return canvas, mask
