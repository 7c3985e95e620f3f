"""Mergeable summaries of any number of images, in constant memory.

Parts can be summarized anywhere and merged in any order; the order changes only the last bits of
`Moments`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError

MOST_FEATURES = 8192  # per image; the moments of more would take gigabytes


@dataclass(frozen=True, eq=False)
class Moments:
    """The count, mean and scatter matrix of feature vectors.

    Attributes:
      count: the number of vectors.
      mean: float64 [d].
      scatter: float64 [d, d], the sum of the outer products of the deviations from the mean.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Computes the moments of features [n, d]; with n = 0 they merge with any others.

        Raises:
          InputError: if features are not a finite table, or more than 8192 per image.
        """
        features = as_table(features, np.float64)
        if not len(features):
            return cls(0, np.zeros(0), np.zeros((0, 0)))
        mean = features.mean(axis=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def add(self, features: np.ndarray) -> "Moments":
        """Returns the moments with more features, [n, d]; raises as `of` and `merge` do."""
        return self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> "Moments":
        """Merges two; Chan, Golub and LeVeque 1979, equation 2.1, for vectors.

        Raises:
          InputError: if their numbers of features differ.
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
        """Returns the arrays for `numpy.savez`; their names differ from those of `Sample`."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """Restores an object from its `arrays`, as loaded by `numpy.load`."""
        return cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])


@dataclass(frozen=True, eq=False)
class Sample:
    """The features of a uniform sample of images, drawn by a hash of their keys.

    The sample does not depend on the order or the parts in which images arrive. Repeated images are
    kept once. A smaller sample is a subset of a larger one.

    Attributes:
      size: the maximum number of images.
      hashes: uint64 [n], of their keys, ascending.
      features: float32 [n, d], in that order.
    """

    size: int
    hashes: np.ndarray
    features: np.ndarray

    @classmethod
    def of(cls, keys: Sequence[str], features: np.ndarray, size: int) -> "Sample":
        """Draws a sample; one of no images merges with any other.

        Args:
          keys: the images' names, [n].
          features: [n, d].
          size: the maximum number of images.

        Raises:
          InputError: if features are not a finite table, or more than 8192 per image.
        """
        features = as_table(features, np.float32)
        if len(keys) != len(features):
            raise ValueError(f"{len(keys)} keys for {len(features)} images")
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        hashes = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
        return _smallest(size, hashes, features)

    def add(self, keys: Sequence[str], features: np.ndarray) -> "Sample":
        """Returns the sample with more images; arguments as for `of`, errors as `of`, `merge`."""
        return self.merge(Sample.of(keys, features, self.size))

    def merge(self, other: "Sample") -> "Sample":
        """Returns a sample of both populations, with the smaller of the two sizes.

        Raises:
          InputError: if their numbers of features differ.
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
        """Returns the arrays for `numpy.savez`; their names differ from those of `Moments`."""
        return {"size": np.array(self.size), "hashes": self.hashes, "features": self.features}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Sample":
        """Restores an object from its `arrays`, as loaded by `numpy.load`."""
        return cls(int(arrays["size"]), arrays["hashes"], arrays["features"])


def _smallest(size: int, hashes: np.ndarray, features: np.ndarray) -> Sample:
    hashes, places = np.unique(hashes, return_index=True)
    return Sample(size, hashes[:size], features[places[:size]])


def as_table(features: np.ndarray, dtype) -> np.ndarray:
    """Converts features to an array [n, d] of a dtype.

    Raises:
      InputError: if they are not numbers [n, d], some are not finite, or d is above 8192.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise InputError(
            f"features must be a table of numbers, [images, features], not {features.dtype} "
            f"{list(features.shape)}"
        )
    if features.shape[1] > MOST_FEATURES:
        raise InputError(
            f"{features.shape[1]} features per image are more than {MOST_FEATURES}; "
            "use the pooled features of a network's last layer"
        )
    features = features.astype(dtype, copy=False)
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(axis=1)))
        raise InputError(f"row {row} of the features has a number that is not finite; leave it out")
    return features


def check_widths(one: int, other: int) -> None:
    """Raises InputError if two sets of images differ in the number of features per image."""
    if one != other:
        raise InputError(
            f"cannot compare {one} with {other} features per image; take both from one network"
        )
