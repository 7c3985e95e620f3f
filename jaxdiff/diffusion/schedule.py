"""How much signal and noise there is at each timestep, from `scheduler_config.json`.

Tables are NumPy float64, computed on the host: rounding belongs to the denoiser, not to them.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from jaxdiff.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
# Of these keys other values would change the result, and only the ones here are built.
FIXED = {
    "algorithm_type": "dpmsolver++",
    "clip_sample": False,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "lower_order_final": True,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
}


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of `scheduler_config.json` that fix the noise; the defaults are diffusers'.

    Attributes:
      timestep_spacing: None where the file is silent: each sampler then has its own default.
      set_alpha_to_one: whether DDIM's last step ends without noise, or at timestep 0's.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True

    @classmethod
    def from_json(cls, data: dict) -> "NoiseSchedule":
        """Reads a parsed `scheduler_config.json`.

        Raises:
          InputError: for a value that would change the result and is not built.
        """
        where = "scheduler/scheduler_config.json"
        for key, value in FIXED.items():
            if data.get(key, value) != value:
                raise InputError(f"{where}: {key} = {data[key]!r} is not supported")
        fields = {field.name for field in dataclasses.fields(cls)}
        schedule = cls(**{key: value for key, value in data.items() if key in fields})
        for key, known in (
            ("beta_schedule", tuple(BETAS)),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", (None, *SPACINGS)),
        ):
            if getattr(schedule, key) not in known:
                raise InputError(f"{where}: {key} = {data[key]!r} is not supported")
        return schedule

    def alpha_bars(self) -> np.ndarray:
        """The share of the signal's variance at each training timestep, float64 [timesteps]."""
        betas = BETAS[self.beta_schedule](self)
        alpha_bars = np.cumprod(1.0 - betas)
        if self.rescale_betas_zero_snr:
            # Lin et al., 2024, arXiv:2305.08891, algorithm 1: the last timestep is pure noise.
            roots = np.sqrt(alpha_bars)
            alpha_bars = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
        return alpha_bars


def _linear(schedule: NoiseSchedule) -> np.ndarray:
    """Ho et al., 2020, arXiv:2006.11239, section 4."""
    return np.linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)


def _scaled_linear(schedule: NoiseSchedule) -> np.ndarray:
    """Linear in the square root of beta: Stable Diffusion's."""
    start, end = schedule.beta_start**0.5, schedule.beta_end**0.5
    return np.linspace(start, end, schedule.num_train_timesteps) ** 2


def _squared_cosine(schedule: NoiseSchedule) -> np.ndarray:
    """Nichol and Dhariwal, 2021, arXiv:2102.09672, equation 17."""
    times = np.linspace(0.0, 1.0, schedule.num_train_timesteps + 1)
    alpha_bars = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bars[1:] / alpha_bars[:-1], 0.999)


BETAS = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squared_cosine,
}
