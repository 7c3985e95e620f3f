"""Statistics of an image's pixels, compared with SciPy, PIL and closed forms."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxdiff.evaluation import measures
from jaxdiff.evaluation.statistics import image_statistics, thumbnail_features

LUMA = np.array([0.2126, 0.7152, 0.0722])


def flat(red: int, green: int, blue: int, height: int = 5, width: int = 7) -> np.ndarray:
    return np.full((height, width, 3), (red, green, blue), np.uint8)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)


def test_every_statistic_is_a_measure_of_images(noise):
    statistics = image_statistics(noise)
    assert set(statistics) <= set(measures.OF_IMAGES)
    assert all(type(value) is float for value in statistics.values())


def test_light_and_sharpness_match_scipy(noise):
    statistics, luma = image_statistics(noise), noise @ LUMA
    assert statistics["brightness"] == pytest.approx(luma.mean() / 255, rel=1e-6)
    assert statistics["contrast"] == pytest.approx(luma.std() / 255, rel=1e-6)
    expected = ndimage.laplace(luma, mode="mirror").var()
    assert statistics["sharpness"] == pytest.approx(expected, rel=1e-6)


def test_colorfulness_matches_the_papers_formula(noise):
    red, green, blue = noise.astype(float).reshape(-1, 3).T
    rg, yb = red - green, 0.5 * (red + green) - blue
    spread, mean = np.sqrt(rg.var() + yb.var()), np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert image_statistics(noise)["colorfulness"] == pytest.approx(spread + 0.3 * mean, rel=1e-6)


@pytest.mark.parametrize(
    ("color", "brightness", "colorfulness"),
    [
        ((0, 0, 0), 0, 0),
        ((255, 255, 255), 1, 0),
        ((128, 128, 128), 128 / 255, 0),
        ((255, 0, 0), 0.2126, 0.3 * 255 * np.sqrt(1.25)),
    ],
)
def test_a_flat_image_has_no_detail(color, brightness, colorfulness):
    statistics = image_statistics(flat(*color))
    assert statistics["brightness"] == pytest.approx(brightness, abs=1e-6)
    assert statistics["colorfulness"] == pytest.approx(colorfulness, rel=1e-6)
    assert statistics["contrast"] == pytest.approx(0, abs=1e-6)
    assert statistics["sharpness"] == pytest.approx(0, abs=1e-6)


def test_blur_lowers_sharpness(noise):
    blurred = ndimage.gaussian_filter(noise, (1, 1, 0))
    assert image_statistics(blurred)["sharpness"] < image_statistics(noise)["sharpness"] / 10


def test_a_thumbnail_has_the_mean_of_each_part():
    pixels = np.random.default_rng(1).integers(0, 256, (64, 32, 3), np.uint8)
    expected = pixels.reshape(8, 8, 8, 4, 3).mean(axis=(1, 3)) / 255
    features = thumbnail_features(pixels)
    assert (features.dtype, features.shape) == (np.float32, (192,))
    np.testing.assert_allclose(features, expected.reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("size", [(37, 50), (1, 3), (8, 8), (9, 700)])
def test_a_thumbnail_of_any_size_keeps_the_mean(size):
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8)
    thumbnail = thumbnail_features(pixels).reshape(8, 8, 3)
    np.testing.assert_allclose(thumbnail.mean(axis=(0, 1)), pixels.mean(axis=(0, 1)) / 255, 1e-5)


def test_a_thumbnail_matches_pils_box_filter_before_rounding():
    pixels = np.random.default_rng(3).integers(0, 256, (40, 80, 3), np.uint8)
    rounded = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BOX))
    thumbnail = thumbnail_features(pixels).reshape(8, 8, 3) * 255
    assert np.abs(thumbnail - rounded).max() < 1


def test_an_image_may_be_one_pixel():
    assert image_statistics(flat(10, 20, 30, 1, 1))["sharpness"] == 0
    np.testing.assert_allclose(thumbnail_features(flat(0, 51, 255, 1, 1))[:3], [0, 0.2, 1])
