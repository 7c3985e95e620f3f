"""Cuts images into tiles that overlap, and joins tiles whose edges fade into each other.

A network sees the whole of a small image. Of a large one it sees tiles of one size, so that its
memory is bounded and one program does for all of them. Imports no JAX.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIDE, OVERLAP = 288, 32  # px: images of 256, 512, 768 and so on px need few tiles
# px along the inner edges of tiles that are not used: there, networks miss what is beyond the edge.
# Measured: nothing of it is seen 12 px from the edge, and 1 of 255 at most 8 px from it.
MARGIN = 12
MULTIPLE = 4  # px: of what tiles begin at
SHARED = 4  # neighbouring windows share at least one in so many of their latents


class Tiling(NamedTuple):
    """The places of an image's tiles, row by row.

    Attributes:
      height, width: of each tile, in pixels.
      tops, lefts: of the rows and columns of tiles.
    """

    height: int
    width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.tops) * len(self.lefts)

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """The row and the column of each tile."""
        return ((row, column) for row in range(len(self.tops)) for column in range(len(self.lefts)))


def tiling(height: int, width: int) -> Tiling:
    """Places the tiles of an image that a GAN upscaler enlarges; neighbours share `OVERLAP` pixels.

    Args:
      height, width: of the image, in pixels, multiples of `MULTIPLE`.
    """
    starts = (_starts(length, SIDE, OVERLAP, MULTIPLE) for length in (height, width))
    return Tiling(min(height, SIDE), min(width, SIDE), *starts)


def windows(height: int, width: int, window_height: int, window_width: int) -> Tiling:
    """Places windows on the latents of an image; neighbours share at least a quarter of each.

    Args:
      height, width: of the whole, in latents.
      window_height, window_width: of each window, at most those of the whole.
    """
    sides = (height, window_height), (width, window_width)
    starts = (_starts(length, side, side // SHARED) for length, side in sides)
    return Tiling(window_height, window_width, *starts)


def _starts(length: int, side: int, overlap: int, multiple: int = 1) -> tuple[int, ...]:
    """Places as few tiles as possible evenly, so that neighbours share at least `overlap`."""
    last = max(0, length - side)
    count = 1 + -(-last // (side - overlap))
    places = (last * number // max(1, count - 1) for number in range(count))
    return tuple(place // multiple * multiple for place in places)


def weights(
    starts: tuple[int, ...],
    side: int,
    scale: int = 1,
    *,
    overlap: int = OVERLAP,
    margin: int = MARGIN,
) -> list[np.ndarray]:
    """Returns how much each tile counts along one axis: where several overlap, the sum is 1.

    A tile counts nothing in its margin, and fades in behind it, except at the edges of the image.

    Args:
      starts: of the tiles, in pixels or latents.
      side: of each tile.
      scale: by how much the tiles have been enlarged.
      overlap: what neighbours share at least.
      margin: what is not used along the inner edges of tiles.

    Returns:
      float32 [scale side] for each start.
    """
    length = starts[-1] + side
    inside = (np.arange(scale * side) + 0.5) / scale
    faded = np.clip((inside - margin) / (overlap - 2 * margin), 0, 1)
    each, total = [], np.zeros(scale * length)
    for start in starts:
        before = faded if start else np.ones(len(inside))
        after = faded[::-1] if start + side < length else np.ones(len(inside))
        each.append(np.minimum(before, after))
        total[scale * start :][: len(inside)] += each[-1]
    return [
        (weight / total[scale * start :][: len(inside)]).astype(np.float32)
        for start, weight in zip(starts, each, strict=True)
    ]
