"""Cuts images into tiles that overlap, and joins tiles whose edges fade into each other.

A network sees the whole of a small image. Of a large one it sees tiles of one size, so that its
memory is bounded and one program does for all of them. Imports no JAX.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIDE, OVERLAP = 288, 32  # px: images of 256, 512, 768 and so on px need few tiles
MULTIPLE = 4  # px: of what tiles begin at


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


def tiling(height: int, width: int, side: int = SIDE, overlap: int = OVERLAP) -> Tiling:
    """Places as few tiles as possible evenly, so that neighbours share at least `overlap` pixels.

    Args:
      height, width: of the image, in pixels, multiples of `MULTIPLE`.
      side: the largest height and width of a tile.
    """
    tops, lefts = (_starts(length, side, overlap) for length in (height, width))
    return Tiling(min(height, side), min(width, side), tops, lefts)


def _starts(length: int, side: int, overlap: int) -> tuple[int, ...]:
    count = 1 + max(0, -(-(length - side) // (side - overlap)))
    last = max(0, length - side)
    places = (last * number // max(1, count - 1) for number in range(count))
    return tuple(place // MULTIPLE * MULTIPLE for place in places)


def weights(starts: tuple[int, ...], side: int, overlap: int) -> list[np.ndarray]:
    """Returns how much each tile counts along one axis: where several overlap, the sum is 1.

    A tile fades out linearly over `overlap` pixels, except at the edges of the image.

    Returns:
      float32 [side] for each start.
    """
    length = starts[-1] + side
    inside = np.arange(side) + 0.5
    each = []
    for start in starts:
        before = inside / overlap if start else np.ones(side)
        after = inside[::-1] / overlap if start + side < length else np.ones(side)
        each.append(np.minimum(1, np.minimum(before, after)))
    total = np.zeros(length)
    for start, weight in zip(starts, each, strict=True):
        total[start : start + side] += weight
    return [
        (weight / total[start : start + side]).astype(np.float32)
        for start, weight in zip(starts, each, strict=True)
    ]
