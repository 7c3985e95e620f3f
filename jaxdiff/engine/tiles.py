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
    """Places as few tiles as possible evenly, so that neighbours share at least `OVERLAP` pixels.

    Args:
      height, width: of the image, in pixels, multiples of `MULTIPLE`.
    """
    return Tiling(min(height, SIDE), min(width, SIDE), _starts(height), _starts(width))


def _starts(length: int) -> tuple[int, ...]:
    last = max(0, length - SIDE)
    count = 1 + -(-last // (SIDE - OVERLAP))
    places = (last * number // max(1, count - 1) for number in range(count))
    return tuple(place // MULTIPLE * MULTIPLE for place in places)


def weights(starts: tuple[int, ...], side: int, scale: int) -> list[np.ndarray]:
    """Returns how much each tile counts along one axis: where several overlap, the sum is 1.

    A tile counts nothing in its margin, and fades in behind it, except at the edges of the image.

    Args:
      starts: of the tiles, in pixels.
      side: of each tile.
      scale: by how much the tiles have been enlarged.

    Returns:
      float32 [scale side] for each start.
    """
    length = starts[-1] + side
    inside = (np.arange(scale * side) + 0.5) / scale
    faded = np.clip((inside - MARGIN) / (OVERLAP - 2 * MARGIN), 0, 1)
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
