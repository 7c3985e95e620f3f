"""Which steps of an image fall to which denoiser, and which of them are guided. Imports no JAX."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdiff.request import Options


class Stretch(NamedTuple):
    """Rows of a sampler's table that one denoiser takes, guided or not.

    Attributes:
      expert: 0, or 1 for the refiner.
      rows: how many, in turn; each is an evaluation of the denoiser, of two batches if guided.
      guided: whether classifier-free guidance holds.
    """

    expert: int
    rows: int
    guided: bool


def stretches_of(
    timesteps: np.ndarray,
    options: Options,
    *,
    guided: bool,
    distilled: Sequence[bool],
    train_steps: int,
) -> tuple[Stretch, ...]:
    """The stretches of a table, which cover its rows.

    Args:
      timesteps: [rows], of the base model's `SamplerTable`.
      options: say when guidance begins and ends, and when a refiner takes over.
      guided: whether the image is guided at all.
      distilled: for each expert, whether it needs no guidance: one, or two with a refiner.
      train_steps: how many timesteps the base model was trained with.
    """
    rows = refined_from = len(timesteps)
    if len(distilled) > 1:
        cut = round(train_steps * (1.0 - options.refiner_start))
        refined_from = int((timesteps >= cut).sum())
    guided_from = round(rows * options.guidance_start)
    guided_until = round(rows * options.guidance_stop)
    edges = sorted({0, min(guided_from, rows), min(guided_until, rows), refined_from, rows})
    stretches = []
    for begin, end in itertools.pairwise(edges):
        expert = int(begin >= refined_from)
        is_guided = guided and guided_from <= begin and end <= guided_until
        stretches.append(Stretch(expert, end - begin, is_guided and not distilled[expert]))
    return tuple(stretches)
