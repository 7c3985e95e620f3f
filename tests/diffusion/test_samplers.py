"""Samplers against a distribution whose probability flow is known in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion.samplers import SAMPLERS, sample, sampler_table
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.errors import InputError

MEAN, DEVIATION = 0.7, 0.4
SCHEDULE = NoiseSchedule(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
)


def gaussian_denoiser(x, timestep, alpha, sigma):
    """E[x_0 | x] where x_0 is normal: what a perfectly trained network would say."""
    variance = alpha**2 * DEVIATION**2 + sigma**2
    return MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)


def error(name, steps, schedule=SCHEDULE):
    """The largest distance to the exact flow, which keeps each point's quantile."""
    noise = jnp.linspace(-2.0, 2.0, 9)[:, None]
    table = sampler_table(name, schedule, steps)
    x0 = sample(gaussian_denoiser, noise, table.initial_scale, table.columns())
    return float(jnp.abs(x0 - (MEAN + DEVIATION * noise)).max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_converge_to_the_exact_flow(name):
    assert error(name, 500) < 0.02
    assert error(name, 500) < error(name, 50) < error(name, 10)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_the_second_order_solver_is_nearer_at_equal_steps(steps):
    assert error("dpmpp_2m", steps) < error("ddim", steps)


def test_one_step_from_pure_noise_gives_the_mean():
    table = sampler_table("ddim", SCHEDULE, 1)
    x0 = sample(gaussian_denoiser, jnp.ones((1, 1)), table.initial_scale, table.columns())
    np.testing.assert_allclose(x0, MEAN, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_ends_without_noise(name):
    table = sampler_table(name, SCHEDULE, 8)
    assert table.a[-1] == 0
    assert table.b[-1] == 1
    assert table.c[-1] == 0


@pytest.mark.parametrize("steps", [0, 1000])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(InputError, match="must be 1 to 999"):
        sampler_table("ddim", SCHEDULE, steps)


def test_noise_prediction_from_pure_noise_is_refused():
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(InputError, match="epsilon cannot start from pure noise"):
        sampler_table("ddim", schedule, 5)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_signal_only_falls(beta_schedule):
    bars = NoiseSchedule(beta_schedule=beta_schedule).alpha_bars()
    assert bars.shape == (1000,)
    assert bars.dtype == np.float64
    assert (np.diff(bars) < 0).all()
    assert bars[0] > 0.99
    assert 0 < bars[-1] < 0.01


def test_zero_snr_rescaling_keeps_the_first_timestep_and_ends_at_zero():
    plain = NoiseSchedule(beta_schedule="scaled_linear").alpha_bars()
    rescaled = NoiseSchedule(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    assert rescaled.alpha_bars()[0] == pytest.approx(plain[0])
    assert rescaled.alpha_bars()[-1] == 0


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "karras"},
        {"use_karras_sigmas": True},
        {"clip_sample": True},
    ],
)
def test_what_would_change_the_result_is_refused_by_name(config):
    with pytest.raises(InputError, match=next(iter(config))):
        NoiseSchedule.from_json(config)
