"""Divides an image's steps between the denoisers and into guided and unguided. Imports no JAX."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.diffusion.schedule import Clamp
from jaxdiff.request import Options


class StepRange(NamedTuple):
    """Consecutive rows of a sampler's table with the same denoiser and guidance.

    Attributes:
      denoiser: 0, or 1 for the refiner.
      rows: the number of rows; each is an evaluation of the denoiser, on two batches if guided.
      guided: whether classifier-free guidance is on.
      clamp: how the denoiser's estimates of x_0 are clamped; None if they are not.
    """

    denoiser: int
    rows: int
    guided: bool
    clamp: Clamp | None = None


def step_ranges(
    timesteps: np.ndarray,
    options: Options,
    *,
    guided: bool,
    guidable: Sequence[bool],
    clamps: Sequence[Clamp | None],
    train_steps: int,
) -> tuple[StepRange, ...]:
    """Returns the ranges of a table, which cover all its rows.

    Args:
      timesteps: [rows], of the base model's `SamplerTable`.
      options: when guidance begins and ends, and when a refiner takes over.
      guided: whether the image is guided at all.
      guidable: for each denoiser (one, or two with a refiner), whether it is evaluated twice in a
        guided step, and not once because it takes the guidance scale as an input or none.
      clamps: for each denoiser, how its estimates are clamped, as in `StepRange`.
      train_steps: the number of timesteps that the base model was trained with.
    """
    rows = refined_from = len(timesteps)
    if len(guidable) > 1:
        cut = round(train_steps * (1.0 - options.refiner_start))
        refined_from = int((timesteps >= cut).sum())
    guided_from = round(rows * options.guidance_start)
    guided_until = round(rows * options.guidance_stop)
    edges = sorted({0, min(guided_from, rows), min(guided_until, rows), refined_from, rows})
    ranges = []
    for begin, end in itertools.pairwise(edges):
        denoiser = int(begin >= refined_from)
        is_guided = guided and guided_from <= begin and end <= guided_until
        is_guided = is_guided and guidable[denoiser]
        ranges.append(StepRange(denoiser, end - begin, is_guided, clamps[denoiser]))
    return tuple(ranges)
