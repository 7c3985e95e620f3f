"""Summaries of any number of images in constant memory, that can be made apart and merged.

A part of the images may be summarised anywhere, in any order; the order of merging changes
nothing but the last bits of `Moments`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError

MOST_FEATURES = 8192  # of an image; the moments of more would take gigabytes


@dataclass(frozen=True, eq=False)
class Moments:
    """How many feature vectors there were, their mean and their spread.

    Attributes:
      count: of vectors.
      mean: float64 [d].
      scatter: float64 [d, d], the sum of the outer products of the deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Those of features [n, d]; of none at all with n = 0, which merge with any.

        Raises:
          InputError: for features that are no finite table, or more than 8192 to an image.
        """
        features = as_table(features, np.float64)
        if not len(features):
            return cls(0, np.zeros(0), np.zeros((0, 0)))
        mean = features.mean(axis=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def add(self, features: np.ndarray) -> "Moments":
        """With more features, [n, d]; raises as `of` and `merge` do."""
        return self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> "Moments":
        """Those of both; Chan, Golub and LeVeque 1979, equation 2.1, for vectors.

        Raises:
          InputError: if the two are not of as many features.
        """
        if not self.count or not other.count:
            return self if self.count else other
        check_widths(len(self.mean), len(other.mean))
        count = self.count + other.count
        step = other.mean - self.mean
        between = np.outer(step, step) * (self.count * other.count / count)
        mean = self.mean + step * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def arrays(self) -> dict[str, np.ndarray]:
        """For `numpy.savez`, beside those of a `Sample`."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The inverse of `arrays`, for what `numpy.load` gives."""
        return cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])


@dataclass(frozen=True, eq=False)
class Sample:
    """The features of some images, drawn evenly from all by a hash of their keys.

    The same images are drawn whatever the order and the parts that they come in, and an image
    that comes twice is there once. Those of a smaller sample are among those of a larger one.

    Attributes:
      size: the most images that are kept.
      hashes: uint64 [n], of their keys, ascending.
      features: float32 [n, d], in that order.
    """

    size: int
    hashes: np.ndarray
    features: np.ndarray

    @classmethod
    def of(cls, keys: Sequence[str], features: np.ndarray, size: int) -> "Sample":
        """Draws from images; from none at all, which merge with any.

        Args:
          keys: the images' names, [n].
          features: [n, d].

        Raises:
          InputError: for features that are no finite table, or more than 8192 to an image.
        """
        features = as_table(features, np.float32)
        if len(keys) != len(features):
            raise ValueError(f"{len(keys)} keys for {len(features)} images")
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        hashes = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
        return _smallest(size, hashes, features)

    def add(self, keys: Sequence[str], features: np.ndarray) -> "Sample":
        """With more images; as `of`, and raises as it and `merge` do."""
        return self.merge(Sample.of(keys, features, self.size))

    def merge(self, other: "Sample") -> "Sample":
        """The draw from what both were drawn from, of the smaller of their sizes.

        Raises:
          InputError: if the two are not of as many features.
        """
        size = min(self.size, other.size)
        tables = [sample for sample in (self, other) if len(sample.hashes)]
        if len(tables) < 2:
            drawn = tables[0] if tables else self
            return Sample(size, drawn.hashes[:size], drawn.features[:size])
        check_widths(self.features.shape[1], other.features.shape[1])
        hashes = np.concatenate([self.hashes, other.hashes])
        return _smallest(size, hashes, np.concatenate([self.features, other.features]))

    def arrays(self) -> dict[str, np.ndarray]:
        """For `numpy.savez`, beside those of `Moments`."""
        return {"size": np.array(self.size), "hashes": self.hashes, "features": self.features}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Sample":
        """The inverse of `arrays`, for what `numpy.load` gives."""
        return cls(int(arrays["size"]), arrays["hashes"], arrays["features"])


def _smallest(size: int, hashes: np.ndarray, features: np.ndarray) -> Sample:
    hashes, places = np.unique(hashes, return_index=True)
    return Sample(size, hashes[:size], features[places[:size]])


def as_table(features: np.ndarray, dtype) -> np.ndarray:
    """Features as [n, d] of a type.

    Raises:
      InputError: if they are no such table, hold what is not finite, or d is above 8192.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise InputError(
            f"features are a table of numbers, [images, features]; these are {features.dtype} "
            f"{list(features.shape)}"
        )
    if features.shape[1] > MOST_FEATURES:
        raise InputError(
            f"{features.shape[1]} features to an image are more than {MOST_FEATURES}; "
            "give those of a network's last layer, pooled"
        )
    features = features.astype(dtype, copy=False)
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise InputError(f"the features' row {row} holds a number that is not finite; leave it out")
    return features


def check_widths(one: int, other: int) -> None:
    """Raises InputError if two sets of images do not have as many features to an image."""
    if one != other:
        raise InputError(
            f"{one} and {other} features to an image cannot be compared; take both from one network"
        )
