"""Divides an image's steps between the denoisers and into guided and unguided. Imports no JAX."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.diffusion.schedule import Clamp
from jaxdiff.request import Options

# Skip-layer guidance goes from the first share of the steps to the second, both exclusive, as in
# diffusers and Stability AI's code.
SKIP_AFTER, SKIP_UNTIL = 0.01, 0.2


class StepRange(NamedTuple):
    """Consecutive rows of a sampler's table with the same denoiser and guidance.

    Attributes:
      denoiser: 0, or 1 for the refiner.
      rows: the number of rows, in each of which the denoiser is evaluated.
      guided: whether classifier-free guidance is on.
      clamp: how the denoiser's estimates of x_0 are clamped; None if they are not.
      skips: whether there is a third evaluation, without `Options.skip_layers`.
      controlled: whether ControlNets steer it.
      image_guided: whether the image that is edited guides it, too, by a third evaluation.
    """

    denoiser: int
    rows: int
    guided: bool
    clamp: Clamp | None = None
    skips: bool = False
    controlled: bool = False
    image_guided: bool = False

    @property
    def evaluations(self) -> int:
        """The number of evaluations of the denoiser in each row, for one image."""
        return 1 + self.guided + self.skips + self.image_guided


def skipped_steps(steps: int, strength: float, *, is_flow: bool) -> int:
    """Returns how many of an image's steps are skipped because it begins with another image.

    As in diffusers, a model of flow matching rounds in another way than others.

    Args:
      steps: the number of sampling steps.
      strength: the share of the steps to take, 0 to 1.
      is_flow: whether the model was trained by flow matching.
    """
    taken = min(steps * strength, steps)
    return int(steps - taken) if is_flow else steps - int(taken)


def after(ranges: Sequence[StepRange], begin: int) -> tuple[StepRange, ...]:
    """Returns the ranges of a table without its first `begin` rows."""
    rest = []
    for part in ranges:
        cut = min(begin, part.rows)
        begin -= cut
        if part.rows > cut:
            rest.append(part._replace(rows=part.rows - cut))
    return tuple(rest)


def with_control(ranges: Sequence[StepRange], start: float, end: float) -> tuple[StepRange, ...]:
    """Splits ranges where ControlNets begin and end to steer the first denoiser.

    Args:
      ranges: of the rows that are evaluated.
      start, end: the part of these rows that is steered, as fractions; a row counts if it lies
        within them as a whole, as in diffusers.
    """
    rows = sum(part.rows for part in ranges)
    within = [not (row / rows < start or (row + 1) / rows > end) for row in range(rows)]
    split, begin = [], 0
    for part in ranges:
        steered = within[begin : begin + part.rows]
        begin += part.rows
        for controlled, group in itertools.groupby(steered):
            count, controlled = len([*group]), controlled and part.denoiser == 0
            split.append(part._replace(rows=count, controlled=controlled))
    return tuple(split)


def step_ranges(
    timesteps: np.ndarray,
    options: Options,
    *,
    guided: bool,
    guidable: Sequence[bool],
    clamps: Sequence[Clamp | None],
    train_steps: int,
    steps: int,
    image_guided: bool = False,
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
      steps: the number of sampling steps.
      image_guided: whether guided steps are guided by an image, too.
    """
    rows = refined_from = len(timesteps)
    if len(guidable) > 1:
        cut = round(train_steps * (1.0 - options.refiner_start))
        refined_from = int((timesteps >= cut).sum())
    guided_from = round(rows * options.guidance_start)
    guided_until = round(rows * options.guidance_stop)
    skip_from = skip_until = 0
    if options.skip_layers:
        skip_from = int(SKIP_AFTER * steps) + 1
        skip_until = max(math.ceil(SKIP_UNTIL * steps), skip_from)
    places = (guided_from, guided_until, refined_from, skip_from, skip_until)
    edges = sorted({0, *(min(place, rows) for place in places), rows})
    ranges = []
    for begin, end in itertools.pairwise(edges):
        denoiser = int(begin >= refined_from)
        is_guided = guided and guided_from <= begin and end <= guided_until
        is_guided = is_guided and guidable[denoiser]
        skips = is_guided and skip_from <= begin and end <= skip_until
        ranges.append(
            StepRange(
                denoiser,
                end - begin,
                is_guided,
                clamps[denoiser],
                skips,
                image_guided=is_guided and image_guided,
            )
        )
    return tuple(ranges)
