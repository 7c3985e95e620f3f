"""Turns images into what ControlNets were trained on. Imports no JAX."""

import numpy as np

from jaxdiff.errors import InputError

LOW, HIGH = 100, 200  # the thresholds of Canny's edges in diffusers' documentation and its nets


def check(name: str) -> None:
    """Raises InputError if a preprocessor's package is missing."""
    if name == "canny":
        try:
            import cv2  # noqa: F401
        except ImportError:
            raise InputError(
                "--preprocess canny needs OpenCV: pip install 'jaxdiff[control]'"
            ) from None


def preprocessed(pixels: np.ndarray, name: str) -> np.ndarray:
    """Applies a preprocessor, one of `checks.PREPROCESSORS`.

    "canny" finds edges (Canny, 1986, doi:10.1109/TPAMI.1986.4767851), white on black.

    Args:
      pixels: uint8 [height, width, 3].

    Returns:
      uint8 [height, width, 3].
    """
    if name == "none":
        return pixels
    import cv2

    edges = cv2.Canny(np.ascontiguousarray(pixels), LOW, HIGH)
    return np.repeat(edges[..., None], 3, axis=2)
