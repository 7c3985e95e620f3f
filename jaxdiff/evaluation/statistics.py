"""Image statistics that need only the pixels: light, color, sharpness, and coarse features."""

from functools import lru_cache

import numpy as np

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709, of red, green and blue
THUMBNAIL = 8  # px, the side of `thumbnail_features`


def image_statistics(pixels: np.ndarray) -> dict[str, float]:
    """Returns the measures of an image that need no weights.

    Args:
      pixels: uint8 [height, width, 3], sRGB.

    Returns:
      sharpness: the variance of the luma's 4-neighbor Laplacian, with luma from 0 to 255 and
        mirrored edges, as `cv2.Laplacian(gray, cv2.CV_64F).var()` for Rec. 709 luma.
      brightness, contrast: the mean and standard deviation of the luma, from 0 to 1.
      colorfulness: M3 of Hasler and Suesstrunk, "Measuring colorfulness in natural images", 2003:
        0 for gray, about 100 for images that people call extremely colorful.
    """
    values = pixels.astype(np.float32)
    luma = values @ LUMA
    return {
        "sharpness": float(np.var(_laplacian(luma), dtype=np.float64)),
        "brightness": float(np.mean(luma, dtype=np.float64) / 255),
        "contrast": float(np.std(luma, dtype=np.float64) / 255),
        "colorfulness": _colorfulness(values),
    }


def _laplacian(luma: np.ndarray) -> np.ndarray:
    """Returns the sum of each pixel's four neighbors minus four times the pixel."""
    wide = np.pad(luma, 1, "reflect")
    neighbours = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]
    return neighbours - 4 * luma


def _colorfulness(values: np.ndarray) -> float:
    red, green, blue = np.moveaxis(values, -1, 0)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    spread = opponents.std(axis=(1, 2), dtype=np.float64)
    mean = opponents.mean(axis=(1, 2), dtype=np.float64)
    return float(np.hypot(*spread) + 0.3 * np.hypot(*mean))


def thumbnail_features(pixels: np.ndarray) -> np.ndarray:
    """Returns an image shrunk to 8x8 pixels, as features when there are no network weights.

    They capture the layout of colors, not the content.

    Args:
      pixels: uint8 [height, width, 3].

    Returns:
      float32 [192], the mean red, green and blue of each part, row by row, from 0 to 1.
    """
    height, width, _ = pixels.shape
    rows = np.tensordot(_parts(height), pixels.astype(np.float32), 1)  # [8, width, 3]
    thumbnail = np.einsum("xw,ywc->yxc", _parts(width), rows)
    return (thumbnail / 255).reshape(-1).astype(np.float32)


@lru_cache(64)  # a dataset has few image sizes
def _parts(length: int) -> np.ndarray:
    """Returns the share of each of eight equal parts that each pixel fills: float32 [8, length]."""
    edges = np.linspace(0, length, THUMBNAIL + 1)
    starts, ends = edges[:-1, None], edges[1:, None]
    pixel = np.arange(length)
    overlap = np.minimum(ends, pixel + 1) - np.maximum(starts, pixel)
    return (np.maximum(overlap, 0) / (ends - starts)).astype(np.float32)
