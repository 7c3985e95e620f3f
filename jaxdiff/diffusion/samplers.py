"""Samplers as tables of coefficients, run by one scan.

Every sampler here is linear in its state x, in the denoiser's estimates D of x_0 and in noise z. It
remembers h = p x + q D of its last evaluations and steps by

    x' = a x + b_0 h + b_1 h_previous + ... + s z

so it is a function from the noise schedule and the number of steps to a table. Where the papers go
back to an earlier x, that x is itself a combination of the present one and of what is remembered.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.diffusion import solvers
from jaxdiff.diffusion.schedule import WHERE, NoiseSchedule
from jaxdiff.diffusion.solvers import REMEMBERED, SamplerTable
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


def sample(
    denoisers: Sequence[tuple[int, Callable[[Array, Array, Array, Array], Array]]],
    noise: Array,
    initial_scale: Array | float,
    columns: dict[str, Array],
    fresh_noise: Array | None = None,
) -> Array:
    """Runs a sampler from noise to x_0.

    Args:
      denoisers: how many rows of the table each takes, in turn and together all, and a function
        (x, timestep, alpha, sigma) to the estimate of x_0, in x's shape. Each is one `lax.scan`;
        what is remembered goes on from one to the next.
      noise: [batch, ...], standard normal.
      initial_scale, columns: of a `SamplerTable`.
      fresh_noise: [draws, batch, ...], standard normal, of a table with as many `draws` or fewer;
        None where it has none.

    Returns:
      x_0, in the shape and dtype of `noise`.
    """
    rows = len(columns["timesteps"])
    if sum(taken for taken, _ in denoisers) != rows:
        raise ValueError(f"the denoisers must take {rows} rows together")

    def scan(denoise, state, part):
        def step(state, row):
            x, remembered = state
            estimate = denoise(x, row["timesteps"], row["alpha"], row["sigma"])
            remembered = (row["p"] * x + row["q"] * estimate, *remembered[:-1])
            x = row["a"] * x + sum(b * h for b, h in zip(row["b"], remembered, strict=True))
            if fresh_noise is not None:  # past its end s is 0, and the last one is read again
                fresh = jax.lax.dynamic_index_in_dim(fresh_noise, row["index"], keepdims=False)
                x = x + row["s"] * fresh
            return (x, remembered), None

        return jax.lax.scan(step, state, part)[0]

    columns = {**columns, "index": np.arange(rows)}
    x = noise * initial_scale
    state, begin = (x, (jnp.zeros_like(x),) * REMEMBERED), 0
    for taken, denoise in denoisers:
        part = {name: column[begin : begin + taken] for name, column in columns.items()}
        state, begin = scan(denoise, state, part), begin + taken
    return state[0]
