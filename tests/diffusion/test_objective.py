import numpy as np
import pytest

from jaxdiff.diffusion import guidance, objective
from jaxdiff.diffusion.schedule import Clamp

RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 3, 8, 8, 4))
ALPHA, SIGMA = 0.6, 0.8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_recovers_the_image(prediction_type):
    x = objective.noisy(X0, NOISE, ALPHA, SIGMA)
    output = objective.target(X0, NOISE, ALPHA, SIGMA, prediction_type)
    np.testing.assert_allclose(objective.to_x0(output, x, ALPHA, SIGMA, prediction_type), X0)


def test_a_perfect_flow_recovers_the_image():
    x = objective.noisy(X0, NOISE, 0.3, 0.7)
    flow = objective.target(X0, NOISE, 0.3, 0.7, "flow")
    np.testing.assert_allclose(objective.to_x0(flow, x, 0.3, 0.7, "flow"), X0)
    np.testing.assert_allclose(x - 0.7 * flow, X0)  # a straight line


def test_estimates_are_clipped():
    np.testing.assert_allclose(objective.clamped(X0, Clamp(0.3)), np.clip(X0, -0.3, 0.3), rtol=1e-6)


@pytest.mark.parametrize("most", [0.5, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.95, 1.0])
def test_each_image_has_its_own_dynamic_threshold(ratio, most):
    images = X0 * np.array([0.1, 2.0, 5.0])[:, None, None, None]
    for image, got in zip(images, objective.clamped(images, Clamp(most, ratio)), strict=True):
        threshold = min(max(1.0, np.quantile(np.abs(image), ratio)), most)
        np.testing.assert_allclose(
            got, np.clip(image, -threshold, threshold) / threshold, rtol=1e-5
        )


def test_v_is_the_velocity_of_the_circle_from_image_to_noise():
    angle, step = np.arctan2(SIGMA, ALPHA), 1e-6

    def point(phi):
        return objective.noisy(X0, NOISE, np.cos(phi), np.sin(phi))

    velocity = (point(angle + step) - point(angle - step)) / (2 * step)
    target = objective.target(X0, NOISE, ALPHA, SIGMA, "v_prediction")
    np.testing.assert_allclose(target, velocity, atol=1e-6)


def test_each_image_has_its_own_guidance_scale():
    unconditional, conditional = RNG.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    scale = np.array([1.0, 0.0, 5.0], np.float32)
    mixed = guidance.guide(guidance.paired(unconditional, conditional), scale)
    np.testing.assert_allclose(mixed[0], conditional[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], unconditional[1], atol=1e-6)
    expected = unconditional[2] + 5 * (conditional[2] - unconditional[2])
    np.testing.assert_allclose(mixed[2], expected, atol=1e-5)


def test_rescaled_guidance_has_the_conditional_predictions_deviation():
    unconditional, conditional = RNG.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    pairs, scale = guidance.paired(unconditional, conditional), np.full(3, 7.5, np.float32)
    plain = guidance.guide(pairs, scale)
    for none in (None, 0.0, np.zeros(3, np.float32)):
        np.testing.assert_array_equal(guidance.guide(pairs, scale, none), plain)
    phi = np.array([1.0, 0.0, 0.7], np.float32)
    deviations = np.asarray(guidance.guide(pairs, scale, phi)).std(axis=(1, 2, 3))
    theirs, own = conditional.std(axis=(1, 2, 3)), np.asarray(plain).std(axis=(1, 2, 3))
    np.testing.assert_allclose(deviations, phi * theirs + (1 - phi) * own, rtol=1e-5)
    np.testing.assert_allclose(
        guidance.guide(pairs, scale, 0.7)[2], guidance.guide(pairs, scale, phi)[2]
    )
