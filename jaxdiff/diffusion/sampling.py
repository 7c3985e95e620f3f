"""The scan from noise to x_0 along a sampler's table."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.diffusion.objective import clamped
from jaxdiff.diffusion.schedule import Clamp
from jaxdiff.diffusion.solvers import REMEMBERED

# Maps (x, timestep, alpha, sigma, kept) to the estimate of x_0, in x's shape, and to what this
# evaluation keeps for cheaper ones after it. If `kept` is None, the evaluation is a full one.
Denoiser = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


class Stretch(NamedTuple):
    """Consecutive rows of a sampler's table with one denoiser.

    Attributes:
      rows: the number of rows.
      denoise: the denoiser that is evaluated in each.
      clamp: how its estimates of x_0 are clamped; None if they are not.
    """

    rows: int
    denoise: Denoiser
    clamp: Clamp | None = None


def sample(
    stretches: Sequence[Stretch],
    noise: Array,
    initial_scale: Array | float,
    columns: dict[str, Array],
    fresh_noise: Array | None = None,
    *,
    whole_every: int = 1,
) -> Array:
    """Runs a sampler from noise to x_0.

    Args:
      stretches: the denoisers, in order; their rows add up to all rows of the table. The sampler's
        history passes from one stretch to the next; what a denoiser keeps does not.
      noise: [batch, ...], standard normal.
      initial_scale, columns: of a `SamplerTable`.
      fresh_noise: [draws, batch, ...], standard normal, for a table with at most as many `draws`;
        None if it has none.
      whole_every: the size of a group of rows, of which a denoiser evaluates the first in full and
        the others with what that evaluation kept; 1 evaluates every row in full.

    Returns:
      x_0, in the shape and dtype of `noise`.
    """
    rows = len(columns["timesteps"])
    if sum(stretch.rows for stretch in stretches) != rows:
        raise ValueError(f"the denoisers' rows must add up to {rows}")

    def step(stretch, state, row, kept=None):
        x, remembered = state
        estimate, kept = stretch.denoise(x, row["timesteps"], row["alpha"], row["sigma"], kept)
        used = estimate if stretch.clamp is None else clamped(estimate, stretch.clamp)
        remembered = (row["p"] * x + row["q"] * used, *remembered[:-1])
        x = row["a"] * x + sum(b * h for b, h in zip(row["b"], remembered, strict=True))
        if stretch.clamp is not None:
            x = x + row["c"] * (estimate - used)
        if fresh_noise is not None:  # past its end, s is 0 and the last draw is read again
            fresh = jax.lax.dynamic_index_in_dim(fresh_noise, row["index"], keepdims=False)
            x = x + row["s"] * fresh
        return (x, remembered), kept

    columns = {**columns, "index": np.arange(rows)}
    x = noise * initial_scale
    state, begin = (x, (jnp.zeros_like(x),) * REMEMBERED), 0
    for stretch in stretches:
        end = begin + stretch.rows
        part = {name: column[begin:end] for name, column in columns.items()}
        state, begin = _walk(partial(step, stretch), state, part, whole_every), end
    return state[0]


def _walk(step: Callable, state, rows: dict[str, Array], whole_every: int):
    """Runs the rows in groups of `whole_every`; the last group may be shorter."""
    if whole_every == 1:
        return jax.lax.scan(lambda state, row: (step(state, row)[0], None), state, rows)[0]

    def group(state, rows):
        state, kept = step(state, {name: column[0] for name, column in rows.items()})
        others = {name: column[1:] for name, column in rows.items()}
        return jax.lax.scan(lambda state, row: (step(state, row, kept)[0], None), state, others)

    count = len(rows["timesteps"])
    size = min(whole_every, count)
    full = count - count % size
    groups = {name: x[:full].reshape(-1, size, *x.shape[1:]) for name, x in rows.items()}
    state, _ = jax.lax.scan(group, state, groups)
    if full < count:
        state, _ = group(state, {name: column[full:] for name, column in rows.items()})
    return state
