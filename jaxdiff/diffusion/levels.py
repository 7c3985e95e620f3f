"""Where on its schedule a sampler stops: the timesteps and the signal and noise at each of them."""

from dataclasses import dataclass

import numpy as np

from jaxdiff.diffusion.schedule import NEARLY_ZERO_SNR, ONE_MORE_TIMESTEP, NoiseSchedule


@dataclass(frozen=True)
class Levels:
    """The noise levels of a sampler's steps, from the noisiest down.

    Attributes:
      timesteps: what the network is told, float64 [steps].
      alpha, sigma: signal and noise there and at the end, float64 [steps + 1].
      initial_scale: what standard normal noise is multiplied by to begin.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    initial_scale: float = 1.0

    @property
    def ratio(self) -> np.ndarray:
        """Noise per signal, which Karras et al. and diffusers call sigma; [steps + 1]."""
        return self.sigma / self.alpha


def spaced(schedule: NoiseSchedule, steps: int, sampler: str) -> np.ndarray:
    """Lin et al., 2024, arXiv:2305.08891, table 2: float64 [steps], descending.

    "linspace" may fall between the training timesteps; the others give whole ones.
    """
    train_steps, points = schedule.num_train_timesteps, steps + (sampler in ONE_MORE_TIMESTEP)
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, train_steps - 1, points)[::-1][:steps]
    if schedule.timestep_spacing == "leading":
        places = np.arange(points)[::-1][:steps]
        return places * float(train_steps // points) + schedule.steps_offset
    return np.arange(train_steps, 0, -train_steps / steps).round()[:steps] - 1.0


def trained(schedule: NoiseSchedule, steps: int, sampler: str) -> np.ndarray:
    """The same, rounded to timesteps of the training: int64 [steps]."""
    return spaced(schedule, steps, sampler).round().astype(np.int64)


def continuous(schedule: NoiseSchedule, steps: int, sampler: str) -> Levels:
    """Levels in terms of noise per signal: Karras et al., 2022, arXiv:2206.00364, section 3."""
    if schedule.prediction_type == "flow":
        return _flow(schedule, steps)
    table = _ratios(schedule)
    timesteps = spaced(schedule, steps, sampler)
    multistep = sampler in ONE_MORE_TIMESTEP
    if multistep:
        timesteps = timesteps.round()
    places = np.arange(len(table))
    ratios = np.interp(timesteps, places, table)
    bounds = table[[-1, 0]] if multistep else ratios[[0, -1]]
    least = table[0]
    if _is_respaced(schedule):
        ratios = _respaced(schedule, steps, *bounds)
        timesteps = np.interp(np.log(ratios), np.log(table), places)
        if multistep:
            timesteps = _whole(timesteps, to_nearest=schedule.use_karras_sigmas)
        least = ratios[-1] if sampler == "unipc" else least
    ratios = np.append(ratios, 0.0 if schedule.final_sigmas_type == "zero" else least)
    alpha = 1.0 / np.sqrt(1.0 + ratios**2)
    sigma = ratios * alpha
    from_pure_noise = not multistep and schedule.timestep_spacing != "leading"
    scale = float(sigma[0]) if from_pure_noise else 1.0
    return Levels(timesteps, alpha, sigma, scale)


def _whole(timesteps: np.ndarray, *, to_nearest: bool) -> np.ndarray:
    """Timesteps as diffusers' multistep solvers tell them to the network."""
    if to_nearest:
        return timesteps.round()
    # In float32, as there, the topmost comes out a little below 999 with Stable Diffusion's betas.
    return np.floor(np.maximum(timesteps - 1e-4, 0.0))


def _ratios(schedule: NoiseSchedule) -> np.ndarray:
    """Noise per signal at each training timestep, ascending, finite."""
    alpha_bars = schedule.alpha_bars()
    if schedule.rescale_betas_zero_snr:
        alpha_bars[-1] = NEARLY_ZERO_SNR
    return np.sqrt((1.0 - alpha_bars) / alpha_bars)


def _flow(schedule: NoiseSchedule, steps: int) -> Levels:
    """Flow matching, alpha = 1 - sigma: Lipman et al., 2023, arXiv:2210.02747, equation 20.

    The shift (Esser et al., 2024, arXiv:2403.03206, equation 23) is applied to the least sigma and
    then to all, as diffusers does.
    """
    train_steps = schedule.num_train_timesteps

    def shifted(sigma):
        return schedule.shift * sigma / (1.0 + (schedule.shift - 1.0) * sigma)

    sigma = shifted(np.linspace(1.0, shifted(1.0 / train_steps), steps))
    if _is_respaced(schedule):
        sigma = _respaced(schedule, steps, sigma[0], sigma[-1])
    sigma = np.append(sigma, 0.0)
    return Levels(train_steps * sigma[:-1], 1.0 - sigma, sigma)


def _is_respaced(schedule: NoiseSchedule) -> bool:
    return schedule.use_karras_sigmas or schedule.use_exponential_sigmas or schedule.use_beta_sigmas


def _respaced(schedule: NoiseSchedule, steps: int, high: float, low: float) -> np.ndarray:
    """Noise levels between two, float64 [steps], descending."""
    high, low = schedule.sigma_max or high, schedule.sigma_min or low
    ramp = np.linspace(0.0, 1.0, steps)
    if schedule.use_karras_sigmas:  # Karras et al., 2022, arXiv:2206.00364, equation 5
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if schedule.use_exponential_sigmas:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    # Lee et al., 2024, arXiv:2407.12173
    import scipy.special  # takes 0.1 s, which every start would pay

    return low + (high - low) * scipy.special.betaincinv(0.6, 0.6, 1.0 - ramp)
