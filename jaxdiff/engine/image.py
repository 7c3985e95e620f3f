"""A finished image."""

from dataclasses import dataclass

import numpy as np

from jaxdiff.request import Request


@dataclass(frozen=True, eq=False)
class Image:
    """A finished image.

    Attributes:
      pixels: uint8 [height, width, 3], sRGB; of an enlarged image with transparency, [..., 4].
      request: the request, with every default filled in.
      finite: False if the network's values overflowed, which makes the pixels meaningless.
    """

    pixels: np.ndarray
    request: Request
    finite: bool
