"""The noise schedules of flow-matching pipelines, which depend on size and steps. No JAX."""

from dataclasses import replace

from jaxdiff.diffusion.schedule import NoiseSchedule
from jaxdiff.diffusion.scheduler_config import noise_schedule
from jaxdiff.request import Bucket

# Flux.2's mu: lines in the number of tokens for 10 and for 200 steps.
SHORT, LONG = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)
MANY_TOKENS = 4300  # from which the steps do not matter


def uniform(config: dict, bucket: Bucket, patch_px: int) -> NoiseSchedule:
    """Returns the schedule of pipelines that space sigmas evenly from 1 to 1 / steps.

    Args:
      config: the scheduler's config.
      bucket: what the images have in common.
      patch_px: the number of pixels along each side of a token.

    Raises:
      InputError: if the config is not supported.
    """
    tokens = (bucket.height // patch_px) * (bucket.width // patch_px)
    schedule = replace(noise_schedule(config, bucket.sampler), uniform_flow=True)
    return schedule.shifted_for(tokens)


def empirical_mu(tokens: int, steps: int) -> float:
    """Returns the mu of Flux.2, interpolated between those for 10 and for 200 steps."""
    short, long = (slope * tokens + offset for slope, offset in (SHORT, LONG))
    if tokens > MANY_TOKENS:
        return long
    return long + (short - long) * (200 - steps) / 190
