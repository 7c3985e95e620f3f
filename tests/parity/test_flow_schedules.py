"""Flow schedules have the pipelines' own numbers, and the samplers visit the same points."""

from dataclasses import replace

import numpy as np
import pytest
from trajectories import SEED, SHAPE, difference, network, ours

from jaxdiff.diffusion.samplers import FLOW_CLASS, sampler_table
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.families.flow import empirical_mu

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps  # noqa: E402
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # noqa: E402

DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}
QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
STEPS = (2, 4, 28)
TOKENS = (24, 1024, 4096)


def table(config, tokens, steps, *, uniform=True, mu=None):
    schedule = noise_schedule({"_class_name": FLOW_CLASS, **config}, "euler")
    schedule = schedule.shifted_by(mu) if mu else schedule.shifted_for(tokens)
    return sampler_table("euler", replace(schedule, uniform_flow=uniform), steps)


def scheduler(name, config):
    return getattr(diffusers, name).from_config(config)


def assert_same_numbers(ours, theirs):
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=2e-6, atol=1e-3)
    np.testing.assert_allclose(ours.sigma, theirs.sigmas[:-1].numpy(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "config",
    [{"shift": 1.0}, {"shift": 3.0}, DYNAMIC, DYNAMIC | {"time_shift_type": "linear"}, QWEN],
)
def test_pipelines_with_even_sigmas(config, tokens, steps):
    """Flux.1, Z-Image and Qwen-Image; static, dynamic and stretched to a terminal sigma."""
    reference = scheduler(FLOW_CLASS, config)
    named = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(reference.config[name] for name in named))
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(reference, steps, "cpu", sigmas=sigmas, mu=mu)
    assert_same_numbers(table(config, tokens, steps), reference)


@pytest.mark.parametrize("steps", STEPS)
def test_stable_diffusion_3_shifts_twice(steps):
    reference = scheduler(FLOW_CLASS, {"shift": 3.0})
    reference.set_timesteps(steps)
    assert_same_numbers(table({"shift": 3.0}, 0, steps, uniform=False), reference)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", [*TOKENS, 4301])
def test_flux_2_has_an_empirical_mu(tokens, steps):
    mu = empirical_mu(tokens, steps)
    assert mu == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-6)
    reference = scheduler(FLOW_CLASS, DYNAMIC)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(reference, steps, "cpu", sigmas=sigmas, mu=mu)
    assert_same_numbers(table(DYNAMIC, tokens, steps, mu=mu), reference)


def walk(reference, steps):
    """Returns the timesteps, and the points that a diffusers scheduler visits."""
    reference.set_timesteps(steps)
    generator = torch.Generator("cpu").manual_seed(SEED)
    height, width, channels = SHAPE
    x = torch.randn((1, channels, height, width), generator=generator)
    points = []
    for timestep in reference.timesteps:
        points.append(x)
        output = network(x, timestep, torch.tanh)
        x = reference.step(output, timestep, x).prev_sample
    points = torch.cat([*points, x]).permute(0, 2, 3, 1).numpy()
    return reference.timesteps.numpy(), points


MULTISTEP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
REFERENCES = {
    "euler": (FLOW_CLASS, {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", MULTISTEP),
    "unipc": ("UniPCMultistepScheduler", MULTISTEP),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 50])
@pytest.mark.parametrize("sampler", REFERENCES)
def test_trajectories(sampler, steps):
    """Users of diffusers replace the scheduler of a pipeline by one of these."""
    file = {"_class_name": FLOW_CLASS, "shift": 3.0}
    name, changes = REFERENCES[sampler]
    reference = getattr(diffusers, name).from_config(file, **changes)
    assert difference(ours(sampler, file, steps), walk(reference, steps)) <= 1e-3


def test_a_file_of_a_multistep_solver_may_ask_for_flow():
    """Sana's does."""
    file = {"_class_name": "DPMSolverMultistepScheduler", **MULTISTEP}
    reference = diffusers.DPMSolverMultistepScheduler.from_config(file)
    assert difference(ours("dpmpp_2m", file, 20), walk(reference, 20)) <= 1e-3
