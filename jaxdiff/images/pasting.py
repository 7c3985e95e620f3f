"""Puts back what a mask leaves out."""

import numpy as np
from PIL import Image, ImageFilter

EDGE_PX = 4  # the width of the soft edge, inside the painted part


def pasted(painted: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the painted image where the mask is true, and the original elsewhere, unchanged.

    Args:
      painted, original: uint8 [height, width, 3].
      mask: bool [height, width].

    Returns:
      uint8 [height, width, 3].
    """
    wide = np.pad(mask, EDGE_PX, mode="edge")  # the image's own border is no edge
    grey = Image.fromarray(wide.astype(np.uint8) * 255)
    inner = grey.filter(ImageFilter.MinFilter(2 * (EDGE_PX // 2) + 1))
    soft = np.asarray(inner.filter(ImageFilter.GaussianBlur(EDGE_PX / 2)), np.float32) / 255.0
    soft = soft[EDGE_PX:-EDGE_PX, EDGE_PX:-EDGE_PX] * mask
    mixed = original + soft[..., None] * (painted.astype(np.float32) - original)
    return np.where(mask[..., None], np.round(mixed), original).astype(np.uint8)
