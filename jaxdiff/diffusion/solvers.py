"""The solvers, each a function from the noise schedule and the number of steps to a table.

x_t is alpha x_0 + sigma eps here, whatever the notation of the paper. At the ends of a trajectory,
the solvers make the same choices as diffusers, so that they give the same images.
"""

from dataclasses import dataclass

import numpy as np

from jaxdiff.diffusion import levels
from jaxdiff.diffusion.levels import Levels
from jaxdiff.diffusion.schedule import NoiseSchedule

REMEMBERED = 5  # evaluations: PLMS uses four of the last five


@dataclass(frozen=True)
class SamplerTable:
    """A sampler's table, with a row for each evaluation of the network; arrays are float64 [rows].

    Attributes:
      timesteps: the timestep that the network gets.
      alpha, sigma: signal and noise in the network's input.
      p, q: the coefficients of h = p x + q D, the remembered value of an evaluation, where D is the
        estimate of x_0, clamped if the schedule says so.
      a, b: the coefficients of x' = a x + b[0] h + b[1] h_previous + ... + s z; b is [rows,
        REMEMBERED].
      c: the coefficient of what clamping took away, the network's estimate minus D, which is added
        to x'.
      s: the scale of the fresh noise z.
      initial_scale: the factor that turns standard normal noise into the starting point.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    p: np.ndarray
    q: np.ndarray
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    s: np.ndarray
    initial_scale: float

    @property
    def draws(self) -> int:
        """The number of rows up to the last one with fresh noise, that is, with nonzero `s`."""
        return int(np.flatnonzero(self.s).max(initial=-1)) + 1

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the arrays as float32, for the scan."""
        names = ("timesteps", "alpha", "sigma", "p", "q", "a", "b", "c", "s")
        return {name: getattr(self, name).astype(np.float32) for name in names}


def _table(timesteps, alpha, sigma, a, b, *, p=0.0, q=1.0, c=0.0, s=0.0, initial_scale=1.0):
    """Makes a table from columns [rows] or numbers; `b` may be [rows] or have fewer columns."""
    rows = len(timesteps)
    b = np.asarray(b, np.float64).reshape(rows, -1)
    return SamplerTable(
        timesteps=np.asarray(timesteps, np.float64),
        alpha=alpha,
        sigma=sigma,
        p=np.broadcast_to(p, rows).astype(np.float64),
        q=np.broadcast_to(q, rows).astype(np.float64),
        a=a,
        b=np.pad(b, ((0, 0), (0, REMEMBERED - b.shape[1]))),
        c=np.broadcast_to(c, rows).astype(np.float64),
        s=np.broadcast_to(s, rows).astype(np.float64),
        initial_scale=initial_scale,
    )


def _from_levels(at: Levels, a, b, *, s=0.0) -> SamplerTable:
    return _table(
        at.timesteps, at.alpha[:-1], at.sigma[:-1], a, b, s=s, initial_scale=at.initial_scale
    )


# Samplers with one evaluation per step and no history.


def ddim(schedule: NoiseSchedule, steps: int, *, eta: float = 0.0) -> SamplerTable:
    """Song et al., 2021, arXiv:2010.02502, equations 12 and 16.

    Where estimates of x_0 are clamped, the direction is still that of the network's own estimate.
    """
    timesteps, bars = levels.trained(schedule, steps), schedule.alpha_bars()
    previous = timesteps - schedule.num_train_timesteps // steps  # rounded down, as in diffusers
    bar, next_bar = bars[timesteps], _or_final(schedule, bars, previous)
    alpha, sigma, next_alpha = np.sqrt(bar), np.sqrt(1.0 - bar), np.sqrt(next_bar)
    variance = eta**2 * (1.0 - next_bar) / (1.0 - bar) * (1.0 - bar / next_bar)
    a = np.sqrt(np.maximum(1.0 - next_bar - variance, 0.0)) / sigma
    b, s = next_alpha - alpha * a, np.sqrt(variance)
    return _table(timesteps, alpha, sigma, a, b, c=-alpha * a, s=s)


def ddpm(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Ho et al., 2020, arXiv:2006.11239, equations 6 and 7, between the chosen timesteps.

    The variance is that of equation 7 or, with "fixed_large", the step's beta.
    """
    timesteps = levels.trained(schedule, steps)
    bar = schedule.alpha_bars()[timesteps]
    next_bar = np.append(bar[1:], 1.0)
    beta, share = 1.0 - bar / next_bar, (1.0 - next_bar) / (1.0 - bar)
    variance = beta if schedule.variance_type == "fixed_large" else share * beta
    return _table(
        timesteps,
        np.sqrt(bar),
        np.sqrt(1.0 - bar),
        a=np.sqrt(bar / next_bar) * share,
        b=np.sqrt(next_bar) * beta / (1.0 - bar),
        s=np.sqrt(variance) * (timesteps > 0),
    )


def lcm(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Luo et al., 2023, arXiv:2310.04378, algorithm 3: estimates x_0 and adds noise again.

    The estimate is mixed with x so that it equals x at timestep 0 (Song et al., 2023,
    arXiv:2303.01469, equation 5). The timesteps are a subset of those used in distillation.
    """
    originally = schedule.original_inference_steps
    trained = np.arange(originally, 0, -1) * (schedule.num_train_timesteps // originally) - 1
    timesteps = trained[np.linspace(0, originally, steps, endpoint=False).astype(np.int64)]
    bar = schedule.alpha_bars()[timesteps]
    next_bar = np.append(bar[1:], 1.0)
    time, deviation = timesteps * schedule.timestep_scaling, 0.5
    skip = deviation**2 / (time**2 + deviation**2)
    out = time / np.sqrt(time**2 + deviation**2)
    return _table(
        timesteps,
        np.sqrt(bar),
        np.sqrt(1.0 - bar),
        a=np.sqrt(next_bar) * skip,
        b=np.sqrt(next_bar) * out,
        s=np.sqrt(1.0 - next_bar),
    )


def euler(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Karras et al., 2022, arXiv:2206.00364, algorithm 1 without line 8; also for flow matching."""
    at = levels.continuous(schedule, steps)
    a = at.sigma[1:] / at.sigma[:-1]
    return _from_levels(at, a, at.alpha[1:] - at.alpha[:-1] * a)


def euler_ancestral(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Song et al., 2021, arXiv:2011.13456, appendix F: an Euler step, then fresh noise.

    The Euler step goes below the next noise level, which the fresh noise, as much as DDPM would
    draw, then restores.
    """
    at = levels.continuous(schedule, steps)
    now, after = at.ratio[:-1], at.ratio[1:]
    fresh = after * np.sqrt(1.0 - (after / now) ** 2)
    down = np.sqrt(after**2 - fresh**2) / now
    next_alpha = at.alpha[1:]
    return _from_levels(
        at, next_alpha * down / at.alpha[:-1], next_alpha * (1.0 - down), s=next_alpha * fresh
    )


# Heun's method: two evaluations per step.


def heun(schedule: NoiseSchedule, steps: int) -> SamplerTable:
    """Karras et al., 2022, arXiv:2206.00364, algorithm 1; it has 2 steps - 1 rows.

    After an Euler step from the noise-to-signal ratio r to r', with the estimates D and D' at both
    ends, the corrected state of the algorithm's line 8 is x' + alpha' (1 - r / r') (D - D') / 2.
    Flow matching's velocity is a derivative by sigma, which takes the place of r, with alpha' = 1.
    """
    predictor = euler(schedule, steps)
    at = levels.continuous(schedule, steps)
    rows = 2 * steps - 1
    place = (np.arange(rows) + 1) // 2  # all levels except the first are evaluated twice
    a, b = np.ones(rows), np.zeros((rows, 2))
    a[::2], b[::2] = predictor.a, predictor.b[:, :2]
    if schedule.is_flow:
        half = (1.0 - at.sigma[:-2] / at.sigma[1:-1]) / 2.0
    else:
        half = at.alpha[1:-1] * (1.0 - at.ratio[:-2] / at.ratio[1:-1]) / 2.0
    b[1::2] = np.stack([-half, half], axis=1)
    return _table(
        at.timesteps[place], at.alpha[place], at.sigma[place], a, b, initial_scale=at.initial_scale
    )


# Multistep methods, which use the estimates of earlier steps.


def pndm(schedule: NoiseSchedule, steps: int, *, begin: int = 0) -> SamplerTable:
    """PLMS: Liu et al., 2022, arXiv:2202.09778, equations 11 and 12, started as in diffusers.

    The first step is taken twice, the second time with the mean of the outputs at both its ends, so
    there is one more row than steps. The method combines the network's own outputs, epsilon or v.
    """
    stride, bars = schedule.num_train_timesteps // steps, schedule.alpha_bars()
    timesteps = levels.trained(schedule, steps)
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    alpha, sigma = np.sqrt(bars[timesteps]), np.sqrt(1.0 - bars[timesteps])
    again = np.arange(len(timesteps)) == begin + 1
    starts = timesteps + stride * again
    x_weight, output_weight = _plms_transfer(
        schedule, bars[starts], _or_final(schedule, bars, starts - stride)
    )
    a, b = x_weight.copy(), np.zeros((len(timesteps), REMEMBERED))
    for row in range(len(timesteps)):
        b[row] = output_weight[row] * _adams_bashforth(max(row - begin, 0))
    if begin + 1 < len(a):  # from the x before the first step, recovered from x and the output
        a[begin + 1] /= x_weight[begin]
        b[begin + 1, 1] -= a[begin + 1] * output_weight[begin]
    p, q = (1.0 / sigma, -alpha / sigma)  # x = alpha D + sigma epsilon
    if schedule.prediction_type == "v_prediction":
        p, q = (alpha / sigma, -1.0 / sigma)  # D = alpha x - sigma v
    return _table(timesteps, alpha, sigma, a, b, p=p, q=q)


def _plms_transfer(schedule: NoiseSchedule, bar, next_bar) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of x and the output in a DDIM step (arXiv:2202.09778, equation 11)."""
    alpha, sigma = np.sqrt(bar), np.sqrt(1.0 - bar)
    next_alpha, next_sigma = np.sqrt(next_bar), np.sqrt(1.0 - next_bar)
    if schedule.prediction_type == "v_prediction":
        return next_alpha * alpha + next_sigma * sigma, next_sigma * alpha - next_alpha * sigma
    return next_alpha / alpha, next_sigma - next_alpha / alpha * sigma


def _adams_bashforth(evaluation: int) -> np.ndarray:
    """Returns the weights of the last outputs, newest first; later steps skip evaluation 1."""
    weights = np.zeros(REMEMBERED)
    if evaluation == 1:
        weights[:2] = 0.5
        return weights
    used = [k for k in range(REMEMBERED) if evaluation == k or evaluation - k >= 2][:4]
    of_order = {
        1: np.array([1.0]),
        2: np.array([3.0, -1.0]) / 2.0,
        3: np.array([23.0, -16.0, 5.0]) / 12.0,
        4: np.array([55.0, -59.0, 37.0, -9.0]) / 24.0,
    }
    weights[used] = of_order[len(used)]
    return weights


def dpmpp_2m(schedule: NoiseSchedule, steps: int, *, begin: int = 0) -> SamplerTable:
    """DPM-Solver++(2M): Lu et al., 2022, arXiv:2211.01095, algorithm 2."""
    at = levels.continuous(schedule, steps)
    ratio = _extrapolation(schedule, at, begin)
    gain = at.alpha[1:] * (1.0 - at.ratio[1:] / at.ratio[:-1])
    b = np.stack([gain * (1.0 + ratio), -gain * ratio], axis=1)
    return _from_levels(at, at.sigma[1:] / at.sigma[:-1], b)


def dpmpp_2m_sde(schedule: NoiseSchedule, steps: int, *, begin: int = 0) -> SamplerTable:
    """SDE-DPM-Solver++(2M): Lu et al., 2022, arXiv:2211.01095, section 5."""
    at = levels.continuous(schedule, steps)
    ratio = _extrapolation(schedule, at, begin)
    decay = at.ratio[1:] / at.ratio[:-1]  # e^-h
    gain = at.alpha[1:] * (1.0 - decay**2)
    b = np.stack([gain * (1.0 + ratio), -gain * ratio], axis=1)
    a = at.sigma[1:] / at.sigma[:-1] * decay
    return _from_levels(at, a, b, s=at.sigma[1:] * np.sqrt(1.0 - decay**2))


def _extrapolation(schedule: NoiseSchedule, at: Levels, begin: int) -> np.ndarray:
    """Returns how far each step extrapolates the last two estimates: 1 / (2 r), 0 for first order.

    The first step is of first order because it has no history. So is the last one if no noise is
    left at its end, where the factor would be infinite, or if the trajectory is short.
    """
    steps = len(at.timesteps)
    h = np.diff(_half_log_snr(at))
    ratio = np.zeros(steps)
    ratio[begin + 1 :] = h[begin + 1 :] / (2.0 * h[begin:-1])
    short = schedule.lower_order_final and steps < 15
    if short or schedule.euler_at_final or schedule.final_sigmas_type == "zero":
        ratio[-1] = 0.0
    return ratio


def _half_log_snr(at: Levels) -> np.ndarray:
    """Returns the papers' lambda, log(alpha / sigma); infinite where there is no noise."""
    with np.errstate(divide="ignore"):
        return -np.log(at.ratio)


def unipc(schedule: NoiseSchedule, steps: int, *, begin: int = 0) -> SamplerTable:
    """UniPC: Zhao et al., 2023, arXiv:2302.04867, algorithms 1 and 2, with estimates of x_0.

    x is the predictor's result. The corrector adds a combination of estimates to it, including the
    estimate at x itself, so the correction is part of the next step.
    """
    at = levels.continuous(schedule, steps, ends_at_last=True)
    half_log_snr = _half_log_snr(at)
    a = at.sigma[1:] / at.sigma[:-1]
    b = np.zeros((steps, REMEMBERED))
    bh1, order = schedule.solver_type == "bh1", 0
    for row in range(steps):
        if row > begin:  # `order` is still that of the previous step
            weights = _unipc_correction(half_log_snr[: row + 1], order, bh1)
            b[row, : order + 1] += a[row] * at.alpha[row] * weights
        order = min(schedule.solver_order, max(row - begin, 0) + 1)
        if schedule.lower_order_final:
            order = min(order, steps - row)
        weights = _unipc_prediction(half_log_snr[: row + 2], order, bh1)
        b[row, :order] += at.alpha[row + 1] * weights
    return _from_levels(at, a, b)


def _unipc_prediction(half_log_snr: np.ndarray, order: int, bh1: bool) -> np.ndarray:
    """Returns the weights of the last estimates in UniP's step: [order], newest first, over alpha.

    Args:
      half_log_snr: the values up to the step's end.
      order: the number of estimates used.
      bh1: whether B(h) is h rather than e^h - 1.
    """
    h = half_log_snr[-1] - half_log_snr[-2]
    newest = -np.expm1(-h)
    if order == 1:
        return np.array([newest])
    places, scale, weights, _ = _unipc_terms(half_log_snr, order, bh1)
    weights = scale * weights / places
    return np.array([newest + weights.sum(), *-weights])


def _unipc_correction(half_log_snr: np.ndarray, order: int, bh1: bool) -> np.ndarray:
    """Returns the weights of UniC's correction: [order + 1], first that of the estimate at x."""
    places, scale, predicted, corrected = _unipc_terms(half_log_snr, order, bh1)
    weights = scale * (predicted - corrected[:-1]) / places
    newest = scale * corrected[-1]
    return np.array([-newest, newest - weights.sum(), *weights])


def _unipc_terms(half_log_snr: np.ndarray, order: int, bh1: bool):
    """Returns the r_m of the earlier estimates, B(-h), and UniP's and UniC's a_m (theorem 3.1)."""
    h = half_log_snr[-1] - half_log_snr[-2]
    places = (half_log_snr[-3 : -order - 2 : -1] - half_log_snr[-2]) / h
    scale = -h if bh1 else np.expm1(-h)
    right, phi, factorial = [], np.expm1(-h) / -h - 1.0, 1
    for k in range(1, order + 1):
        right.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1.0 / factorial
    matrix = np.vander([*places, 1.0], order, increasing=True).T
    if order == 1:  # as in the authors' code
        return places, scale, places, np.array([0.5])
    predicted = np.array([0.5])
    if order == 3:
        predicted = np.linalg.solve(matrix[:-1, :-1], right[:-1])
    return places, scale, predicted, np.linalg.solve(matrix, right)


def _or_final(schedule: NoiseSchedule, bars: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Returns `bars` at `timesteps`, with the final value where a timestep is negative."""
    final = 1.0 if schedule.set_alpha_to_one else bars[0]
    return np.where(timesteps >= 0, bars[np.maximum(timesteps, 0)], final)
