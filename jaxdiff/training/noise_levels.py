"""Draws the noise level of each image in a training batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtri

from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.training.recipe import Loss

LEVELS = 20  # equal parts of the timesteps for which losses are reported separately


class NoiseLevels(NamedTuple):
    """The noise levels of a batch, one per image.

    Attributes:
      timesteps: [batch], the network's input.
      alpha, sigma: float32 [batch, 1, 1, 1], with x_t = alpha x_0 + sigma eps.
      shares: float32 [batch], from 0 (no noise) to 1 (no signal).
    """

    timesteps: Array
    alpha: Array
    sigma: Array
    shares: Array


def draw(schedule: NoiseSchedule, loss: Loss, key: Array, count: int) -> NoiseLevels:
    """Draws one noise level from each of `count` equally likely parts of the distribution.

    This lowers the variance between batches (Kingma et al., 2021, arXiv:2107.00630, I.1).
    """
    shares = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
    if loss.timesteps == "logit_normal":
        normal = ndtri(jnp.clip(shares, 1e-6, 1 - 1e-6))
        shares = jax.nn.sigmoid(loss.logit_mean + loss.logit_std * normal)
    steps = schedule.num_train_timesteps
    if schedule.prediction_type == "flow":
        # Esser et al., 2024, arXiv:2403.03206, equation 23; the network gets the shifted timestep.
        # A shift that depends on the size is left to sampling, as by diffusers' scheduler.
        # The minimum of a tenth of a timestep ensures that every image has some noise.
        shift = 1.0 if schedule.use_dynamic_shifting else schedule.shift
        shares = jnp.maximum(shares, 0.1 / steps)
        sigma = shift * shares / (1 + (shift - 1) * shares)
        timesteps, alpha = sigma * steps, 1.0 - sigma
    else:
        timesteps = jnp.minimum((shares * steps).astype(jnp.int32), steps - 1)
        bars = schedule.alpha_bars()  # float64: in float32, 1 - bars is too coarse near bars = 1
        alpha, sigma = (
            jnp.asarray(np.sqrt(each), jnp.float32)[timesteps] for each in (bars, 1.0 - bars)
        )
    return NoiseLevels(timesteps, _beside(alpha), _beside(sigma), shares)


def by_level(losses: Array, shares: Array) -> Array:
    """Returns sums and counts of the losses [batch] by noise level: [2, LEVELS]."""
    level = jnp.minimum((shares * LEVELS).astype(jnp.int32), LEVELS - 1)
    both = jnp.stack([losses, jnp.ones_like(losses)])
    return jax.ops.segment_sum(both.T, level, LEVELS).T


def _beside(values: Array) -> Array:
    """Reshapes [batch] to float32 [batch, 1, 1, 1]."""
    return values.astype(jnp.float32)[:, None, None, None]
