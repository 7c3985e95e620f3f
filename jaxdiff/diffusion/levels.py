"""The timesteps at which a sampler evaluates the network, with their signal and noise levels."""

from dataclasses import dataclass

import numpy as np

from jaxdiff.diffusion.schedule import NEARLY_ZERO_SNR, NoiseSchedule

NEARLY_PURE_NOISE = 1e-6  # replaces an alpha of 0 in multistep solvers, as in diffusers


@dataclass(frozen=True)
class Levels:
    """The noise levels of a sampler's steps, from the noisiest down.

    Attributes:
      timesteps: the network's inputs, float64 [steps].
      alpha, sigma: signal and noise at each timestep and at the end, float64 [steps + 1].
      initial_scale: the factor that turns standard normal noise into the starting point.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    initial_scale: float = 1.0

    @property
    def ratio(self) -> np.ndarray:
        """The noise-to-signal ratio, which Karras et al. and diffusers call sigma; [steps + 1]."""
        return self.sigma / self.alpha


def spaced(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Spaces timesteps as in Lin et al., 2024, arXiv:2305.08891, table 2.

    "linspace" may give values between the training timesteps; the others give whole ones.

    Returns:
      float64 [steps], descending.
    """
    train_steps, points = schedule.num_train_timesteps, steps + schedule.one_more_timestep
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, train_steps - 1, points)[::-1][:steps]
    if schedule.timestep_spacing == "leading":
        places = np.arange(points)[::-1][:steps]
        return places * float(train_steps // points) + schedule.steps_offset
    return np.arange(train_steps, 0, -train_steps / steps).round()[:steps] - 1.0


def trained(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Returns the timesteps of `spaced`, rounded to training timesteps: int64 [steps]."""
    return spaced(schedule, steps).round().astype(np.int64)


def continuous(schedule: NoiseSchedule, steps: int, *, ends_at_last: bool = False) -> Levels:
    """Returns levels by noise-to-signal ratio: Karras et al., 2022, arXiv:2206.00364, section 3."""
    if schedule.is_flow:
        return _flow(schedule, steps, from_pure_noise=ends_at_last)
    table = _ratios(schedule)
    timesteps = spaced(schedule, steps)
    multistep = schedule.one_more_timestep
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
        least = ratios[-1] if ends_at_last else least
    ratios = np.append(ratios, 0.0 if schedule.final_sigmas_type == "zero" else least)
    alpha = 1.0 / np.sqrt(1.0 + ratios**2)
    sigma = ratios * alpha
    from_pure_noise = not multistep and schedule.timestep_spacing != "leading"
    scale = float(sigma[0]) if from_pure_noise else 1.0
    return Levels(timesteps, alpha, sigma, scale)


def _whole(timesteps: np.ndarray, *, to_nearest: bool) -> np.ndarray:
    """Makes timesteps whole, as diffusers' multistep solvers do for the network."""
    if to_nearest:
        return timesteps.round()
    # In diffusers' float32, the topmost is slightly below 999 with Stable Diffusion's betas.
    return np.floor(np.maximum(timesteps - 1e-4, 0.0))


def _ratios(schedule: NoiseSchedule) -> np.ndarray:
    """Returns the noise-to-signal ratio at each training timestep, ascending and finite."""
    alpha_bars = schedule.alpha_bars()
    if schedule.rescale_betas_zero_snr:
        alpha_bars[-1] = NEARLY_ZERO_SNR
    return np.sqrt((1.0 - alpha_bars) / alpha_bars)


def _flow(schedule: NoiseSchedule, steps: int, *, from_pure_noise: bool) -> Levels:
    """Returns levels of flow matching, where alpha = 1 - sigma, spaced as in diffusers.

    See Lipman et al., 2023, arXiv:2210.02747, equation 20, and for the shift Esser et al., 2024,
    arXiv:2403.03206, equation 23. Without `uniform_flow`, it is applied to the smallest sigma and
    then to all of them.
    """
    least = 1.0 / schedule.num_train_timesteps

    def shifted(sigma):
        return schedule.shift * sigma / (1.0 + (schedule.shift - 1.0) * sigma)

    multistep = schedule.one_more_timestep
    if multistep:
        high = 1.0 if from_pure_noise else 1.0 - least
        sigma = np.linspace(high, high - (1.0 - least), steps + 1)[:-1]
    elif schedule.uniform_flow:
        sigma = np.linspace(1.0, 1.0 / steps, steps)
    else:
        sigma = np.linspace(1.0, shifted(least), steps)
    sigma = shifted(sigma)
    if schedule.shift_terminal:
        sigma = 1.0 - (1.0 - sigma) * (1.0 - schedule.shift_terminal) / (1.0 - sigma[-1])
    if multistep and sigma[0] > 1.0 - NEARLY_PURE_NOISE:
        sigma[0] -= NEARLY_PURE_NOISE
    if _is_respaced(schedule):
        sigma = _respaced(schedule, steps, sigma[0], sigma[-1])
    timesteps = schedule.num_train_timesteps * sigma
    sigma = np.append(sigma, 0.0)
    return Levels(np.floor(timesteps) if multistep else timesteps, 1.0 - sigma, sigma)


def _is_respaced(schedule: NoiseSchedule) -> bool:
    return schedule.use_karras_sigmas or schedule.use_exponential_sigmas or schedule.use_beta_sigmas


def _respaced(schedule: NoiseSchedule, steps: int, high: float, low: float) -> np.ndarray:
    """Returns noise levels between two bounds, float64 [steps], descending."""
    high, low = schedule.sigma_max or high, schedule.sigma_min or low
    ramp = np.linspace(0.0, 1.0, steps)
    if schedule.use_karras_sigmas:  # Karras et al., 2022, arXiv:2206.00364, equation 5
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if schedule.use_exponential_sigmas:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    # Lee et al., 2024, arXiv:2407.12173
    import scipy.special  # takes 0.1 s, which would slow down every start

    return low + (high - low) * scipy.special.betaincinv(0.6, 0.6, 1.0 - ramp)
