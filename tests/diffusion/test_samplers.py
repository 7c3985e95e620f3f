"""Tests samplers on a distribution whose probability flow is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.samplers import SAMPLERS, sampler_table
from jaxdiff.diffusion.sampling import Stretch, sample
from jaxdiff.diffusion.schedule import Clamp
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.errors import InputError

MEAN, DEVIATION = 0.7, 0.4
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde")
DETERMINISTIC = tuple(name for name in SAMPLERS if name not in (*STOCHASTIC, "lcm"))
SECOND_ORDER = ("pndm", "heun", "dpmpp_2m", "unipc")


def schedule(sampler="ddim", **config):
    common = {"clip_sample": False, "prediction_type": "v_prediction"}
    return noise_schedule({**common, **BETAS, **config}, sampler)


def table_of(sampler, steps, *, eta=0.0, begin=0, **config):
    return sampler_table(sampler, schedule(sampler, **config), steps, eta=eta, begin=begin)


def gaussian_denoiser(x, timestep, alpha, sigma, kept=None):
    """Returns E[x_0 | x] for a normal x_0, as a perfectly trained network would."""
    variance = alpha**2 * DEVIATION**2 + sigma**2
    return MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN), kept


def run(table, noise, fresh_noise=None, stretches=None, **options):
    stretches = stretches or [Stretch(len(table.timesteps), gaussian_denoiser)]
    return sample(stretches, noise, table.initial_scale, table.columns(), fresh_noise, **options)


def error(name, steps):
    """Returns the largest distance to the exact flow, which preserves each point's quantile."""
    noise = jnp.linspace(-2.0, 2.0, 9)[:, None]
    table = table_of(name, steps, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    return float(jnp.abs(run(table, noise) - (MEAN + DEVIATION * noise)).max())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_samplers_converge_to_the_exact_flow(name):
    # diffusers' PLMS and Heun do not support zero SNR: they start where some signal is expected.
    assert error(name, 500) < (0.03 if name in ("pndm", "heun") else 0.01)
    assert error(name, 500) < error(name, 10)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "unipc"])
def test_a_second_order_solver_is_more_accurate_at_equal_steps(name, steps):
    exact = error(name, 900)  # the limit, which the schedule's ends keep above 0
    assert abs(error(name, steps) - exact) < abs(error("euler", steps) - error("euler", 900))


@pytest.mark.parametrize("name", [*STOCHASTIC, "ddim"])
def test_stochastic_samplers_reproduce_the_distribution(name):
    table = table_of(name, 500, timestep_spacing="trailing", eta=1.0)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2048, 1), np.float32)
    fresh = rng.standard_normal((table.draws, 2048, 1), np.float32)
    x0 = np.asarray(run(table, noise, fresh))
    assert table.draws >= 498
    assert x0.mean() == pytest.approx(MEAN, abs=0.03)
    assert x0.std() == pytest.approx(DEVIATION, abs=0.03)
    assert abs(np.corrcoef(x0[:, 0], noise[:, 0])[0, 1]) < 0.2  # the start is nearly forgotten


def test_eta_scales_the_fresh_noise():
    scales = [table_of("ddim", 20, eta=eta).s.max() for eta in (0.0, 0.5, 1.0)]
    assert scales[0] == 0
    assert scales[1] == pytest.approx(scales[2] / 2)
    np.testing.assert_allclose(
        table_of("ddim", 20, eta=1.0).s[:-1], table_of("ddpm", 20).s[:-1], rtol=1e-12
    )


def test_one_step_from_pure_noise_gives_the_mean():
    table = table_of("ddim", 1, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    np.testing.assert_allclose(run(table, jnp.ones((1, 1))), MEAN, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_the_last_step_ends_without_noise(name):
    table = table_of(name, 8, timestep_spacing="trailing")
    assert table.a[-1] == pytest.approx(0, abs=1e-4)  # LCM keeps a trace of x
    assert table.b[-1, 0] == pytest.approx(1, abs=1e-4)
    assert not table.b[-1, 1:].any()
    assert table.s[-1] == 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_several_denoisers_in_turn_give_the_same_as_one(name):
    table = table_of(name, 9)
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((3, 4), np.float32)
    fresh = rng.standard_normal((table.draws, 3, 4), np.float32) if table.draws else None
    rows = len(table.timesteps)
    parts = [Stretch(length, gaussian_denoiser) for length in (2, 1, rows - 3)]
    np.testing.assert_allclose(
        run(table, noise, fresh, parts), run(table, noise, fresh), rtol=0, atol=2e-6
    )


def denoiser_that_keeps(x, timestep, alpha, sigma, kept):
    """Adds the timestep of the last full evaluation to the estimate."""
    kept = timestep if kept is None else kept
    estimate, _ = gaussian_denoiser(x, timestep, alpha, sigma)
    return estimate + kept / 1000, kept


@pytest.mark.parametrize("whole_every", [2, 3, 4, 7, 100])
def test_every_nth_row_of_a_denoiser_is_evaluated_in_full(whole_every):
    table, noise = table_of("ddim", 9), jnp.ones((1, 2))
    lengths, state, row = (2, 7), noise * table.initial_scale, 0
    for length in lengths:  # DDIM, which uses one estimate, written out
        for turn in range(length):
            if turn % whole_every == 0:
                kept = table.timesteps[row]
            estimate, _ = denoiser_that_keeps(state, None, table.alpha[row], table.sigma[row], kept)
            state = table.a[row] * state + table.b[row, 0] * (
                table.p[row] * state + table.q[row] * estimate
            )
            row += 1
    stretches = [Stretch(length, denoiser_that_keeps) for length in lengths]
    got = run(table, noise, stretches=stretches, whole_every=whole_every)
    np.testing.assert_allclose(got, state, rtol=1e-4)


@pytest.mark.parametrize("name", ["heun", "unipc", "dpmpp_2m_sde"])
def test_groups_of_rows_change_nothing_for_a_denoiser_that_keeps_nothing(name):
    table = table_of(name, 8)
    noise, fresh = jnp.ones((1, 2)), jnp.ones((max(1, table.draws), 1, 2))
    plain = run(table, noise, fresh)
    each = Stretch(len(table.timesteps), lambda *arguments: gaussian_denoiser(*arguments[:-1]))
    grouped = run(table, noise, fresh, [each], whole_every=3)
    np.testing.assert_allclose(grouped, plain, rtol=1e-5)


def test_denoisers_that_leave_out_rows_are_rejected():
    with pytest.raises(ValueError, match="add up to 9"):
        run(table_of("ddim", 9), jnp.ones((1, 1)), stretches=[Stretch(8, gaussian_denoiser)])


def test_each_denoisers_estimates_are_clamped_in_its_own_way():
    """Tests DDIM written out, whose direction is that of the estimate before clamping."""
    table, noise = table_of("ddim", 4, timestep_spacing="trailing"), jnp.full((1, 1), 2.0)
    clamps = (Clamp(0.1), Clamp(0.5), None)
    alphas, sigmas = np.append(table.alpha, 1.0), np.append(table.sigma, 0.0)
    x = noise
    for row, clamp in enumerate((clamps[0], *clamps)):
        estimate, _ = gaussian_denoiser(x, None, alphas[row], sigmas[row])
        used = jnp.clip(estimate, -clamp.limit, clamp.limit) if clamp else estimate
        epsilon = (x - alphas[row] * estimate) / sigmas[row]
        x = alphas[row + 1] * used + sigmas[row + 1] * epsilon
    lengths = (2, 1, 1)
    stretches = [
        Stretch(rows, gaussian_denoiser, clamp) for rows, clamp in zip(lengths, clamps, strict=True)
    ]
    np.testing.assert_allclose(run(table, noise, stretches=stretches), x, rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_neighbours_do_not_change_an_image(name):
    table = table_of(name, 6)
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((4, 8), np.float32)
    fresh = rng.standard_normal((table.draws, 4, 8), np.float32) if table.draws else None
    batch = jax.jit(lambda x, z: run(table, x, z))(noise, fresh)
    others = [None if fresh is None else fresh[:, [2, 0, 0, 0]], fresh]
    moved = jax.jit(lambda x, z: run(table, x, z))(noise[[2, 0, 0, 0]], others[0])
    np.testing.assert_array_equal(batch[2], moved[0])


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.multistep])
@pytest.mark.parametrize("begin", [1, 4, 7])
def test_another_networks_estimates_are_not_used(name, begin):
    table = table_of(name, 8, begin=begin)
    for row in range(begin, len(table.timesteps)):
        assert not table.b[row, row - begin + 1 :].any()
    whole = table_of(name, 8)
    np.testing.assert_array_equal(table.timesteps, whole.timesteps)
    np.testing.assert_array_equal(table.alpha, whole.alpha)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_number_of_steps_up_to_the_maximum_works(name, offset, spacing):
    config = {**BETAS, "clip_sample": False, "timestep_spacing": spacing, "steps_offset": offset}
    config = {**config, "num_train_timesteps": 100}
    most = samplers.max_steps(name, noise_schedule(config, name))
    assert most >= (20 if offset == 4 else 50)
    for steps in (*range(1, most, 7), most):
        table = table_of(name, steps, **config)
        assert table.timesteps.max() <= 99
        assert table.timesteps.min() >= 0
    for steps in (0, -1, most + 1, 10**9):
        with pytest.raises(InputError, match=rf"steps = {steps} must be 1 to {most}"):
            table_of(name, steps, **config)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm"])
def test_noise_prediction_from_pure_noise_is_rejected(name):
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match="epsilon cannot start from pure noise"):
        table_of(name, 5, prediction_type="epsilon", **config)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_without_lower_order_final_is_rejected(order):
    with pytest.raises(InputError, match="lower_order_final"):
        table_of("unipc", 5, lower_order_final=False, solver_order=order)
