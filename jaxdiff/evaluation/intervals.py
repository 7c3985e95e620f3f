"""How sure a mean is: intervals and paired differences, over prompts.

What a benchmark samples is its prompts, and the images of one prompt resemble each other: so
prompts are drawn, and a prompt's images come along with it (Field and Welsh, "Bootstrapping
clustered data", 2007). The overall mean is the mean of the categories' means, as GenEval's (arXiv
2310.11513), and prompts are drawn within their category, so that each draw is a benchmark like it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

RESAMPLES = 2000
BLOCK_ELEMENTS = 2**21  # of the random numbers that are in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that it lies in; NaN where it is not known."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval, and how often chance alone gives one as large."""

    value: float
    low: float
    high: float
    p: float


def wilson(successes, n, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The score interval of a share, by Wilson (1927): it holds for 0 and n successes as well.

    Args:
      successes, n: counts, numbers or arrays of one shape; where n is 0, nothing is known and the
        interval is 0 to 1.

    Returns:
      low and high, float64, of that shape.
    """
    successes, n = np.float64(successes), np.float64(n)
    z2 = special.ndtri((1 + confidence) / 2) ** 2
    middle = (successes + z2 / 2) / (n + z2)
    share = successes / np.maximum(n, 1)
    half = np.sqrt(z2 * (share * (1 - share) * n + z2 / 4)) / (n + z2)
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    low = np.where(successes == 0, 0.0, middle - half)
    high = np.where(successes == n, 1.0, middle + half)
    return low, high


def by_prompt(
    values: np.ndarray, owners: np.ndarray, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the number of each prompt's values, float64 [prompts]; NaN is left out.

    Args:
      values: float64 [images].
      owners: int [images], below `prompts`: which prompt each is of.
    """
    known = np.isfinite(values)
    sums = np.bincount(owners[known], values[known], prompts)
    return sums, np.bincount(owners[known], minlength=prompts).astype(np.float64)


def members(counts: np.ndarray, categories: np.ndarray) -> list[np.ndarray]:
    """The numbers of the prompts with a value, for each category.

    Args:
      counts, categories: as in `bootstrap`.
    """
    order = np.argsort(categories, kind="stable")
    borders = np.cumsum(np.bincount(categories))[:-1]
    return [part[counts[part] > 0] for part in np.split(order, borders)] if len(order) else []


def bootstrap(
    sums: np.ndarray,
    counts: np.ndarray,
    categories: np.ndarray,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Estimate, list[Estimate]]:
    """The mean of the categories' means, and each category's mean, with percentile intervals.

    A category of one prompt has no interval, as nothing says how prompts differ there. If there is
    such a category, then the overall interval comes from prompts drawn out of all of them: wider
    than it need be, but not too narrow.

    Args:
      sums, counts: float64 [prompts], as `by_prompt` gives them; prompts without a value, and
        categories without one, are left out.
      categories: int [prompts], from 0.

    Returns:
      overall, and by category, NaN for one without a value.
    """
    random = np.random.default_rng(seed)
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    total, estimates, values = np.zeros(resamples), [], []
    for inside in members(counts, categories):
        value = _mean(sums[inside], counts[inside])
        interval = (np.nan, np.nan)
        if len(inside) > 1:
            drawn = _resampled_means(random, sums[inside], counts[inside], resamples)
            interval = np.percentile(drawn, tails)
            total += drawn
        estimates.append(Estimate(value, *map(float, interval)))
        values += [value] * (len(inside) > 0)
    interval = (np.nan, np.nan)
    if len(values) and sum(np.isfinite(e.low) for e in estimates) == len(values):
        interval = np.percentile(total / len(values), tails)
    elif np.count_nonzero(counts) > 1:
        weights = _weights(counts, categories)
        used = np.flatnonzero(counts)
        scaled = (sums * weights)[used], (counts * weights)[used]
        interval = np.percentile(_resampled_means(random, *scaled, resamples), tails)
    value = float(np.mean(values)) if values else np.nan
    return Estimate(value, *map(float, interval)), estimates


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    owners: np.ndarray,
    categories: np.ndarray,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Difference, list[Difference]]:
    """How much higher `second` is than `first`, overall and in each category.

    The interval is the bootstrap's of the pairs' differences, so both runs see the same drawn
    prompts. p is of the sign-flip test: were the runs alike, then in each prompt either could be
    the first; it is the share of such flips whose mean is at least as far from 0, the one seen
    included (Phipson and Smyth, 2010), so never 0.

    Args:
      first, second: float64 [pairs], of the same prompt and seed; a pair with a NaN is left out.
      owners: int [pairs], which prompt each is of.
      categories: int [prompts].
    """
    sums, counts = by_prompt(second - first, owners, len(categories))
    overall, each = bootstrap(sums, counts, categories, confidence, resamples, seed)
    random = np.random.default_rng(seed)
    weighted = sums * _weights(counts, categories)
    everyone = np.flatnonzero(counts)

    def tested(estimate: Estimate, inside: np.ndarray) -> Difference:
        p = _sign_flips(random, weighted[inside], resamples)
        return Difference(estimate.value, estimate.low, estimate.high, p)

    parts = members(counts, categories)
    return tested(overall, everyone), [
        tested(estimate, inside) for estimate, inside in zip(each, parts, strict=True)
    ]


def _mean(sums: np.ndarray, counts: np.ndarray) -> float:
    return float(sums.sum() / counts.sum()) if len(counts) else np.nan


def _weights(counts: np.ndarray, categories: np.ndarray) -> np.ndarray:
    """Of each prompt: with them, all images' weighted mean is the mean of the categories'."""
    return 1 / np.maximum(np.bincount(categories, counts), 1)[categories]


def _resampled_means(random, sums: np.ndarray, counts: np.ndarray, resamples: int) -> np.ndarray:
    """The means of as many prompts, drawn with replacement; float64 [resamples]."""
    means = []
    for rows in _blocks(resamples, len(sums)):
        drawn = random.integers(len(sums), size=(rows, len(sums)), dtype=np.int32)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _sign_flips(random, weighted: np.ndarray, resamples: int) -> float:
    """The share of sign flips with a sum as far from 0 as the sum is; NaN if there is none."""
    if not len(weighted):
        return np.nan
    # Sums that are equal but for rounding count as equal: a flip may add up in another order.
    seen = abs(weighted.sum()) - 1e-9 * np.abs(weighted).sum()
    as_far = 1
    for rows in _blocks(resamples, len(weighted)):
        signs = 2.0 * random.integers(2, size=(rows, len(weighted)), dtype=np.int8) - 1
        as_far += np.count_nonzero(np.abs(signs @ weighted) >= seen)
    return float(as_far / (resamples + 1))


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """Parts of so many rows, such that no part has more than BLOCK_ELEMENTS."""
    at_once = max(1, BLOCK_ELEMENTS // columns)
    while rows > 0:
        yield min(rows, at_once)
        rows -= at_once
