import math
import subprocess
import sys

import numpy as np
import pytest

from jaxdiff.checks import BadValueError
from jaxdiff.diffusion.samplers import FLOW_CLASS, SAMPLERS, max_steps, sampler_table
from jaxdiff.diffusion.schedule import Clamp, NoiseSchedule
from jaxdiff.diffusion.scheduler_config import check_steps, noise_schedule
from jaxdiff.errors import InputError

SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_signal_decreases(beta_schedule):
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


def test_a_stable_diffusion_config_is_read_for_every_sampler():
    spacings = {name: noise_schedule(SD15, name).timestep_spacing for name in SAMPLERS}
    leading = {name for name, spacing in spacings.items() if spacing == "leading"}
    assert leading == {"ddim", "ddpm", "pndm", "lcm"}
    for name in SAMPLERS:
        assert noise_schedule(SD15, name).beta_end == 0.012
    assert not noise_schedule(SD15, "ddim").set_alpha_to_one
    assert noise_schedule({}, "ddim").set_alpha_to_one
    assert not noise_schedule({}, "pndm").set_alpha_to_one


def test_defaults_written_by_another_class_are_ignored():
    written = {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert noise_schedule(written, "euler").timestep_spacing == "linspace"
    own = {**written, "timestep_spacing": "trailing", "_class_name": "EulerDiscreteScheduler"}
    assert noise_schedule(own, "euler").timestep_spacing == "trailing"


def test_keys_unknown_to_the_sampler_are_ignored():
    strange = {"clip_sample": True, "thresholding": True, "rescale_betas_zero_snr": True, "x": 1}
    assert not noise_schedule(strange, "pndm").rescale_betas_zero_snr
    assert noise_schedule(strange, "euler").rescale_betas_zero_snr


@pytest.mark.parametrize(
    ("sampler", "config"),
    [
        ("ddim", {"beta_schedule": "sigmoid"}),
        ("pndm", {"prediction_type": "sample"}),
        ("pndm", {"skip_prk_steps": False}),
        ("ddim", {"timestep_spacing": "karras"}),
        ("ddim", {"clip_sample": "yes"}),
        ("unipc", {"thresholding": None}),
        ("ddpm", {"variance_type": "learned_range"}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {"timestep_type": "continuous"}),
        ("heun", {"trained_betas": [0.1] * 1000}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}),
        ("dpmpp_2m", {"lambda_min_clipped": -5.1}),
        ("dpmpp_2m_sde", {"solver_order": 3}),
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2m", {"use_flow_sigmas": True}),
        ("unipc", {"predict_x0": False}),
        ("unipc", {"disable_corrector": [0]}),
        ("unipc", {"final_sigmas_type": {"zero": 1}}),
        ("euler", {"_class_name": FLOW_CLASS, "time_shift_type": "cubic"}),
        ("euler", {"_class_name": FLOW_CLASS, "stochastic_sampling": True}),
    ],
)
def test_unsupported_keys_are_rejected_by_name(sampler, config):
    key = list(config)[-1]
    with pytest.raises(InputError, match=rf"scheduler_config.json: {key} = .* set it to ") as error:
        noise_schedule(config, sampler)
    assert len(str(error.value).splitlines()) == 1


def clamp(sampler, **config):
    return noise_schedule(config, sampler).clamp


def test_clamping_is_read_as_from_config_does():
    clips = {name for name in SAMPLERS if clamp(name)}
    assert clips == {"ddim", "ddpm"}  # by default
    both = {"clip_sample": True, "clip_sample_range": 2, "thresholding": True}
    thresholds = {"ddim", "ddpm", "lcm", "dpmpp_2m", "dpmpp_2m_sde", "unipc"}
    for name in SAMPLERS:
        known = {"heun": Clamp(2.0)} | dict.fromkeys(thresholds, Clamp(1.0, 0.995))
        assert clamp(name, **both) == known.get(name)
        assert clamp(name, clip_sample=False) is None
    left_out = {"clip_sample": False, "_use_default_values": ["clip_sample"]}
    assert clamp("ddim", **left_out) == Clamp(1.0)
    assert clamp("ddim", _class_name="DDIMScheduler", **left_out) is None
    numbers = {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    assert clamp("unipc", thresholding=True, **numbers) == Clamp(1.5, 0.9)
    assert clamp("euler", _class_name=FLOW_CLASS, **both) is None


@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample_range": 0},
        {"clip_sample_range": -1.0},
        {"clip_sample_range": None},
        {"clip_sample_range": math.inf},
        {"dynamic_thresholding_ratio": 1.01},
        {"dynamic_thresholding_ratio": -0.1},
        {"dynamic_thresholding_ratio": "0.995"},
        {"sample_max_value": 0},
        {"sample_max_value": math.nan},
        {"sample_max_value": True},
    ],
)
def test_impossible_clamps_are_rejected_by_name(config):
    with pytest.raises(InputError, match=f"scheduler_config.json: {next(iter(config))} = .* must"):
        noise_schedule(config, "ddim")


@pytest.mark.parametrize(
    "config",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"num_train_timesteps": True},
        {"num_train_timesteps": 1},
        {"beta_start": math.nan},
        {"beta_end": None},
        {"beta_end": 1.5},
        {"beta_end": 0.9},
        {"steps_offset": -1},
        {"steps_offset": 500},
        {"sigma_max": 0},
    ],
)
def test_impossible_numbers_are_rejected_by_name(config):
    with pytest.raises(InputError, match=next(iter(config))):
        noise_schedule(config, "euler")


def test_two_sigma_spacings_at_once_are_rejected():
    config = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    with pytest.raises(InputError, match="keep one of them"):
        noise_schedule(config, "euler")
    assert noise_schedule(config, "ddim")


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if row.flow])
def test_a_flow_schedule_goes_straight_from_noise_to_the_image(sampler):
    schedule = noise_schedule({"_class_name": FLOW_CLASS, "shift": 3.0}, sampler)
    assert schedule.prediction_type == "flow"
    table = sampler_table(sampler, schedule, 10)
    np.testing.assert_allclose(table.alpha + table.sigma, 1.0)
    assert table.sigma[0] == pytest.approx(1, abs=1e-3)
    assert (np.diff(table.sigma) <= 0).all()


def test_samplers_that_do_not_fit_flow_are_refused_by_name():
    config = {"_class_name": FLOW_CLASS, "shift": 3.0}
    with pytest.raises(InputError, match=r"ddim does not .* euler, heun, dpmpp_2m, unipc"):
        noise_schedule(config, "ddim")


def test_a_dynamic_shift_is_computed_by_the_models_family():
    schedule = noise_schedule({"_class_name": FLOW_CLASS, "use_dynamic_shifting": True}, "euler")
    with pytest.raises(InputError, match="use_dynamic_shifting is not supported with this model"):
        sampler_table("euler", schedule, 10)
    assert schedule.shifted_for(4096).shift == pytest.approx(math.exp(1.15))


def test_one_step_cannot_end_at_a_terminal_noise_level():
    config = {"_class_name": FLOW_CLASS, "shift_terminal": 0.02}
    check_steps("euler", 2, [config])
    with pytest.raises(BadValueError, match="steps must be at least 2"):
        check_steps("euler", 1, [config])


def test_the_maximum_steps_of_each_sampler():
    def most(sampler, **changes):
        return max_steps(sampler, noise_schedule({**SD15, **changes}, sampler))

    assert {name: most(name) for name in SAMPLERS} == {
        **{"ddim": 999, "ddpm": 999, "pndm": 999, "lcm": 50},
        **{"euler": 1000, "euler_ancestral": 1000, "heun": 1000},
        **{"dpmpp_2m": 999, "dpmpp_2m_sde": 999, "unipc": 999},
    }
    assert most("dpmpp_2m", timestep_spacing="leading") == 998
    assert most("unipc", timestep_spacing="trailing") == 1000


def test_sampler_tables_do_not_need_jax():
    code = "import sys, jaxdiff.diffusion.samplers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
