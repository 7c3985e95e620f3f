"""Reads `scheduler_config.json` and applies a job's changes to it. Imports no JAX.

A config is read as by diffusers' `X.from_config`, where X is the sampler's scheduler class: keys
that X does not have are dropped, and keys that the file lacks get X's default.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Sequence

import numpy as np

from jaxdiff.checks import BadValueError, key_values
from jaxdiff.diffusion import samplers
from jaxdiff.diffusion.samplers import FLOW_CLASS, SAMPLERS, SOLVER_TYPES, WHERE
from jaxdiff.diffusion.schedule import NEARLY_ZERO_SNR, NoiseSchedule
from jaxdiff.errors import InputError, suggestion
from jaxdiff.request import Options

FLOW_CONFIG = {
    **samplers.SIGMAS,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}
# The keys that affect a multistep solver also where the levels are those of flow matching.
SOLVER = (
    *("disable_corrector", "euler_at_final", "lower_order_final", "predict_x0", "solver_order"),
    *("solver_p", "solver_type", "thresholding"),
)
# All keys that affect at least one sampler.
KEYS = frozenset(FLOW_CONFIG).union(*(row.config for row in SAMPLERS.values()))
_EITHER = (False, True)
# The supported values of keys whose other values would change the result.
BUILT: dict[str, tuple] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),  # the sampler's name decides
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "clip_sample": _EITHER,
    "disable_corrector": ([],),
    "euler_at_final": _EITHER,
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False,),
    "lambda_min_clipped": (-math.inf,),
    "lower_order_final": _EITHER,
    "predict_x0": (True,),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "rescale_betas_zero_snr": _EITHER,
    "set_alpha_to_one": _EITHER,
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": SOLVER_TYPES,
    "stochastic_sampling": (False,),
    "thresholding": _EITHER,
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "time_shift_type": ("exponential", "linear"),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": _EITHER,
    "use_dynamic_shifting": _EITHER,
    "use_exponential_sigmas": _EITHER,
    "use_flow_sigmas": (False,),
    "use_karras_sigmas": _EITHER,
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# The other keys are numbers: their type, minimum and maximum.
NUMBERS: dict[str, tuple] = {
    "num_train_timesteps": (int, 2, 100_000),
    "base_image_seq_len": (int, 1, 10**6),
    "base_shift": (float, 0.0, 100.0),
    "beta_start": (float, 0.0, 1.0),
    "beta_end": (float, 0.0, 1.0),
    "clip_sample_range": (float, 1e-3, 1e6),
    "dynamic_thresholding_ratio": (float, 0.0, 1.0),
    "max_image_seq_len": (int, 2, 10**6),
    "max_shift": (float, 0.0, 100.0),
    "original_inference_steps": (int, 1, 100_000),
    "sample_max_value": (float, 1e-3, 1e6),
    "shift": (float, 1e-3, 1e3),
    "shift_terminal": (float, 1e-6, 0.9),
    "sigma_max": (float, 1e-6, 1e6),
    "sigma_min": (float, 1e-6, 1e6),
    "steps_offset": (int, 0, 100_000),
    "timestep_scaling": (float, 1e-3, 1e6),
}


def prediction_type(config: dict) -> str:
    """Returns what a model with this scheduler predicts, as in `objective.to_x0`."""
    return "flow" if is_flow(config) else config.get("prediction_type", "epsilon")


def is_flow(config: dict) -> bool:
    """Whether a model with this scheduler was trained by flow matching."""
    is_of_class = config.get("_class_name") == FLOW_CLASS
    return is_of_class or config.get("prediction_type") == "flow_prediction"


def train_steps(config: dict) -> int:
    """Returns the number of timesteps that a model with this scheduler was trained with."""
    return config.get("num_train_timesteps", 1000)


def noise_schedule(config: dict, sampler: str) -> NoiseSchedule:
    """Converts a parsed `scheduler_config.json` of any class to the noise schedule of a sampler.

    Raises:
      InputError: if a value that would change the result is not supported.
    """
    values = _values(config, sampler)
    chosen = [key for key in samplers.SIGMAS if values.get(key) is True]
    if len(chosen) > 1:
        raise InputError(f"{WHERE}: {' and '.join(chosen)} are both true; keep one of them")
    values["one_more_timestep"] = SAMPLERS[sampler].one_more_timestep
    names = {field.name for field in dataclasses.fields(NoiseSchedule)}
    schedule = NoiseSchedule(**{key: value for key, value in values.items() if key in names})
    _check(schedule, sampler)
    return schedule


def _check(schedule: NoiseSchedule, sampler: str) -> None:
    """Raises InputError if numbers that are valid by themselves do not fit together."""
    train_steps = schedule.num_train_timesteps
    if schedule.steps_offset >= train_steps // 2:
        raise InputError(
            f"{WHERE}: steps_offset = {schedule.steps_offset} must be less than half of "
            f"num_train_timesteps = {train_steps}; common values are 0 and 1"
        )
    if sampler == "lcm" and schedule.original_inference_steps > train_steps:
        raise InputError(
            f"{WHERE}: original_inference_steps = {schedule.original_inference_steps} must be at "
            f"most num_train_timesteps = {train_steps}"
        )
    if schedule.prediction_type == "flow":
        return
    bars = dataclasses.replace(schedule, rescale_betas_zero_snr=False).alpha_bars()
    if not (np.diff(bars, prepend=1.0) < 0).all() or bars[-1] < NEARLY_ZERO_SNR**2:
        raise InputError(
            f"{WHERE}: with beta_start = {schedule.beta_start} and beta_end = {schedule.beta_end}, "
            "the signal does not decrease at every timestep; Stable Diffusion uses 0.00085 and "
            "0.012"
        )


def reads(sampler: str, config: dict, key: str) -> bool:
    """Whether a key of a scheduler's config affects a sampler."""
    return key in _defaults(config, sampler)


def _defaults(config: dict, sampler: str) -> dict:
    """Returns the keys that affect a sampler, with the defaults of its class in diffusers."""
    if not is_flow(config):
        return SAMPLERS[sampler].config
    row = SAMPLERS[sampler]
    solver = {key: row.config[key] for key in SOLVER if key in row.config and row.multistep}
    return {**FLOW_CONFIG, **solver}


def _values(data: dict, sampler: str) -> dict:
    """Returns the config's values for a sampler, each of them checked, by key."""
    if is_flow(data) and not SAMPLERS[sampler].flow:
        known = ", ".join(name for name, row in SAMPLERS.items() if row.flow)
        raise InputError(
            f"{WHERE}: {sampler} does not support models trained by flow matching; choose the "
            f"sampler {known}"
        )
    defaults = _defaults(data, sampler)
    if is_flow(data) and data.get("_class_name") != FLOW_CLASS:
        data = _of_multistep(data)
    # A value listed here is another class's default, which this class replaces by its own.
    left_out = data.get("_use_default_values")
    is_own = data.get("_class_name") == SAMPLERS[sampler].scheduler
    left_out = left_out if isinstance(left_out, list) and not is_own else ()
    given = {key: value for key, value in data.items() if key in defaults and key not in left_out}
    values = {**defaults, **given}
    for key, value in values.items():
        built = SAMPLERS[sampler].built.get(key, BUILT.get(key))
        if built is None:
            values[key] = _number(key, value)
        elif value not in built:
            known = " or ".join(json.dumps(choice) for choice in built)
            raise InputError(
                f"{WHERE}: {key} = {_shown(value)} is not supported by {sampler}; "
                f"set it to {known}, or choose another sampler"
            )
    return {**values, "prediction_type": "flow"} if is_flow(data) else values


def _of_multistep(data: dict) -> dict:
    """Returns the flow config of a multistep solver's class by the keys of `FLOW_CLASS`."""
    if data.get("use_flow_sigmas") is not True:
        raise InputError(
            f"{WHERE}: use_flow_sigmas must be true for prediction_type flow_prediction"
        )
    return {"shift": data.get("flow_shift", 1.0), **data}


def _number(key: str, value) -> int | float | None:
    kind, low, high = NUMBERS[key]
    if value is None and key in ("shift_terminal", "sigma_min", "sigma_max"):
        return None
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        name = "a whole number" if kind is int else "a number"
        raise InputError(f"{WHERE}: {key} = {_shown(value)} must be {name} from {low} to {high}")
    return value


def _shown(value) -> str:
    quoted = json.dumps(value, default=repr)
    return quoted if len(quoted) <= 60 else f"{quoted[:57]}..."


def changed(config: dict, changes: str) -> dict:
    """Returns a scheduler's config after changes in the form of `checks.scheduler`.

    A changed key is no longer a default, so it is removed from diffusers' "_use_default_values".
    """
    changed_values = key_values(changes)
    for key in changed_values.keys() - KEYS:
        hint = suggestion(key, KEYS)
        raise InputError(f"--scheduler: {key} is not a key of any scheduler's config{hint}")
    left_out = config.get("_use_default_values")
    left_out = left_out if isinstance(left_out, list) else []  # the file may contain anything
    left_out = [key for key in left_out if isinstance(key, str) and key not in changed_values]
    return config | changed_values | {"_use_default_values": left_out}


def check_steps(sampler: str, steps: int, schedulers: Sequence[dict], eta: float = 0.0) -> None:
    """Raises BadValueError if a sampler does not support the schedulers or the number of steps.

    Args:
      sampler: the sampler's name.
      steps: the number of steps.
      schedulers: the scheduler config of the base model and of its refiner, if there is one, as
        `changed` returns it.
      eta: as in `samplers.sampler_table`.
    """
    try:
        for config in schedulers:
            schedule = noise_schedule(config, sampler)
            schedule = dataclasses.replace(schedule, use_dynamic_shifting=False)  # of any size
            most = samplers.max_steps(sampler, schedule)
            if schedule.shift_terminal and steps == 1:
                raise BadValueError("steps must be at least 2 for a schedule with shift_terminal")
            if steps > most:
                raise BadValueError(f"steps must be at most {most} for {sampler}, not {steps}")
            samplers.sampler_table(sampler, schedule, steps, eta=eta)
    except InputError as problem:
        raise BadValueError(str(problem)) from None


def check_options(
    options: Options, samplers_used: Collection[str], schedulers: Sequence[dict]
) -> None:
    """Raises BadValueError for options that have no effect but would be in every image's record.

    Args:
      options: the options of the run.
      samplers_used: the samplers of the run's images.
      schedulers: the scheduler config of the base model and of its refiner, if there is one.
    """
    usual = Options()
    if options.eta != usual.eta and "ddim" not in samplers_used:
        raise BadValueError("--eta only affects the sampler ddim; leave it out")
    if options.refiner_start != usual.refiner_start and len(schedulers) == 1:
        raise BadValueError("--refiner-start has no effect without --refiner; leave it out")
    if options.guidance_start >= options.guidance_stop:
        raise BadValueError(
            f"--guidance-start {options.guidance_start} must be less than --guidance-stop "
            f"{options.guidance_stop}; to turn guidance off, use --guidance-scale 1"
        )
    for change in filter(None, options.scheduler.split(", ")):
        key = change.partition("=")[0]
        if key == "algorithm_type":
            raise BadValueError(
                f"--scheduler {key} has no effect; use --sampler dpmpp_2m or dpmpp_2m_sde instead"
            )
        every = itertools.product(samplers_used, schedulers)
        if not any(reads(sampler, config, key) for sampler, config in every):
            raise BadValueError(
                f"--scheduler {change} has no effect on {', '.join(sorted(samplers_used))}; leave "
                "it out, or choose another --sampler"
            )
