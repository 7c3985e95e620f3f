"""The samplers as tables of coefficients, which `sampling.sample` runs. Imports no JAX.

Every sampler here is linear in its state x, in the denoiser's estimates D of x_0 and in noise z. It
remembers h = p x + q D of its last evaluations and steps by

    x' = a x + b_0 h + b_1 h_previous + ... + s z

so it is a function from the noise schedule and the number of steps to a table. If a paper goes back
to an earlier x, that x is written as a combination of the current x and the remembered h. Where D
is clamped, x' also gets c times what clamping took away.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxdiff.diffusion import solvers
from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.solvers import SamplerTable
from jaxdiff.errors import InputError

WHERE = "scheduler/scheduler_config.json"
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler and its properties.

    Attributes:
      solver: the function from the schedule and the number of steps to its table.
      scheduler: its class in diffusers.
      config: the keys of `scheduler_config.json` that this class reads, with its defaults.
      title: its name in AUTOMATIC1111's web UI.
      built: the supported values of the keys for which they differ from `scheduler_config.BUILT`.
      flow: whether it can sample models that were trained by flow matching.
      multistep: whether it uses the estimates of earlier steps.
      one_more_timestep: as in `NoiseSchedule`.
      rows_per_step: how many rows of its table each skipped step stands for.
    """

    solver: Callable[..., SamplerTable]
    scheduler: str
    config: Mapping[str, object]
    title: str
    built: Mapping[str, tuple] = field(default_factory=dict)
    flow: bool = False
    multistep: bool = False
    one_more_timestep: bool = False
    rows_per_step: int = 1


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
_THRESHOLDED = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0, **_THRESHOLDED}
SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
_MULTISTEP = {
    **_LINSPACE,
    **_ZERO_SNR,
    **SIGMAS,
    **_THRESHOLDED,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "solver_order": 2,
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
SOLVER_TYPES = ("midpoint", "bh1", "bh2", "logrho")  # diffusers' classes accept each other's
SAMPLERS = {
    "ddim": Sampler(
        solver=solvers.ddim,
        scheduler="DDIMScheduler",
        config={**_LEADING, **_ZERO_SNR, **_CLIPPED, "set_alpha_to_one": True},
        title="DDIM",
    ),
    "ddpm": Sampler(
        solver=solvers.ddpm,
        scheduler="DDPMScheduler",
        config={**_LEADING, **_ZERO_SNR, **_CLIPPED, "variance_type": "fixed_small"},
        # Configs of DPM-Solver have None, for which diffusers uses the default.
        built={"variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large")},
        title="DDPM",
    ),
    "pndm": Sampler(
        solver=solvers.pndm,
        scheduler="PNDMScheduler",
        # The class's default of skip_prk_steps is false, but only an explicit false is rejected.
        config={**_LEADING, "set_alpha_to_one": False, "skip_prk_steps": True},
        built={"prediction_type": ("epsilon", "v_prediction")},
        title="PLMS",
        multistep=True,
    ),
    "euler": Sampler(
        solver=solvers.euler,
        scheduler="EulerDiscreteScheduler",
        config={
            **_LINSPACE,
            **_ZERO_SNR,
            **SIGMAS,
            "final_sigmas_type": "zero",
            "interpolation_type": "linear",
            "timestep_type": "discrete",
        },
        title="Euler",
        flow=True,
    ),
    "euler_ancestral": Sampler(
        solver=solvers.euler_ancestral,
        scheduler="EulerAncestralDiscreteScheduler",
        config={**_LINSPACE, **_ZERO_SNR},
        title="Euler a",
    ),
    "heun": Sampler(
        solver=solvers.heun,
        scheduler="HeunDiscreteScheduler",
        config={
            **_LINSPACE,
            **SIGMAS,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "clip_sample_range": 1.0,
        },
        title="Heun",
        flow=True,
        rows_per_step=2,
    ),
    "dpmpp_2m": Sampler(
        solver=solvers.dpmpp_2m,
        scheduler="DPMSolverMultistepScheduler",
        config=_DPM_SOLVER,
        title="DPM++ 2M",
        flow=True,
        multistep=True,
        one_more_timestep=True,
    ),
    "dpmpp_2m_sde": Sampler(
        solver=solvers.dpmpp_2m_sde,
        scheduler="DPMSolverMultistepScheduler",
        config=_DPM_SOLVER,
        title="DPM++ 2M SDE",
        multistep=True,
        one_more_timestep=True,
    ),
    "unipc": Sampler(
        solver=solvers.unipc,
        scheduler="UniPCMultistepScheduler",
        config={
            **_MULTISTEP,
            "disable_corrector": [],
            "predict_x0": True,
            "solver_p": None,
            "solver_type": "bh2",
        },
        built={"solver_order": (1, 2, 3), "solver_type": (*SOLVER_TYPES, "heun")},
        title="UniPC",
        flow=True,
        multistep=True,
        one_more_timestep=True,
    ),
    "lcm": Sampler(
        solver=solvers.lcm,
        scheduler="LCMScheduler",
        config={
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
        title="LCM",
    ),
}
# The sampler of each diffusers scheduler class; if several samplers share a class, the first one.
OF_SCHEDULER = {row.scheduler: name for name, row in reversed(SAMPLERS.items())}
OF_SCHEDULER[FLOW_CLASS] = "euler"


def of_config(config: dict) -> str | None:
    """Returns the sampler that a `scheduler_config.json` names; None if it is not supported."""
    scheduler = config.get("_class_name")
    sampler = OF_SCHEDULER.get(scheduler) if isinstance(scheduler, str) else None
    if sampler == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++":
        return "dpmpp_2m_sde"
    return sampler


def max_steps(name: str, schedule: NoiseSchedule) -> int:
    """Returns the largest number of steps that a sampler can take with a schedule."""
    return schedule.original_inference_steps if name == "lcm" else schedule.max_steps()


def sampler_table(
    name: str, schedule: NoiseSchedule, steps: int, *, eta: float = 0.0, begin: int = 0
) -> SamplerTable:
    """Returns a sampler's table.

    Args:
      name: the sampler's name in `SAMPLERS`.
      schedule: the noise schedule, read for this sampler.
      steps: the number of steps, at least 1.
      eta: the share of fresh noise in DDIM, 0 to 1; the other samplers ignore it.
      begin: the first row of this network; the rows before it belong to another network, whose
        estimates a multistep sampler does not use.

    Raises:
      InputError: if the schedule has too few timesteps for `steps`, or the coefficients are not
        finite, or x_0 cannot be computed from the network's output.
    """
    most = max_steps(name, schedule)
    if not 1 <= steps <= most:
        raise InputError(f"steps = {steps} must be 1 to {most} for {name} with this scheduler")
    if schedule.use_dynamic_shifting:
        raise InputError(
            f"{WHERE}: use_dynamic_shifting is not supported with this model; set it to false"
        )
    options = {"begin": begin} if SAMPLERS[name].multistep else {}
    if name == "ddim":
        options = {"eta": eta}
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            table = SAMPLERS[name].solver(schedule, steps, **options)
        finite = all(np.isfinite(column).all() for column in table.columns().values())
    except np.linalg.LinAlgError:
        finite = False
    if not finite:
        raise InputError(
            f"{WHERE}: {name} divides by zero with {steps} steps; set lower_order_final to true or "
            "choose another number of steps"
        )
    if schedule.prediction_type == "epsilon" and not table.alpha[begin:].all():
        raise InputError(
            f"{WHERE}: prediction_type epsilon cannot start from pure noise; set "
            "rescale_betas_zero_snr to false"
        )
    return table
