"""How much signal and noise there is at each timestep, from `scheduler_config.json`.

A config is read as diffusers' `X.from_config` reads it, where X is the scheduler class of the
sampler: what X does not know is dropped, and what the file leaves out has X's default. Tables are
NumPy float64, computed on the host: rounding belongs to the denoiser, not to them. Imports no JAX.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError

WHERE = "scheduler/scheduler_config.json"
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
CLASSES = {  # the diffusers class of each sampler
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}
NEARLY_ZERO_SNR = 2.0**-24  # diffusers' stand-in for 0 where a sampler divides by alpha
# These place one timestep more than they take, and leave out the last, which is nearly noiseless.
ONE_MORE_TIMESTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_LEADING = {**_BETAS, "timestep_spacing": "leading"}
_LINSPACE = {**_BETAS, "timestep_spacing": "linspace"}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIPPED = {"clip_sample": True, "thresholding": False}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
_MULTISTEP = {
    **_LINSPACE,
    **_ZERO_SNR,
    **_SIGMAS,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "solver_order": 2,
    "thresholding": False,
    "use_dynamic_shifting": False,
    "use_flow_sigmas": False,
}
_DPM_SOLVER = {
    **_MULTISTEP,
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "lambda_min_clipped": -math.inf,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "variance_type": None,
}
# What the diffusers class of each sampler knows, and its defaults.
DEFAULTS: dict[str, dict] = {
    "ddim": {**_LEADING, **_ZERO_SNR, **_CLIPPED, "set_alpha_to_one": True},
    "ddpm": {**_LEADING, **_ZERO_SNR, **_CLIPPED, "variance_type": "fixed_small"},
    # Nobody means the class's own skip_prk_steps = false, but it is refused where a file says it.
    "pndm": {**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": True},
    "euler": {
        **_LINSPACE,
        **_ZERO_SNR,
        **_SIGMAS,
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
    },
    "euler_ancestral": {**_LINSPACE, **_ZERO_SNR},
    "heun": {
        **_LINSPACE,
        **_SIGMAS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
    },
    "dpmpp_2m": _DPM_SOLVER,
    "dpmpp_2m_sde": _DPM_SOLVER,
    "unipc": {
        **_MULTISTEP,
        "disable_corrector": [],
        "predict_x0": True,
        "shift_terminal": None,
        "solver_p": None,
        "solver_type": "bh2",
    },
    "lcm": {
        **_LEADING,
        **_ZERO_SNR,
        **_CLIPPED,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
    },
}
FLOW_DEFAULTS = {
    **_SIGMAS,
    "invert_sigmas": False,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_dynamic_shifting": False,
}
# Every key that means something to one of them.
KEYS = frozenset(FLOW_DEFAULTS).union(*DEFAULTS.values())
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
    "solver_type": ("midpoint", "bh1", "bh2", "logrho"),  # diffusers' classes take each other's
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
BUILT_FOR: dict[str, dict[str, tuple]] = {
    "pndm": {"prediction_type": ("epsilon", "v_prediction")},
    # None is what files of DPM-Solver carry; diffusers then takes the usual one.
    "ddpm": {"variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large")},
    "unipc": {"solver_order": (1, 2, 3), "solver_type": (*BUILT["solver_type"], "heun")},
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


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a scheduler config that decide the steps of a sampler, by diffusers' names.

    Attributes:
      prediction_type: what the network predicts, as in `objective.to_x0`; "flow" is the schedule
        of flow matching, in which alpha = 1 - sigma and the betas play no part.
      set_alpha_to_one: whether the last step of DDIM and PNDM ends without noise, or at timestep
        0's.
      shift: of a flow schedule (Esser et al., 2024, arXiv:2403.03206, equation 23).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    variance_type: str | None = "fixed_small"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"
    lower_order_final: bool = True
    euler_at_final: bool = False
    solver_order: int = 2
    solver_type: str = "midpoint"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    shift: float = 1.0

    @classmethod
    def from_json(cls, data: dict, sampler: str) -> "NoiseSchedule":
        """Reads a parsed `scheduler_config.json`, of whatever class, for a sampler.

        Raises:
          InputError: for a value that would change the result and is not built.
        """
        values = _values(data, sampler)
        chosen = [key for key in _SIGMAS if values.get(key) is True]
        if len(chosen) > 1:
            raise InputError(f"{WHERE}: {' and '.join(chosen)} are both true; keep one of them")
        names = {field.name for field in dataclasses.fields(cls)}
        schedule = cls(**{key: value for key, value in values.items() if key in names})
        schedule._check(sampler)
        return schedule

    def _check(self, sampler: str) -> None:
        """Raises InputError where numbers that are good alone do not fit together."""
        train_steps = self.num_train_timesteps
        if self.steps_offset >= train_steps // 2:
            raise InputError(
                f"{WHERE}: steps_offset = {self.steps_offset} leaves no room in num_train_timesteps"
                f" = {train_steps}; 0 and 1 are usual"
            )
        if sampler == "lcm" and self.original_inference_steps > train_steps:
            raise InputError(
                f"{WHERE}: original_inference_steps = {self.original_inference_steps} must be at "
                f"most num_train_timesteps = {train_steps}"
            )
        if self.prediction_type == "flow":
            return
        bars = dataclasses.replace(self, rescale_betas_zero_snr=False).alpha_bars()
        if not (np.diff(bars, prepend=1.0) < 0).all() or bars[-1] < NEARLY_ZERO_SNR**2:
            raise InputError(
                f"{WHERE}: beta_start = {self.beta_start} and beta_end = {self.beta_end} give no "
                "signal that falls at every timestep; 0.00085 and 0.012 are Stable Diffusion's"
            )

    def alpha_bars(self) -> np.ndarray:
        """The share of the signal's variance at each training timestep, float64 [timesteps]."""
        alpha_bars = np.cumprod(1.0 - self._betas())
        if self.rescale_betas_zero_snr:
            # Lin et al., 2024, arXiv:2305.08891, algorithm 1: the last timestep is pure noise.
            roots = np.sqrt(alpha_bars)
            alpha_bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        return alpha_bars

    def _betas(self) -> np.ndarray:
        count, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.beta_schedule == "linear":  # Ho et al., 2020, arXiv:2006.11239, section 4
            return np.linspace(start, end, count)
        if self.beta_schedule == "scaled_linear":  # Stable Diffusion's: linear in beta's root
            return np.linspace(start**0.5, end**0.5, count) ** 2
        # Nichol and Dhariwal, 2021, arXiv:2102.09672, equation 17
        times = np.linspace(0.0, 1.0, count + 1)
        alpha_bars = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bars[1:] / alpha_bars[:-1], 0.999)

    def max_steps(self, sampler: str) -> int:
        """The most steps that `sampler` can take; it can take any number from 1 to this."""
        train_steps = self.num_train_timesteps
        if sampler == "lcm":
            return self.original_inference_steps
        if self.prediction_type == "flow" or self.timestep_spacing == "trailing":
            return train_steps
        one_more = sampler in ONE_MORE_TIMESTEP
        if self.timestep_spacing == "linspace":
            return train_steps - one_more
        steps = np.arange(1, train_steps + 1 - one_more)
        points = steps + one_more
        fits = (points - 1) * (train_steps // points) + self.steps_offset < train_steps
        return int(np.logical_and.accumulate(fits).sum())


def reads(sampler: str, config: dict, key: str) -> bool:
    """Whether a key of a scheduler's config means something to a sampler."""
    is_flow = config.get("_class_name") == FLOW_CLASS
    return key in (FLOW_DEFAULTS if is_flow else DEFAULTS[sampler])


def _values(data: dict, sampler: str) -> dict:
    """The config's values for a sampler, by key, checked one by one."""
    is_flow = data.get("_class_name") == FLOW_CLASS
    if is_flow and sampler != "euler":
        raise InputError(
            f"{WHERE}: the model is trained by flow matching, which {sampler} does not sample; "
            "ask for euler"
        )
    defaults = FLOW_DEFAULTS if is_flow else DEFAULTS[sampler]
    # What the file left out is another class's default there, and not this one's.
    left_out = data.get("_use_default_values")
    is_own = data.get("_class_name") == CLASSES[sampler]
    left_out = left_out if isinstance(left_out, list) and not is_own else ()
    said = {key: value for key, value in data.items() if key in defaults and key not in left_out}
    values = {**defaults, **said}
    for key, value in values.items():
        built = BUILT_FOR.get(sampler, {}).get(key, BUILT.get(key))
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
