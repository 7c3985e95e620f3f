"""The noise schedules of flow-matching pipelines, which depend on size and steps. No JAX."""

from dataclasses import replace

from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.request import Bucket

TOKEN_PX = 16  # along each side: 8 pixels a latent, 2 latents a patch
# Flux.2's mu: lines in the number of tokens for 10 and for 200 steps.
SHORT, LONG = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)
MANY_TOKENS = 4300  # from which the steps do not matter


def uniform(config: dict, bucket: Bucket) -> NoiseSchedule:
    """Returns the schedule of pipelines that space sigmas evenly from 1 to 1 / steps.

    Args:
      config: the scheduler's config.
      bucket: what the images have in common.

    Raises:
      InputError: if the config is not supported.
    """
    schedule = replace(noise_schedule(config, bucket.sampler), uniform_flow=True)
    return schedule.shifted_for(tokens(bucket))


def tokens(bucket: Bucket) -> int:
    """Returns the number of an image's tokens, by which shifts are computed."""
    return (bucket.height // TOKEN_PX) * (bucket.width // TOKEN_PX)


def empirical(config: dict, bucket: Bucket) -> NoiseSchedule:
    """Returns the schedule of Flux.2's pipelines; see `uniform`."""
    schedule = replace(noise_schedule(config, bucket.sampler), uniform_flow=True)
    return schedule.shifted_by(empirical_mu(tokens(bucket), bucket.steps))


def empirical_mu(count: int, steps: int) -> float:
    """Returns the mu of Flux.2 for a number of tokens, between those for 10 and 200 steps."""
    short, long = (slope * count + offset for slope, offset in (SHORT, LONG))
    if count > MANY_TOKENS:
        return long
    return long + (short - long) * (200 - steps) / 190
