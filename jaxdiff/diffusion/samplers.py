"""Samplers as tables of coefficients, run by one scan.

Every sampler here takes a step of the form x' = a x + b D + c D_previous, where D is the
denoiser's estimate of x_0. A sampler is therefore a function from the noise schedule and the number
of steps to a table, and one compiled program serves all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.errors import InputError

NEARLY_ZERO_SNR = 2.0**-24  # diffusers' stand-in for 0 where a sampler divides by alpha


@dataclass(frozen=True)
class SamplerTable:
    """The steps of a sampler, each array float64 [steps].

    Attributes:
      timesteps: what the network is told.
      alpha, sigma: signal and noise in its input.
      a, b, c: the coefficients of x, of D, and of the previous step's D.
      initial_scale: what the starting noise is multiplied by.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    initial_scale: float

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays as float32, for the scan."""
        names = ("timesteps", "alpha", "sigma", "a", "b", "c")
        return {name: getattr(self, name).astype(np.float32) for name in names}


def ddim(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Song et al., 2021, arXiv:2010.02502, equation 12 with eta = 0."""
    alpha_bars = schedule.alpha_bars()
    timesteps = _timesteps(schedule, steps, schedule.timestep_spacing or "leading")
    previous = timesteps - schedule.num_train_timesteps // steps  # also where that is uneven
    final = 1.0 if schedule.set_alpha_to_one else alpha_bars[0]
    next_bars = np.where(previous >= 0, alpha_bars[np.maximum(previous, 0)], final)
    return _first_order(timesteps, alpha_bars[timesteps], next_bars, initial_scale=1.0)


def euler(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Karras et al., 2022, arXiv:2206.00364, algorithm 1 without churn."""
    spacing = schedule.timestep_spacing or "linspace"
    train_steps = schedule.num_train_timesteps
    if spacing == "linspace":  # between the training timesteps, which this sampler can do
        timesteps = np.linspace(0, train_steps - 1, steps)[::-1]
    else:
        timesteps = _timesteps(schedule, steps, spacing)
    alpha_bars = _away_from_zero(schedule)
    ratios = np.sqrt((1.0 - alpha_bars) / alpha_bars)  # the paper's sigma: noise per signal
    ratios = np.append(np.interp(timesteps, np.arange(train_steps), ratios), 0.0)
    bars = 1.0 / (1.0 + ratios**2)
    scale = 1.0 if spacing == "leading" else float(np.sqrt(1.0 - bars[0]))
    return _first_order(timesteps, bars[:-1], bars[1:], initial_scale=scale)


def dpmpp_2m(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """DPM-Solver++(2M): Lu et al., 2022, arXiv:2211.01095, algorithm 2.

    The first and the last step are of first order: the first has no history, and the last one's
    extrapolation would end at infinite log-SNR.
    """
    spacing = schedule.timestep_spacing or "linspace"
    if spacing == "trailing":
        timesteps = _timesteps(schedule, steps, spacing)
    else:  # one more than needed: the last, which is almost without noise, is left out
        timesteps = _timesteps(schedule, steps + 1, spacing)[:-1]
    bars = np.append(_away_from_zero(schedule)[timesteps], 1.0)
    table = _first_order(timesteps, bars[:-1], bars[1:], initial_scale=1.0)
    half_log_snr = 0.5 * np.log(bars[:-1] / (1.0 - bars[:-1]))  # the paper's lambda
    h = np.diff(half_log_snr)
    ratio = np.zeros(steps)
    ratio[1:-1] = h[1:] / (2.0 * h[:-1])  # 1 / (2 r) in the paper
    return SamplerTable(
        **{**table.__dict__, "b": table.b * (1.0 + ratio), "c": -table.b * ratio},
    )


SAMPLERS: dict[str, Callable[[NoiseSchedule, int], SamplerTable]] = {
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
}


def sampler_table(name: str, schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """The table of the sampler called `name`, one of `SAMPLERS`.

    Raises:
      InputError: if the schedule has fewer timesteps than `steps`, or begins where the network's
        output says nothing about x_0.
    """
    if not 1 <= steps < schedule.num_train_timesteps:
        raise InputError(f"steps = {steps} must be 1 to {schedule.num_train_timesteps - 1}")
    table = SAMPLERS[name](schedule, steps)
    if schedule.prediction_type == "epsilon" and not table.alpha.all():
        raise InputError(
            "scheduler/scheduler_config.json: prediction_type epsilon cannot start from pure noise "
            "(rescale_betas_zero_snr)"
        )
    return table


def sample(
    denoise: Callable[[Array, Array, Array, Array], Array],
    noise: Array,
    initial_scale: Array,
    columns: dict[str, Array],
) -> Array:
    """Runs a sampler from noise to x_0, as one `lax.scan`.

    Args:
      denoise: (x, timestep, alpha, sigma) to the estimate of x_0, in x's shape.
      noise: [batch, ...], standard normal.
      initial_scale, columns: of a `SamplerTable`.

    Returns:
      x_0, in the shape and dtype of `noise`.
    """

    def step(carry, row):
        x, previous = carry
        estimate = denoise(x, row["timesteps"], row["alpha"], row["sigma"])
        x = row["a"] * x + row["b"] * estimate + row["c"] * previous
        return (x, estimate), None

    start = noise * initial_scale
    (x, _), _ = jax.lax.scan(step, (start, jnp.zeros_like(start)), columns)
    return x


def _timesteps(schedule: NoiseSchedule, steps: int, spacing: str) -> np.ndarray:
    """Lin et al., 2024, arXiv:2305.08891, table 2: int64 [steps], descending."""
    train_steps = schedule.num_train_timesteps
    if spacing == "linspace":
        timesteps = np.linspace(0, train_steps - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (train_steps // steps) + schedule.steps_offset
    else:
        timesteps = np.arange(train_steps, 0, -train_steps / steps).round()[:steps] - 1
    if timesteps[0] >= train_steps:
        raise InputError(
            f"the scheduler's steps_offset = {schedule.steps_offset} leaves no room for so many "
            "steps; ask for fewer"
        )
    return timesteps.astype(np.int64)


def _away_from_zero(schedule: NoiseSchedule) -> np.ndarray:
    alpha_bars = schedule.alpha_bars()
    if schedule.rescale_betas_zero_snr:
        alpha_bars[-1] = NEARLY_ZERO_SNR
    return alpha_bars


def _first_order(timesteps, bars, next_bars, *, initial_scale: float) -> SamplerTable:
    """x' = alpha' D + sigma' eps, where eps is what `x` holds beside alpha D."""
    alpha, sigma = np.sqrt(bars), np.sqrt(1.0 - bars)
    next_alpha, next_sigma = np.sqrt(next_bars), np.sqrt(1.0 - next_bars)
    a = next_sigma / sigma
    return SamplerTable(
        timesteps=np.asarray(timesteps, np.float64),
        alpha=alpha,
        sigma=sigma,
        a=a,
        b=next_alpha - alpha * a,
        c=np.zeros(len(bars)),
        initial_scale=initial_scale,
    )
