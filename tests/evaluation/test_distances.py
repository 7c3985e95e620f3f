"""Distances between sets, compared with the papers' formulas in float64 and over all pairs."""

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from jaxdiff.errors import InputError
from jaxdiff.evaluation.accumulators import Moments
from jaxdiff.evaluation.distances import frechet_distance, kernel_distance, precision_recall

# More than a block of 1024 rows, but not a multiple of it.
X_ROWS, Y_ROWS, WIDTH = 1500, 1100, 16


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping clouds of points, far from zero."""
    random = np.random.default_rng(0)
    x = random.standard_normal((X_ROWS, WIDTH)) + 5
    y = random.standard_normal((Y_ROWS, WIDTH)) * np.linspace(0.7, 1.2, WIDTH) + 5.2
    return x.astype(np.float32), y.astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(sets) -> list[np.ndarray]:
    """The sets as vectors of length 1, like CLIP's embeddings."""
    return [(x - 4) / np.linalg.norm(x - 4, axis=1, keepdims=True) for x in sets]


def frechet_by_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """Computes the Frechet distance as pytorch-fid and clean-fid do."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    step = x.mean(axis=0) - y.mean(axis=0)
    root = linalg.sqrtm(c1 @ c2).real
    return step @ step + np.trace(c1) + np.trace(c2) - 2 * np.trace(root)


def test_frechet_distance_matches_sqrtm(sets):
    x, y = (z.astype(np.float64) for z in sets)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert distance == pytest.approx(frechet_by_sqrtm(x, y), rel=1e-10)


def test_frechet_distance_of_numbers_matches_the_closed_form():
    one, other = np.array([[-1.0], [1.0]]) / np.sqrt(2), np.array([[1.0], [7.0]]) / np.sqrt(2)
    expected = (8 / np.sqrt(2) / 2) ** 2 + (3 - 1) ** 2  # of means and standard deviations
    assert frechet_distance(Moments.of(one), Moments.of(other)) == pytest.approx(expected)


def test_precision_is_kept_with_fewer_images_than_features():
    random = np.random.default_rng(1)
    x, y = random.standard_normal((2, 10, 64))
    y[5:] = y[0]
    # Uses the singular values of the product of the deviations instead of covariances.
    roots = [(z - z.mean(axis=0)) / 3 for z in (x, y)]
    step = x.mean(axis=0) - y.mean(axis=0)
    shared = linalg.svdvals(roots[0] @ roots[1].T).sum()
    expected = step @ step + sum((root**2).sum() for root in roots) - 2 * shared
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_a_set_has_no_distance_from_itself(sets):
    x, y = sets
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-11)
    assert kernel_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert precision_recall(y, y) == (1, 1)


def test_sets_of_equal_images_have_a_finite_distance(sets):
    x, _ = sets
    flat = np.repeat(x[:1], 5, axis=0)
    expected = ((x.mean(axis=0) - x[0]) ** 2).sum() + x.astype(np.float64).var(axis=0, ddof=1).sum()
    assert frechet_distance(Moments.of(x), Moments.of(flat)) == pytest.approx(expected, rel=1e-6)
    assert precision_recall(x, flat)[0] == 1  # a model that has collapsed to a real image
    assert precision_recall(x, flat)[1] < 0.01


def test_rbf_kernel_distance_is_the_biased_estimate_of_all_pairs(embeddings):
    def mean_kernel(x, y):
        return np.exp(-cdist(x, y, "sqeuclidean") / (2 * 10**2)).mean()

    x, y = (z.astype(np.float64) for z in embeddings)
    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert expected > 0.05
    assert kernel_distance(*embeddings) == pytest.approx(expected, rel=1e-5)


def test_polynomial_kernel_distance_is_the_unbiased_estimate_of_all_pairs(sets):
    def kernel(x, y):
        return (x @ y.T / WIDTH + 1) ** 3

    x, y = (z.astype(np.float64) for z in sets)
    inside = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / len(z) / (len(z) - 1) for z in (x, y)]
    expected = sum(inside) - 2 * kernel(x, y).mean()
    assert kernel_distance(*sets, "polynomial") == pytest.approx(expected, rel=1e-5)


def test_polynomial_kernel_distance_is_zero_on_average():
    random = np.random.default_rng(2)
    draws = [kernel_distance(*random.standard_normal((2, 60, 4)), "polynomial") for _ in range(60)]
    assert min(draws) < 0 < max(draws)
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_all_pairs(sets, k):
    def covered(x, centers):
        radii = np.sort(cdist(centers, centers), axis=1)[:, k]
        return (cdist(x, centers) <= radii).any(axis=1).mean()

    x, y = sets
    expected = covered(y, x), covered(x, y)
    assert all(0.1 < share < 0.99 for share in expected)
    assert precision_recall(x, y, k) == expected


def test_order_and_a_common_shift_change_nothing(sets):
    x, y = sets
    mixed = np.random.default_rng(3).permutation(x)
    assert kernel_distance(mixed, y) == pytest.approx(kernel_distance(x, y), abs=1e-6)
    assert kernel_distance(x + 8, y + 8) == pytest.approx(kernel_distance(x, y), rel=1e-4)
    assert precision_recall(mixed, y) == precision_recall(x, y)


def test_the_error_for_too_few_images_gives_the_minimum(sets):
    x, y = sets
    one = Moments.of(x[:1])
    with pytest.raises(InputError, match=r"Frechet distance needs at least 2 .* 1 and 1100;"):
        frechet_distance(one, Moments.of(y))
    with pytest.raises(InputError, match=r"the kernel distance needs at least 2 .* 1500 and 0;"):
        kernel_distance(x, y[:0])
    with pytest.raises(
        InputError, match=r"precision-recall metric needs at least 4 .* 3 and 1100;"
    ):
        precision_recall(x[:3], y)


def test_features_of_two_networks_are_not_compared(sets):
    x, y = sets
    with pytest.raises(InputError, match="cannot compare 16 with 4 features per image"):
        kernel_distance(x, y[:, :4])
    with pytest.raises(InputError, match="cannot compare 16 with 4 features per image"):
        frechet_distance(Moments.of(x), Moments.of(y[:, :4]))
