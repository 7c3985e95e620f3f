import numpy as np
import pytest

from jaxdiff.diffusion import guidance, objective

RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 3, 8, 8, 4))
ALPHA, SIGMA = 0.6, 0.8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_the_image_back(prediction_type):
    x = objective.noisy(X0, NOISE, ALPHA, SIGMA)
    output = objective.target(X0, NOISE, ALPHA, SIGMA, prediction_type)
    np.testing.assert_allclose(objective.to_x0(output, x, ALPHA, SIGMA, prediction_type), X0)


def test_v_is_the_velocity_of_the_circle_from_image_to_noise():
    angle, step = np.arctan2(SIGMA, ALPHA), 1e-6

    def point(phi):
        return objective.noisy(X0, NOISE, np.cos(phi), np.sin(phi))

    velocity = (point(angle + step) - point(angle - step)) / (2 * step)
    target = objective.target(X0, NOISE, ALPHA, SIGMA, "v_prediction")
    np.testing.assert_allclose(target, velocity, atol=1e-6)


def test_guidance_is_each_images_own():
    unconditional, conditional = RNG.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    scale = np.array([1.0, 0.0, 5.0], np.float32)
    mixed = guidance.guide(guidance.paired(unconditional, conditional), scale)
    np.testing.assert_allclose(mixed[0], conditional[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], unconditional[1], atol=1e-6)
    expected = unconditional[2] + 5 * (conditional[2] - unconditional[2])
    np.testing.assert_allclose(mixed[2], expected, atol=1e-5)
