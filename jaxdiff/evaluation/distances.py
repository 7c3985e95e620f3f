"""Distances between two sets of images, computed from features.

The functions accept features of any network; the network determines what the numbers mean. The
matrix of all pairs is never built: the device processes one block of rows of each set at a time.
"""

from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.evaluation.accumulators import Moments, as_table, check_widths

BLOCK = 1024  # rows
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
Kernel = Literal["rbf", "polynomial"]


def frechet_distance(one: Moments, other: Moments) -> float:
    """Returns the squared Frechet distance of the normal distributions with these moments.

    That is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 1706.08500, with covariances
    over n - 1. With A A' = C1 and B B' = C2, the trace of the root is the sum of the singular
    values of A' B, which keeps full precision even with fewer images than features.

    Raises:
      InputError: for fewer than 2 images, or features of different networks.
    """
    _check("the Frechet distance", 2, one.count, other.count)
    check_widths(len(one.mean), len(other.mean))
    step = one.mean - other.mean
    spread = sum(np.trace(moments.scatter) / (moments.count - 1) for moments in (one, other))
    shared = np.linalg.svd(_factor(one).T @ _factor(other), compute_uv=False).sum()
    return float(max(step @ step + spread - 2 * shared, 0.0))


def _factor(moments: Moments) -> np.ndarray:
    """Returns A with A A' = the covariance: float64 [d, rank]."""
    values, vectors = np.linalg.eigh(moments.scatter / (moments.count - 1))
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def kernel_distance(x: np.ndarray, y: np.ndarray, kernel: Kernel = "rbf") -> float:
    """Returns the squared maximum mean discrepancy of two sets.

    "rbf" is CMMD, Jayasumana et al. 2401.09603, if the features are CLIP embeddings of length 1:
    1000 times the biased estimate with exp(-|x - y|^2 / (2 * 10^2)). "polynomial" is KID, Binkowski
    et al. 1801.01401: the unbiased estimate, which may be negative, with (x.y / d + 1)^3, over all
    images at once where other implementations average over subsets.

    Args:
      x, y: [n, d] and [m, d].

    Raises:
      InputError: for fewer than 2 images, or features that cannot be compared.
    """
    _check("the kernel distance", 2, len(x), len(y))
    x, y = _centered(x, y) if kernel == "rbf" else _tables(x, y)
    between = _total(x, y, kernel) / (len(x) * len(y))
    if kernel == "rbf":
        within = sum(_total(z, z, kernel) / len(z) ** 2 for z in (x, y))
        return SCALE * (within - 2 * between)
    within = sum(_without_diagonal(z) / (len(z) * (len(z) - 1)) for z in (x, y))
    return within - 2 * between


def _without_diagonal(x: np.ndarray) -> float:
    """Returns the polynomial kernel's sum over all pairs of different images."""
    norms = np.einsum("nd,nd->n", x, x, dtype=np.float64)
    return _total(x, x, "polynomial") - float(((norms / x.shape[1] + 1) ** 3).sum())


def _total(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    """Returns a kernel's sum over all pairs; the RBF kernel is reduced by 1 for each pair."""
    total, program = 0.0, _row_sums()
    blocks = _blocks(y)
    for rows, row_count in _blocks(x):
        sums = [program(rows, columns, count, kernel=kernel) for columns, count in blocks]
        total += sum(np.asarray(part)[:row_count].sum(dtype=np.float64) for part in sums)
    return float(total)


@cache
def _row_sums():
    @partial(compilation.jit, static_argnames="kernel")
    def row_sums(x: Array, y: Array, count: Array, *, kernel: Kernel) -> Array:
        """Returns, for each row of x, the kernel's sum over the first `count` rows of y."""
        if kernel == "polynomial":
            values = (_products(x, y) / x.shape[1] + 1) ** 3
        else:  # minus 1: the ones cancel between the sets, and would cost precision
            values = jnp.expm1(-_squared_distances(x, y) / (2 * SIGMA**2))
        return jnp.sum(values, axis=1, where=jnp.arange(len(y)) < count)

    return row_sums


def precision_recall(
    reference: np.ndarray, generated: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Returns precision and recall: how far each set covers the other.

    Kynkaanniemi et al. 1904.06991, equations 1 and 2: precision is the share of generated images
    that are as close to some reference image as its `k`th nearest neighbor in the reference set;
    recall is the same with the sets exchanged.

    Args:
      reference, generated: features [n, d] and [m, d].

    Raises:
      InputError: for fewer than k + 1 images, or features that cannot be compared.
    """
    _check("the precision-recall metric", k + 1, len(reference), len(generated))
    reference, generated = _centered(reference, generated)
    precision = _covered(generated, reference, _radii(reference, k)).mean()
    recall = _covered(reference, generated, _radii(generated, k)).mean()
    return float(precision), float(recall)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the squared distance of each row to the kth nearest other row: float32 [n]."""
    program, blocks, found = _nearest(), _blocks(x), []
    for rows, row_count in blocks:
        nearest = jnp.full((BLOCK, k + 1), jnp.inf)
        for columns, count in blocks:
            nearest = program(nearest, rows, columns, count)
        found.append(np.asarray(nearest)[:row_count, k])  # index 0 is the row itself
    return np.concatenate(found)


def _covered(x: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Finds the rows that are in the ball of at least one center: bool [n]."""
    program, blocks, found = _in_any(), _blocks(centers), []
    # The centers that pad the last block have negative radii, so no row is in their balls.
    sizes = [_padded(radii[s : s + BLOCK], -1.0) for s in range(0, len(radii), BLOCK)]
    for rows, row_count in _blocks(x):
        inside = [
            program(rows, columns, size) for (columns, _), size in zip(blocks, sizes, strict=True)
        ]
        found.append(np.any(inside, axis=0)[:row_count])
    return np.concatenate(found)


@cache
def _nearest():
    @compilation.jit
    def nearest(so_far: Array, x: Array, y: Array, count: Array) -> Array:
        """Updates the k + 1 smallest squared distances with the first `count` rows of y.

        They are ascending: [rows, k + 1].
        """
        distances = jnp.where(jnp.arange(len(y)) < count, _squared_distances(x, y), jnp.inf)
        values, _ = jax.lax.top_k(-jnp.concatenate([so_far, distances], axis=1), so_far.shape[1])
        return -values

    return nearest


@cache
def _in_any():
    @compilation.jit
    def in_any(x: Array, centers: Array, radii: Array) -> Array:
        return jnp.any(_squared_distances(x, centers) <= radii, axis=1)

    return in_any


def _squared_distances(x: Array, y: Array) -> Array:
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)
    return jnp.maximum(norms - 2 * _products(x, y), 0)


def _products(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y.T, precision="highest")  # by default, TPUs round to bfloat16


def _blocks(x: np.ndarray) -> list[tuple[Array, int]]:
    """Returns blocks [BLOCK, d] on the device, each with its number of valid rows."""
    parts = [x[start : start + BLOCK] for start in range(0, len(x), BLOCK)]
    return [(jnp.asarray(_padded(part, 0.0)), len(part)) for part in parts]


def _padded(rows: np.ndarray, value: float) -> np.ndarray:
    missing = [(0, BLOCK - len(rows))] + [(0, 0)] * (rows.ndim - 1)
    return np.pad(rows, missing, constant_values=value)


def _centered(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Subtracts the mean of x from both, where float32 distances are most precise."""
    x, y = _tables(x, y)
    middle = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    return x - middle, y - middle


def _tables(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = as_table(x, np.float32), as_table(y, np.float32)
    check_widths(x.shape[1], y.shape[1])
    return x, y


def _check(metric: str, least: int, *counts: int) -> None:
    if min(counts) < least:
        there = " and ".join(str(count) for count in counts)
        raise InputError(
            f"{metric} needs at least {least} images in each set, but there are {there}; "
            "generate or give more"
        )
