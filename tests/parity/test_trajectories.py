"""With a fixed nonlinear "network", each sampler's table visits the same points as diffusers."""

import inspect
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import further
from trajectories import BETAS, CLASSES, SEED, SHAPE, config, difference, network, ours, theirs

from jaxdiff.diffusion import guidance, noise, samplers, sampling
from jaxdiff.diffusion.objective import to_x0
from jaxdiff.diffusion.samplers import FLOW_CLASS, SAMPLERS
from jaxdiff.diffusion.scheduler_config import BUILT, FLOW_CONFIG, noise_schedule
from jaxdiff.errors import InputError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (1, 2, 3, 4, 7, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
RESPACING = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
STOCHASTIC = ("ddim", "ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm")
BOUND = 1e-3
# With cosine betas the first sigma is 20000, of which diffusers' float32 leaves three digits.
COSINE_BOUND = 1e-2
CLIPPING = [{"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.3}]
THRESHOLDING = [
    {"thresholding": True},
    {"thresholding": True, "clip_sample": True, "sample_max_value": 100.0},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 0.5},
]
CLAMPED = [
    *itertools.product(("ddim", "ddpm", "heun", "lcm"), CLIPPING),
    *itertools.product(("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"), THRESHOLDING),
]
# Keys that only matter with another key: for flow matching, which has `FLOW_CONFIG`.
IRRELEVANT = {
    *("shift_terminal", "use_dynamic_shifting"),
    *("base_image_seq_len", "base_shift", "flow_shift", "max_image_seq_len", "max_shift"),
    "time_shift_type",
}


def assert_same(sampler, case, steps, bound=BOUND, **others):
    theirs_ = theirs(sampler, case, steps, **others)
    if np.isfinite(theirs_[1]).all():
        assert difference(ours(sampler, case, steps, **others), theirs_) <= bound, (case, steps)
    elif case["rescale_betas_zero_snr"] and case["prediction_type"] == "epsilon":
        with pytest.raises(InputError, match="pure noise"):  # diffusers divides by alpha = 0
            ours(sampler, case, steps, **others)
    else:  # diffusers takes the root of 0, which is -1e-8 in its float32
        assert np.isfinite(ours(sampler, case, steps, **others)[1]).all()


@pytest.mark.parametrize("sampler", CLASSES)
def test_trajectories(sampler):
    rng = np.random.default_rng(0)
    cases = itertools.product(
        BETAS, ("epsilon", "v_prediction"), (*SPACINGS, None), (False, True), (0, 1)
    )
    for betas, prediction, spacing, zero_snr, offset in cases:
        case = config(
            betas,
            prediction_type=prediction,
            steps_offset=offset,
            rescale_betas_zero_snr=zero_snr,
            **({"timestep_spacing": spacing} if spacing else {}),
        )
        bound = COSINE_BOUND if betas == "squaredcos_cap_v2" else BOUND
        for steps in rng.choice(STEPS, 2, replace=False):
            assert_same(sampler, case, int(steps), bound)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("sampler", RESPACING)
def test_other_sigma_spacings(sampler, kind):
    chosen = {f"use_{kind}_sigmas": True}
    cases = itertools.product(STEPS, (False, True))
    for (steps, zero_snr), spacing in zip(cases, itertools.cycle(SPACINGS), strict=False):
        case = config(timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr, **chosen)
        assert_same(sampler, case, steps)
    assert_same(sampler, config(sigma_min=0.1, sigma_max=5.0, **chosen), 10)
    assert_same(sampler, config(final_sigmas_type="sigma_min", **chosen), 10)
    assert_same(sampler, config(prediction_type="v_prediction", **chosen), 10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_other_final_steps(sampler, spacing):
    for steps, low, euler in itertools.product(STEPS, (False, True), (False, True)):
        case = config(timestep_spacing=spacing, lower_order_final=low, euler_at_final=euler)
        assert_same(sampler, {**case, "final_sigmas_type": "sigma_min"}, steps)
        if sampler != "unipc" or low:
            assert_same(sampler, case, steps)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2", "midpoint"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_of_any_order(order, solver_type):
    for steps, final in itertools.product(STEPS, ("zero", "sigma_min")):
        if (solver_type, final) == ("bh1", "zero"):
            continue  # diffusers gives NaN there
        case = config(solver_order=order, solver_type=solver_type, final_sigmas_type=final)
        assert_same("unipc", case, steps)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_the_last_step_may_end_at_the_first_timesteps_noise(sampler, final):
    for steps, spacing in itertools.product(STEPS, SPACINGS):
        assert_same(sampler, config(set_alpha_to_one=final, timestep_spacing=spacing), steps)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_fresh_noise(eta):
    for steps, spacing, offset in itertools.product(STEPS, SPACINGS, (0, 1)):
        assert_same("ddim", config(timestep_spacing=spacing, steps_offset=offset), steps, eta=eta)


@pytest.mark.parametrize(("sampler", "changes"), CLAMPED)
def test_clamped_estimates(sampler, changes):
    cases = itertools.product(("epsilon", "sample", "v_prediction"), (1, 4, 20))
    for (prediction, steps), offset in zip(cases, itertools.cycle((0, 1)), strict=False):
        case = config(prediction_type=prediction, steps_offset=offset)
        assert_same(sampler, {**case, **changes}, steps)
        if sampler == "ddim":
            assert_same(sampler, {**case, **changes}, steps, eta=0.7)
    free, held = ours(sampler, case, 20), ours(sampler, {**case, **changes}, 20)
    assert difference(free, held) > 10 * BOUND  # the clamp acts


@pytest.mark.parametrize("changes", [CLIPPING[0], THRESHOLDING[2]])
def test_ddims_direction_is_not_that_of_the_clamped_estimate(changes):
    """Tests where the last step ends at its own noise, so that only the clamp moves x."""
    case = config(timestep_spacing="leading", set_alpha_to_one=False, **changes)
    for steps in STEPS:
        assert_same("ddim", case, steps)


@pytest.mark.parametrize("variance_type", [None, "fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpms_variances(variance_type):
    for steps, offset in itertools.product(STEPS, (0, 1)):
        assert_same("ddpm", config(variance_type=variance_type, steps_offset=offset), steps)


@pytest.mark.parametrize("originally", [20, 50, 100])
def test_lcm_uses_a_subset_of_its_distillation_timesteps(originally):
    for steps, scaling in itertools.product((1, 2, 3, 4, 7, 20), (0.5, 10.0)):
        case = config(original_inference_steps=originally, timestep_scaling=scaling)
        assert_same("lcm", case, steps)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta", "no"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_matching(shift, kind):
    case = {"_class_name": FLOW_CLASS, "shift": shift, f"use_{kind}_sigmas": True}
    for steps in STEPS:
        assert_same("euler", case, steps)


@pytest.mark.parametrize("sampler", CLASSES)
def test_a_second_network_starts_where_its_scheduler_would(sampler):
    for steps, begin in ((3, 1), (3, 2), (7, 2), (7, 5), (20, 4), (20, 16)):
        begin += begin % 2 if sampler == "heun" else 0  # between its pairs of evaluations
        for prediction in ("epsilon", "v_prediction"):
            case = config(timestep_spacing="leading", steps_offset=1, prediction_type=prediction)
            assert_same(sampler, case, steps, begin=begin)


@pytest.mark.parametrize("changes", [{}, CLIPPING[1], THRESHOLDING[2]])
@pytest.mark.parametrize("sampler", CLASSES)
def test_the_scan_ends_where_diffusers_loop_ends(sampler, changes):
    case = config(prediction_type="v_prediction", timestep_spacing="trailing") | changes
    eta = 0.5 if sampler == "ddim" else 0.0
    schedule = noise_schedule(case, sampler)
    table = samplers.sampler_table(sampler, schedule, 20, eta=eta)
    start, fresh, _ = noise.draw(np.array([SEED]), SHAPE, "torch", draws=table.draws)
    assert (table.draws > 0) == (sampler in STOCHASTIC)

    def denoise(x, timestep, alpha, sigma, kept):
        return to_x0(network(x, timestep, jnp.tanh), x, alpha, sigma, "v_prediction"), kept

    lengths = (5, len(table.timesteps) - 5)
    stretches = [sampling.Stretch(rows, denoise, schedule.clamp) for rows in lengths]
    end = sampling.sample(stretches, start, table.initial_scale, table.columns(), fresh)
    expected = theirs(sampler, case, 20, eta)[1][-1]
    assert np.linalg.norm(end[0] - expected) <= BOUND * np.sqrt(expected.size)


@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "lcm"])
@pytest.mark.parametrize("spacing", ["leading", further("linspace"), further("trailing")])
def test_a_step_for_nearly_every_timestep(sampler, spacing):
    case = config(steps_offset=1, timestep_spacing=spacing)
    assert_same(sampler, case, 997)
    assert samplers.max_steps(sampler, noise_schedule(case, sampler)) >= 998


@pytest.mark.parametrize("sampler", [*CLASSES, "flow"])
def test_defaults_match_diffusers_classes(sampler):
    name = FLOW_CLASS if sampler == "flow" else CLASSES[sampler]
    defaults = FLOW_CONFIG if sampler == "flow" else SAMPLERS[sampler].config
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    expected = {p.name: p.default for p in signature if p.name != "self"}
    assert expected.keys() - defaults.keys() <= IRRELEVANT
    assert defaults.keys() - expected.keys() <= {"sigma_min", "sigma_max"}
    for key in expected.keys() & defaults.keys() - {"skip_prk_steps"}:
        assert defaults[key] == expected[key], key
    assert BUILT["skip_prk_steps"] == (True,)


@pytest.mark.parametrize("size", [16, 17, 31, 48, 1000, 16384])
def test_torchs_generator_continues_between_draws(size):
    generator = torch.Generator("cpu").manual_seed(SEED)
    expected = [torch.randn(size, generator=generator).numpy() for _ in range(4)]
    np.testing.assert_allclose(noise.torch_normal(SEED, [size] * 4), expected, atol=5e-7)


def test_guidance_is_rescaled_as_in_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    pairs = np.random.default_rng(0).standard_normal((6, 8, 8, 4)).astype(np.float32)
    unconditional, conditional = torch.tensor(pairs[::2]), torch.tensor(pairs[1::2])
    guided = unconditional + 7.5 * (conditional - unconditional)
    expected = rescale_noise_cfg(guided, conditional, guidance_rescale=0.7)
    mixed = guidance.guide(jnp.asarray(pairs), jnp.full(3, 7.5), 0.7)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
