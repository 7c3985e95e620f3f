"""Reading `scheduler_config.json`, and the changes that a job makes to it. Imports no JAX.

A config is read as diffusers' `X.from_config` reads it, where X is the scheduler class of the
sampler: what X does not know is dropped, and what the file leaves out has X's default.
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
    "invert_sigmas": False,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_dynamic_shifting": False,
}
# Every key that means something to one of them.
KEYS = frozenset(FLOW_CONFIG).union(*(row.config for row in SAMPLERS.values()))
_EITHER = (False, True)
# The values that are built, of keys whose other values would change the result.
BUILT: dict[str, tuple] = {
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),  # the sampler's name decides
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "clip_sample": (False,),
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
    "shift_terminal": (None,),
    "skip_prk_steps": (True,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": SOLVER_TYPES,
    "stochastic_sampling": (False,),
    "thresholding": (False,),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_beta_sigmas": _EITHER,
    "use_dynamic_shifting": (False,),
    "use_exponential_sigmas": _EITHER,
    "use_flow_sigmas": (False,),
    "use_karras_sigmas": _EITHER,
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# The other keys are numbers: their type, and the least and the largest.
NUMBERS: dict[str, tuple] = {
    "num_train_timesteps": (int, 2, 100_000),
    "beta_start": (float, 0.0, 1.0),
    "beta_end": (float, 0.0, 1.0),
    "original_inference_steps": (int, 1, 100_000),
    "shift": (float, 1e-3, 1e3),
    "sigma_max": (float, 1e-6, 1e6),
    "sigma_min": (float, 1e-6, 1e6),
    "steps_offset": (int, 0, 100_000),
    "timestep_scaling": (float, 1e-3, 1e6),
}


def prediction_type(config: dict) -> str:
    """What a model with this scheduler predicts, as in `objective.to_x0`."""
    is_flow = config.get("_class_name") == FLOW_CLASS
    return "flow" if is_flow else config.get("prediction_type", "epsilon")


def train_steps(config: dict) -> int:
    """How many timesteps a model with this scheduler was trained with."""
    return config.get("num_train_timesteps", 1000)


def noise_schedule(config: dict, sampler: str) -> NoiseSchedule:
    """Reads a parsed `scheduler_config.json`, of any class, for a sampler.

    Raises:
      InputError: for a value that would change the result and is not built.
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
    """Raises InputError where numbers that are good alone do not fit together."""
    train_steps = schedule.num_train_timesteps
    if schedule.steps_offset >= train_steps // 2:
        raise InputError(
            f"{WHERE}: steps_offset = {schedule.steps_offset} leaves no room in num_train_timesteps"
            f" = {train_steps}; 0 and 1 are usual"
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
            f"{WHERE}: beta_start = {schedule.beta_start} and beta_end = {schedule.beta_end} give "
            "no signal that falls at every timestep; 0.00085 and 0.012 are Stable Diffusion's"
        )


def reads(sampler: str, config: dict, key: str) -> bool:
    """Whether a key of a scheduler's config means something to a sampler."""
    is_flow = config.get("_class_name") == FLOW_CLASS
    return key in (FLOW_CONFIG if is_flow else SAMPLERS[sampler].config)


def _values(data: dict, sampler: str) -> dict:
    """The config's values for a sampler, by key, checked one by one."""
    is_flow = data.get("_class_name") == FLOW_CLASS
    if is_flow and sampler != "euler":
        raise InputError(
            f"{WHERE}: the model is trained by flow matching, which {sampler} does not sample; "
            "ask for euler"
        )
    defaults = FLOW_CONFIG if is_flow else SAMPLERS[sampler].config
    # What the file left out is another class's default there, and not this one's.
    left_out = data.get("_use_default_values")
    is_own = data.get("_class_name") == SAMPLERS[sampler].scheduler
    left_out = left_out if isinstance(left_out, list) and not is_own else ()
    said = {key: value for key, value in data.items() if key in defaults and key not in left_out}
    values = {**defaults, **said}
    for key, value in values.items():
        built = SAMPLERS[sampler].built.get(key, BUILT.get(key))
        if built is None:
            values[key] = _number(key, value)
        elif value not in built:
            known = " or ".join(json.dumps(choice) for choice in built)
            silent = "" if key in said else ", the default,"
            raise InputError(
                f"{WHERE}: {key} = {_shown(value)}{silent} is not built for {sampler}; "
                f"set it to {known}, or ask for another sampler"
            )
    return {**values, "prediction_type": "flow"} if is_flow else values


def _number(key: str, value) -> int | float | None:
    kind, low, high = NUMBERS[key]
    if value is None and key in ("sigma_min", "sigma_max"):
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
    """A scheduler's config after changes in the form of `checks.scheduler`.

    diffusers lists what a file leaves out under "_use_default_values".
    """
    said = key_values(changes)
    for key in said.keys() - KEYS:
        hint = suggestion(key, KEYS)
        raise InputError(f"--scheduler: {key} is no key of a scheduler's config{hint}")
    left_out = config.get("_use_default_values")
    left_out = left_out if isinstance(left_out, list) else []  # of whatever a file may hold
    left_out = [key for key in left_out if isinstance(key, str) and key not in said]
    return config | said | {"_use_default_values": left_out}


def check_steps(sampler: str, steps: int, schedulers: Sequence[dict], eta: float = 0.0) -> None:
    """Refuses a sampler that cannot follow the model's schedulers, or not in so many steps.

    Args:
      schedulers: the config of each expert's, as `changed` gives it.
    """
    try:
        for config in schedulers:
            schedule = noise_schedule(config, sampler)
            most = samplers.max_steps(sampler, schedule)
            if steps > most:
                raise BadValueError(f"steps must be at most {most} for {sampler}, not {steps}")
            samplers.sampler_table(sampler, schedule, steps, eta=eta)
    except InputError as problem:
        raise BadValueError(str(problem)) from None


def check_options(
    options: Options, samplers_used: Collection[str], schedulers: Sequence[dict]
) -> None:
    """Refuses options that would do nothing, but stand in every image's record.

    Args:
      samplers_used: of the run's images.
      schedulers: the config of each expert's; the second is a refiner's.
    """
    usual = Options()
    if options.eta != usual.eta and "ddim" not in samplers_used:
        raise BadValueError("--eta is for the sampler ddim alone; leave it out")
    if options.refiner_start != usual.refiner_start and len(schedulers) == 1:
        raise BadValueError("--refiner-start does nothing without a --refiner; leave it out")
    if options.guidance_start >= options.guidance_stop:
        raise BadValueError(
            f"--guidance-start {options.guidance_start} must come before --guidance-stop "
            f"{options.guidance_stop}; --guidance-scale 1 leaves guidance off"
        )
    for change in filter(None, options.scheduler.split(", ")):
        key = change.partition("=")[0]
        if key == "algorithm_type":
            raise BadValueError(f"--scheduler {key}: ask for --sampler dpmpp_2m or dpmpp_2m_sde")
        every = itertools.product(samplers_used, schedulers)
        if not any(reads(sampler, config, key) for sampler, config in every):
            raise BadValueError(
                f"--scheduler {change} means nothing to {', '.join(sorted(samplers_used))}; "
                "leave it out, or ask for another --sampler"
            )
