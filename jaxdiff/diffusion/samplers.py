"""Samplers as tables of coefficients, which `sampling.sample` runs. Imports no JAX.

Every sampler here is linear in its state x, in the denoiser's estimates D of x_0 and in noise z. It
remembers h = p x + q D of its last evaluations and steps by

    x' = a x + b_0 h + b_1 h_previous + ... + s z

so it is a function from the noise schedule and the number of steps to a table. Where the papers go
back to an earlier x, that x is itself a combination of the present one and of what is remembered.
"""

from collections.abc import Callable

import numpy as np

from jaxdiff.diffusion import solvers
from jaxdiff.diffusion.schedule import WHERE, NoiseSchedule
from jaxdiff.diffusion.solvers import SamplerTable
from jaxdiff.errors import InputError

SAMPLERS: dict[str, Callable[..., SamplerTable]] = {
    "ddim": solvers.ddim,
    "ddpm": solvers.ddpm,
    "pndm": solvers.pndm,
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "heun": solvers.heun,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "unipc": solvers.unipc,
    "lcm": solvers.lcm,
}
MULTISTEP = ("pndm", "dpmpp_2m", "dpmpp_2m_sde", "unipc")


def sampler_table(
    name: str, schedule: NoiseSchedule, steps: int, *, eta: float = 0.0, begin: int = 0
) -> SamplerTable:
    """The table of the sampler called `name`, one of `SAMPLERS`.

    Args:
      name: of the sampler.
      schedule: read for this sampler.
      steps: at least 1.
      eta: how much of DDIM's noise is drawn anew, 0 to 1; the others have none to set.
      begin: the rows before it belong to another network, whose estimates a sampler with a memory
        must not use: it starts anew there.

    Raises:
      InputError: if the schedule has too few timesteps for `steps`, or the steps are not finite, as
        where the network's output says nothing about x_0.
    """
    most = schedule.max_steps(name)
    if not 1 <= steps <= most:
        raise InputError(f"steps = {steps} must be 1 to {most} for {name} with this scheduler")
    options = {"begin": begin} if name in MULTISTEP else {}
    if name == "ddim":
        options = {"eta": eta}
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            table = SAMPLERS[name](schedule, steps, **options)
        finite = all(np.isfinite(column).all() for column in table.columns().values())
    except np.linalg.LinAlgError:
        finite = False
    if not finite:
        raise InputError(
            f"{WHERE}: {name} divides by zero in {steps} steps; set lower_order_final to true, or "
            "ask for another number of steps"
        )
    if schedule.prediction_type == "epsilon" and not table.alpha[begin:].all():
        raise InputError(
            f"{WHERE}: prediction_type epsilon cannot start from pure noise; set "
            "rescale_betas_zero_snr to false"
        )
    return table
