"""The noise schedule: how much signal and noise there is at each timestep. Imports no JAX.

The tables are computed on the host in NumPy float64, so that rounding errors come only from the
denoiser.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

NEARLY_ZERO_SNR = 2.0**-24  # replaces 0 where a sampler divides by alpha, as in diffusers


class Clamp(NamedTuple):
    """How a sampler clamps the estimates of x_0, as in `objective.clamped`.

    Attributes:
      limit: the magnitude to clip to or, with `ratio`, the largest threshold.
      ratio: the quantile of an image's magnitudes that is its threshold; None for plain clipping.
    """

    limit: float
    ratio: float | None = None


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of a scheduler config that affect a sampler's steps, by diffusers' names.

    Attributes:
      prediction_type: what the network predicts, as in `objective.to_x0`; with "flow" the schedule
        is that of flow matching, where alpha = 1 - sigma and the betas have no effect.
      set_alpha_to_one: whether the last step of DDIM and PNDM ends without noise rather than with
        the noise of timestep 0.
      shift: the shift of a flow schedule (Esser et al., 2024, arXiv:2403.03206, equation 23).
      shift_terminal: the last noise level of a flow schedule, to which it is stretched; None if it
        is not.
      use_dynamic_shifting: whether the shift still has to be computed; see `shifted_by`.
      uniform_flow: whether a flow schedule's levels are spaced evenly from 1 to 1 / steps, before
        they are shifted, rather than between the bounds of the training's levels.
      one_more_timestep: whether to space one more timestep than steps and to drop the last, nearly
        noiseless one, as diffusers' multistep solvers do.
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
    shift_terminal: float | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    uniform_flow: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    one_more_timestep: bool = False

    def alpha_bars(self) -> np.ndarray:
        """Returns the signal's share of the variance at each training timestep, float64."""
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
        if self.beta_schedule == "scaled_linear":  # Stable Diffusion's: linear in sqrt(beta)
            return np.linspace(start**0.5, end**0.5, count) ** 2
        # Nichol and Dhariwal, 2021, arXiv:2102.09672, equation 17
        times = np.linspace(0.0, 1.0, count + 1)
        alpha_bars = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bars[1:] / alpha_bars[:-1], 0.999)

    def shifted_for(self, tokens: int) -> "NoiseSchedule":
        """Returns the schedule for images of this many tokens, if its shift depends on them.

        mu is linear in the number of tokens: arXiv:2403.03206, section 5.3.2, and Black Forest
        Labs' code.
        """
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return self.shifted_by(self.base_shift + slope * (tokens - self.base_image_seq_len))

    def shifted_by(self, mu: float) -> "NoiseSchedule":
        """Returns the schedule with the shift of a mu, if it is dynamic, else itself."""
        if not self.use_dynamic_shifting:
            return self
        shift = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return replace(self, shift=shift, use_dynamic_shifting=False)

    @property
    def is_flow(self) -> bool:
        """Whether this is a schedule of flow matching."""
        return self.prediction_type == "flow"

    @property
    def clamp(self) -> Clamp | None:
        """How estimates of x_0 are clamped; None if they are not."""
        if self.thresholding:
            return Clamp(self.sample_max_value, self.dynamic_thresholding_ratio)
        return Clamp(self.clip_sample_range) if self.clip_sample else None

    def max_steps(self) -> int:
        """Returns the largest number of steps that a sampler can take; the smallest is 1."""
        train_steps, one_more = self.num_train_timesteps, self.one_more_timestep
        if self.is_flow or self.timestep_spacing == "trailing":
            return train_steps
        if self.timestep_spacing == "linspace":
            return train_steps - one_more
        steps = np.arange(1, train_steps + 1 - one_more)
        points = steps + one_more
        fits = (points - 1) * (train_steps // points) + self.steps_offset < train_steps
        return int(np.logical_and.accumulate(fits).sum())
