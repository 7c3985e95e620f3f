"""Duplicate detection: finds identical and near-identical images, for example in a training set.

Each test compares 64 bits per image, so a million images take 8 MB. Identical images are found by
the first bits of `pixel_sha256`, with a false-positive rate of 5e-20 per pair. Near-identical
images are found by `perceptual_hash`, which keeps light and dark at an eighth of the width and
drops color and detail; check its matches by eye.

Measured and tested: at the default distance of 3, images are found again after JPEG compression at
quality 75, resizing by 0.75 and 2, and a brightness change of 2 gray levels. Of 125,000 pairs with
the spectrum of photographs, none is this close by chance. The shapes world is the flattest case:
of its pairs of different scenes, 2.4e-5 are within distance 3 and 1.0e-6 at distance 0. At distance
3, 2.5% of new scenes therefore seem to be copies of a training set of 1,000, and 14% of one of
10,000; at distance 0, 0.9% of the latter. Use distance 3 for photographs and paintings, distance 0
for flat drawings.
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import fft

from jaxdiff.errors import InputError
from jaxdiff.images import fitting, image_files
from jaxdiff.training.data import EncodedExamples, open_examples
from jaxdiff.training.recipe import Data

SIDE = 32  # px, the side of the transformed image
ONE_GRAY_LEVEL = SIDE / 2  # the coefficient of a wave with an amplitude of one gray level
BANDS, BAND_BITS = 4, 16
DISTANCE = BANDS - 1  # bits: two hashes that differ in at most this many agree in one band
CANDIDATES = 2**20  # compared at once
THREADS = 2  # for decoding
DECODED_AT_ONCE = 1024


def perceptual_hash(pixels: np.ndarray) -> np.uint64:
    """Returns a 64-bit hash that barely changes if the image looks the same.

    As in Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, 3.2:
    shrinks the luma to 32x32 (antialiased Lanczos kernel) and takes its cosine transform. The bits
    are the 64 lowest frequencies without the mean, lowest first; each is set if the coefficient is
    above that of a wave with an amplitude of one gray level. The paper compares with the median
    instead, which is 0 in flat images, so half of their bits would be noise. The hash of a
    uniform image is 0.

    Args:
      pixels: uint8 [height, width, 3].
    """
    luma = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    coefficients = fft.dctn(np.asarray(luma, np.float64), norm="ortho")[_lowest()]
    return np.packbits(coefficients > ONE_GRAY_LEVEL).view(">u8").astype(np.uint64)[0]


@cache
def _lowest() -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the 64 lowest frequencies, diagonal by diagonal, without the mean."""
    down, right = np.indices((SIDE, SIDE)).reshape(2, -1)
    order = np.lexsort((down, down + right))[1:65]
    return down[order], right[order]


def pixel_hashes(pixel_sha256: Iterable[str]) -> np.ndarray:
    """Returns the first 64 bits of hexadecimal pixel hashes: uint64 [n]."""
    return np.array([int(digest[:16], 16) for digest in pixel_sha256], np.uint64)


@dataclass(frozen=True, eq=False)
class HashIndex:
    """An index for finding hashes within a Hamming distance; Norouzi, Punjani, Fleet 1307.2982.

    Attributes:
      bands: uint64 [4, n], the hashes sorted by each group of 16 bits.
      starts: int64 [4, 65537], where each value of those bits begins.
    """

    bands: np.ndarray
    starts: np.ndarray

    @classmethod
    def build(cls, hashes: np.ndarray) -> "HashIndex":
        """Builds an index of uint64 [n], duplicates allowed; takes 32 bytes per hash plus 2 MB."""
        hashes = np.unique(hashes)
        bands = np.empty((BANDS, len(hashes)), np.uint64)
        starts = np.empty((BANDS, 2**BAND_BITS + 1), np.int64)
        for band in range(BANDS):
            values = _band(hashes, band)
            bands[band] = hashes[np.argsort(values, kind="stable")]
            starts[band] = np.searchsorted(np.sort(values), np.arange(2**BAND_BITS + 1))
        return cls(bands, starts)

    def within(self, hashes: np.ndarray, distance: int = DISTANCE) -> np.ndarray:
        """Finds the hashes that differ from an indexed hash in at most `distance` bits.

        Args:
          hashes: uint64 [n].
          distance: from 0 to 3.

        Returns:
          bool [n].
        """
        if not 0 <= distance <= DISTANCE:
            raise ValueError(f"distance must be from 0 to {DISTANCE}, not {distance}")
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
    """Returns slices with about `CANDIDATES` in total, or with a single larger count."""
    turns = np.cumsum(counts) // CANDIDATES
    edges = [0, *(np.flatnonzero(np.diff(turns)) + 1), len(counts)]
    return (slice(start, end) for start, end in itertools.pairwise(edges))


def _ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the range numbers and the values of all integers from each start to its end."""
    counts = ends - starts
    rows = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return rows, np.arange(len(rows)) - firsts[rows] + starts[rows]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The hashes of a model's training images.

    Attributes:
      exact: uint64 [n], their `pixel_hashes`.
      near: an index of their perceptual hashes.
    """

    exact: np.ndarray
    near: HashIndex

    def copied(self, pixel_hashes: np.ndarray) -> np.ndarray:
        """Finds the images that are identical to a training image: bool [n]."""
        return np.isin(pixel_hashes, self.exact)


def read_training_set(path: str, height: int, width: int) -> TrainingSet:
    """Hashes every image of a training set, cropped and resized as in training.

    Args:
      path: a folder of images with metadata.jsonl, of WebDataset shards or of Parquet files, or a
        dataset of `jaxdiff generate`.
      height, width: px, the size of the images to compare with the training set.

    Raises:
      InputError: naming the folder or image that cannot be used.
    """
    examples = open_examples(Data(path))
    if isinstance(examples, EncodedExamples):
        raise InputError(f"{path} holds latents, not pixels; name the folder of images instead")
    hashes = np.empty((2, len(examples)), np.uint64)

    def look(number: int) -> None:
        pixels = fitting.fitted(examples.pixels(number), height, width)
        hashes[0, number] = pixel_hashes([image_files.pixel_sha256(pixels)])[0]
        hashes[1, number] = perceptual_hash(pixels)

    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(examples), DECODED_AT_ONCE):
            numbers = range(start, min(start + DECODED_AT_ONCE, len(examples)))
            for _ in threads.map(look, numbers):
                pass
    return TrainingSet(np.unique(hashes[0]), HashIndex.build(hashes[1]))
