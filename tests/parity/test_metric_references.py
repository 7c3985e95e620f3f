"""Distances between sets match torchmetrics, given the same features."""

import numpy as np
import pytest

from jaxdiff.evaluation.accumulators import Moments
from jaxdiff.evaluation.distances import frechet_distance, kernel_distance

torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")

from torchmetrics.image.fid import FrechetInceptionDistance  # noqa: E402
from torchmetrics.image.kid import poly_mmd  # noqa: E402

IMAGES, WIDTH = 1200, 64


@pytest.fixture(scope="module")
def sets() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((WIDTH, WIDTH)) / 8
    x, y = (random.standard_normal((IMAGES, WIDTH)) @ mixing for _ in range(2))
    return (x + 0.5).astype(np.float32), (0.8 * y + 0.4).astype(np.float32)


def test_frechet_distance_matches_torchmetrics(sets):
    network = torch.nn.Identity()  # the features are the images
    network.num_features = WIDTH
    metric = FrechetInceptionDistance(network)
    for x, is_real in zip(sets, (True, False), strict=True):
        metric.update(torch.from_numpy(x).double(), real=is_real)
    expected = metric.compute().item()
    ours = frechet_distance(*(Moments.of(x) for x in sets))
    assert ours == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_matches_torchmetrics(sets):
    expected = poly_mmd(*(torch.from_numpy(x).double() for x in sets)).item()
    assert kernel_distance(*sets, "polynomial") == pytest.approx(expected, rel=1e-5)
