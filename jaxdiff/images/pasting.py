"""Puts back what a mask leaves out."""

import numpy as np
from PIL import Image, ImageFilter

EDGE = 1 / 128  # the width of the soft edge, of the image's shorter side: 4 px of 512


def pasted(painted: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the painted image where the mask is true, and the original elsewhere, unchanged.

    The soft edge is inside the painted part.

    Args:
      painted, original: uint8 [height, width, 3].
      mask: bool [height, width].

    Returns:
      uint8 [height, width, 3].
    """
    edge = max(1, round(EDGE * min(mask.shape)))
    wide = np.pad(mask, edge, mode="edge")  # the image's own border is no edge
    grey = Image.fromarray(wide.astype(np.uint8) * 255)
    if edge > 1:  # Pillow divides by zero for a filter of one pixel
        grey = grey.filter(ImageFilter.MinFilter(2 * (edge // 2) + 1))
    soft = np.asarray(grey.filter(ImageFilter.GaussianBlur(edge / 2)), np.float32) / 255.0
    soft = soft[edge:-edge, edge:-edge] * mask
    mixed = original + soft[..., None] * (painted.astype(np.float32) - original)
    return np.where(mask[..., None], np.round(mixed), original).astype(np.uint8)
