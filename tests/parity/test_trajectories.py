"""Each sampler's table, walked with a fixed nonlinear "network", visits diffusers' points."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.objective import to_x0
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.errors import InputError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02), "squaredcos_cap_v2": (0, 0)}
NOISE = np.random.default_rng(0).standard_normal(64)


def network(x, timestep, tanh=np.tanh):
    return timestep / 1000 * x + 0.2 * tanh(x - timestep / 1000)


def config(betas, **others) -> dict:
    start, end = BETAS[betas]
    return dict(beta_schedule=betas, beta_start=start, beta_end=end, clip_sample=False, **others)


def their_trajectory(sampler, config, steps):
    """Timesteps, and the network's input at each of them, then the result."""
    scheduler = SCHEDULERS[sampler].from_config(config)
    scheduler.set_timesteps(steps)
    x = torch.tensor(NOISE, dtype=torch.float32) * scheduler.init_noise_sigma
    points = []
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        points.append(scaled.numpy())
        x = scheduler.step(network(scaled, timestep, torch.tanh), timestep, x).prev_sample
    return scheduler.timesteps.numpy(), np.array([*points, x.numpy()])


def our_trajectory(sampler, config, steps):
    schedule = NoiseSchedule.from_json(config)
    table = samplers.sampler_table(sampler, schedule, steps)
    x, previous = NOISE * table.initial_scale, np.zeros_like(NOISE)
    points = [x]
    for i, timestep in enumerate(table.timesteps):
        output = network(x, timestep)
        estimate = to_x0(output, x, table.alpha[i], table.sigma[i], schedule.prediction_type)
        x = table.a[i] * x + table.b[i] * estimate + table.c[i] * previous
        previous = estimate
        points.append(x)
    return table.timesteps, np.array(points)


def assert_same(ours, theirs, case=None):
    """Within 1e-3 of the points' size, or the noise's where that is larger."""
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-2)  # they keep float32 timesteps
    size = np.maximum(np.linalg.norm(theirs[1], axis=1), np.linalg.norm(NOISE))
    assert (np.linalg.norm(ours[1] - theirs[1], axis=1) <= 1e-3 * size).all(), case


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_trajectories(sampler, betas, prediction, spacing):
    for zero_snr, offset, steps in itertools.product((False, True), (0, 1), (1, 2, 7, 20, 50)):
        case = config(
            betas,
            prediction_type=prediction,
            steps_offset=offset,
            rescale_betas_zero_snr=zero_snr,
            **({"timestep_spacing": spacing} if spacing else {}),
        )
        theirs = their_trajectory(sampler, case, steps)
        if not np.isfinite(theirs[1]).all():  # they divide by alpha = 0 there
            with pytest.raises(InputError, match="pure noise"):
                our_trajectory(sampler, case, steps)
            continue
        assert_same(our_trajectory(sampler, case, steps), theirs, (zero_snr, offset, steps))


@pytest.mark.parametrize("steps", [1, 20])
def test_ddim_may_end_at_the_first_timesteps_noise(steps):
    case = config("scaled_linear", set_alpha_to_one=False)
    assert_same(our_trajectory("ddim", case, steps), their_trajectory("ddim", case, steps))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_scan_ends_where_their_loop_ends(sampler):
    case = config("scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing")
    table = samplers.sampler_table(sampler, NoiseSchedule.from_json(case), 20)

    def denoise(x, timestep, alpha, sigma):
        return to_x0(network(x, timestep, jnp.tanh), x, alpha, sigma, "v_prediction")

    noise = jnp.asarray(NOISE, jnp.float32)
    ours = samplers.sample(denoise, noise, table.initial_scale, table.columns())
    theirs = their_trajectory(sampler, case, 20)[1][-1]
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(NOISE)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_step_for_nearly_every_timestep(sampler, spacing):
    case = config("scaled_linear", steps_offset=1, timestep_spacing=spacing)
    assert_same(our_trajectory(sampler, case, 997), their_trajectory(sampler, case, 997))


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("steps", [-1, 0, 1000, 10**9])
def test_more_steps_than_timesteps_are_refused(sampler, steps):
    with pytest.raises(InputError, match=f"steps = {steps} "):
        our_trajectory(sampler, config("scaled_linear"), steps)


def test_steps_that_the_offset_pushes_out_of_the_table_are_refused():
    case = config("scaled_linear", steps_offset=1, timestep_spacing="leading")
    with pytest.raises(InputError, match="steps_offset = 1"):
        our_trajectory("dpmpp_2m", case, 999)
