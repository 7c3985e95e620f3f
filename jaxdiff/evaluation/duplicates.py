"""Copies: images that are equal, or that look equal, among themselves and in a training set.

Both kinds are told by 64 bits an image, so that a million images are 8 MB. Equal images are found
by the first bits of `pixel_sha256`; a false one has a chance of 5e-20 a pair. Images that look
equal are found by `perceptual_hash`, which knows light and dark at an eighth of the width and
forgets color and detail: what it finds is to be looked at.

Measured, and held by the tests: at the default distance of 3, images are found again after JPEG at
quality 75, resizing to 0.75 and 2 times, and 2 gray levels of brightness. No pair of 125,000 that
have photographs' spectrum is that near by chance. The shapes world is as flat as images come: of
its pairs of different scenes 2.4e-5 are within 3, and 1.0e-6 at 0. So of new scenes 2.5 % seem
copies of a training set of 1,000 at distance 3, and 14 % of one of 10,000; at distance 0 it is
0.9 % of the latter. Distance 3 is for photographs and paintings, distance 0 for flat drawings.
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import fft

from jaxdiff.dataset import image_files
from jaxdiff.errors import InputError
from jaxdiff.training.data import EncodedExamples, decoding, open_examples
from jaxdiff.training.recipe import Data

SIDE = 32  # px, of what is transformed
ONE_GRAY_LEVEL = SIDE / 2  # the coefficient of a wave that is one gray level high
BANDS, BAND_BITS = 4, 16
DISTANCE = BANDS - 1  # bits: two hashes that differ in no more agree in one of the bands
CANDIDATES = 2**20  # that are compared at once
THREADS = 2  # that decode
DECODED_AT_ONCE = 1024


def perceptual_hash(pixels: np.ndarray) -> np.uint64:
    """64 bits that stay nearly the same where an image looks the same.

    As in Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, 3.2:
    the luma is shrunk to 32x32 (Lanczos' kernel, antialiased) and its cosine transform taken. The
    bits are the 64 lowest frequencies but the mean, the lowest first; each is set where the
    coefficient is above that of a wave one gray level high. The paper has the median in its
    place, which is 0 in flat images: half of their bits would be noise. Plain images are all 0.

    Args:
      pixels: uint8 [height, width, 3].
    """
    luma = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    coefficients = fft.dctn(np.asarray(luma, np.float64), norm="ortho")[_lowest()]
    return np.packbits(coefficients > ONE_GRAY_LEVEL).view(">u8").astype(np.uint64)[0]


@cache
def _lowest() -> tuple[np.ndarray, np.ndarray]:
    """Where the 64 lowest frequencies stand, diagonal by diagonal, without the first."""
    down, right = np.indices((SIDE, SIDE)).reshape(2, -1)
    order = np.lexsort((down, down + right))[1:65]
    return down[order], right[order]


def pixel_hashes(pixel_sha256: Iterable[str]) -> np.ndarray:
    """The first 64 bits of what records hold of their images (hex): uint64 [n]."""
    return np.array([int(digest[:16], 16) for digest in pixel_sha256], np.uint64)


@dataclass(frozen=True, eq=False)
class HashIndex:
    """Hashes that can be searched for those near to others; Norouzi, Punjani, Fleet 1307.2982.

    Attributes:
      bands: uint64 [4, n], the hashes in the order of each 16 of their bits.
      starts: int64 [4, 65537], where each value of those bits begins.
    """

    bands: np.ndarray
    starts: np.ndarray

    @classmethod
    def build(cls, hashes: np.ndarray) -> "HashIndex":
        """Of uint64 [n], which may be equal; 32 bytes each, and 2 MB."""
        hashes = np.unique(hashes)
        bands = np.empty((BANDS, len(hashes)), np.uint64)
        starts = np.empty((BANDS, 2**BAND_BITS + 1), np.int64)
        for band in range(BANDS):
            values = _band(hashes, band)
            bands[band] = hashes[np.argsort(values, kind="stable")]
            starts[band] = np.searchsorted(np.sort(values), np.arange(2**BAND_BITS + 1))
        return cls(bands, starts)

    def within(self, hashes: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
        """Which hashes differ from one of these in no more than `distance` bits, at most 3.

        Args:
          hashes: uint64 [n].

        Returns:
          bool [n].
        """
        if not 0 <= distance <= DISTANCE:
            raise ValueError(f"the index finds distances from 0 to {DISTANCE}, not {distance}")
        found = np.zeros(len(hashes), bool)
        for band in range(BANDS):
            left = np.flatnonzero(~found)
            values = _band(hashes[left], band)
            starts, ends = self.starts[band][values], self.starts[band][values + 1]
            for part in _parts(ends - starts):
                rows, places = _ranges(starts[part], ends[part])
                asked = left[part][rows]
                near = np.bitwise_count(self.bands[band][places] ^ hashes[asked]) <= distance
                found[asked[near]] = True
        return found


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return (hashes >> np.uint64(BAND_BITS * band) & np.uint64(2**BAND_BITS - 1)).astype(np.int64)


def _parts(counts: np.ndarray) -> Iterator[slice]:
    """Slices of about `CANDIDATES` in all, or of one count that is larger."""
    turns = np.cumsum(counts) // CANDIDATES
    edges = [0, *(np.flatnonzero(np.diff(turns)) + 1), len(counts)]
    return (slice(start, end) for start, end in itertools.pairwise(edges))


def _ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All numbers from each start to its end, and which of the ranges each is of."""
    counts = ends - starts
    rows = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) - firsts[rows] + starts[rows]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """What is remembered of the images that a model was trained on.

    Attributes:
      exact: uint64 [n], `pixel_hashes`.
      near: of their perceptual hashes.
    """

    exact: np.ndarray
    near: HashIndex

    def copied(self, pixel_hashes: np.ndarray) -> np.ndarray:
        """Which images are equal to one of these: bool [n]."""
        return np.isin(pixel_hashes, self.exact)


def read_training_set(path: str, height: int, width: int) -> TrainingSet:
    """Looks at every image of a training set, as the training does: cut and brought to a size.

    Args:
      path: a folder of images with metadata.jsonl, of WebDataset shards or of Parquet files, or a
        dataset of `jaxdiff generate`.
      height, width: px, of the images that are to be compared with them.

    Raises:
      InputError: naming what cannot be used: the folder, or an image.
    """
    examples = open_examples(Data(path))
    if isinstance(examples, EncodedExamples):
        raise InputError(f"{path} holds latents, no pixels; name the folder of images itself")
    hashes = np.empty((2, len(examples)), np.uint64)

    def look(number: int) -> None:
        pixels = decoding.fitted(examples.pixels(number), height, width)
        hashes[0, number] = pixel_hashes([image_files.pixel_sha256(pixels)])[0]
        hashes[1, number] = perceptual_hash(pixels)

    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(examples), DECODED_AT_ONCE):
            numbers = range(start, min(start + DECODED_AT_ONCE, len(examples)))
            for _ in threads.map(look, numbers):
                pass
    return TrainingSet(np.unique(hashes[0]), HashIndex.build(hashes[1]))
