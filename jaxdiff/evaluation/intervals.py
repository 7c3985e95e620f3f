"""Confidence intervals of means, and paired differences, bootstrapped over prompts.

A benchmark is a sample of prompts, and images of one prompt resemble each other. The bootstrap
therefore draws prompts, each with all its images (Field and Welsh, "Bootstrapping clustered data",
2007). The overall mean is the mean of the category means, as in GenEval (arXiv 2310.11513); prompts
are drawn within their category, so each draw has the benchmark's structure.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

RESAMPLES = 2000
BLOCK_ELEMENTS = 2**21  # random numbers in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval; NaN for what is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval, and how often chance alone gives one as large (p)."""

    value: float
    low: float
    high: float
    p: float


def wilson(successes, n, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Returns the score interval of a share (Wilson, 1927), which also holds for 0 and n successes.

    Args:
      successes, n: counts, as numbers or arrays of the same shape; where n is 0, the interval is
        0 to 1.

    Returns:
      low and high, float64, of that shape.
    """
    successes, n = np.float64(successes), np.float64(n)
    z2 = special.ndtri((1 + confidence) / 2) ** 2
    middle = (successes + z2 / 2) / (n + z2)
    share = successes / np.maximum(n, 1)
    half = np.sqrt(z2 * (share * (1 - share) * n + z2 / 4)) / (n + z2)
    # At the ends the formula gives exactly 0 and 1, except for rounding.
    low = np.where(successes == 0, 0.0, middle - half)
    high = np.where(successes == n, 1.0, middle + half)
    return low, high


def by_prompt(
    values: np.ndarray, owners: np.ndarray, prompts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum and the count of each prompt's values, float64 [prompts]; NaN is left out.

    Args:
      values: float64 [images].
      owners: int [images], below `prompts`: the index of each image's prompt.
    """
    known = np.isfinite(values)
    sums = np.bincount(owners[known], values[known], prompts)
    return sums, np.bincount(owners[known], minlength=prompts).astype(np.float64)


def members(counts: np.ndarray, categories: np.ndarray) -> list[np.ndarray]:
    """Returns the indices of the prompts with a value, for each category.

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
    """Returns the mean of the category means, and each category's mean, with percentile intervals.

    A category with one prompt has no interval, because the spread of its prompts is unknown. If
    there is one, the overall interval comes from draws across all prompts: wider than necessary,
    but not too narrow.

    Args:
      sums, counts: float64 [prompts], from `by_prompt`; prompts and categories without a value
        are left out.
      categories: int [prompts], from 0.

    Returns:
      the overall estimate, and one for each category, NaN for a category without a value.
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
    """Returns how much higher `second` is than `first`, overall and in each category.

    The interval bootstraps the pairs' differences, so both runs use the same drawn prompts. p comes
    from a sign-flip test: if the runs were alike, they could be swapped in each prompt. p is the
    share of these flips whose mean is at least as far from 0 as the observed one, counting the
    observed one (Phipson and Smyth, 2010), so it is never 0.

    Args:
      first, second: float64 [pairs], of the same prompt and seed; pairs with a NaN are left out.
      owners: int [pairs], the index of each pair's prompt.
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
    """Returns prompt weights that make the mean over all images the mean of the category means."""
    return 1 / np.maximum(np.bincount(categories, counts), 1)[categories]


def _resampled_means(random, sums: np.ndarray, counts: np.ndarray, resamples: int) -> np.ndarray:
    """Returns means of equally many prompts, drawn with replacement: float64 [resamples]."""
    means = []
    for rows in _blocks(resamples, len(sums)):
        drawn = random.integers(len(sums), size=(rows, len(sums)), dtype=np.int32)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _sign_flips(random, weighted: np.ndarray, resamples: int) -> float:
    """Returns the share of sign flips whose sum is as far from 0 as observed; NaN if empty."""
    if not len(weighted):
        return np.nan
    # Sums that differ only by rounding count as equal: a flip may add up in another order.
    seen = abs(weighted.sum()) - 1e-9 * np.abs(weighted).sum()
    as_far = 1
    for rows in _blocks(resamples, len(weighted)):
        signs = 2.0 * random.integers(2, size=(rows, len(weighted)), dtype=np.int8) - 1
        as_far += np.count_nonzero(np.abs(signs @ weighted) >= seen)
    return float(as_far / (resamples + 1))


def _blocks(rows: int, columns: int) -> Iterator[int]:
    """Yields row counts of blocks with at most BLOCK_ELEMENTS elements each."""
    at_once = max(1, BLOCK_ELEMENTS // columns)
    while rows > 0:
        yield min(rows, at_once)
        rows -= at_once
