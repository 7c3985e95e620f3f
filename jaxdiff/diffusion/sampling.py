"""The scan from noise to x_0 along a sampler's table."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.diffusion.objective import clamped, noisy
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


class Kept(NamedTuple):
    """The part of an image that must not change.

    Attributes:
      latents: [batch, h, w, channels], x_0 of what is kept.
      mask: [batch, h, w, 1], 1 where the image may change and 0 where it is kept.
    """

    latents: Array
    mask: Array


def sample(
    stretches: Sequence[Stretch],
    noise: Array,
    initial_scale: Array | float,
    columns: dict[str, Array],
    fresh_noise: Array | None = None,
    *,
    start: Array | None = None,
    kept: Kept | None = None,
    whole_every: int = 1,
) -> Array:
    """Runs a sampler from noise, or from an image with noise, to x_0.

    Args:
      stretches: the denoisers, in order; their rows add up to all rows of the table. The sampler's
        history passes from one stretch to the next; what a denoiser keeps does not.
      noise: [batch, ...], standard normal.
      initial_scale, columns: of a `SamplerTable`.
      fresh_noise: [draws, batch, ...], standard normal, for a table with at most as many `draws`;
        None if it has none.
      start: x_0 of an image to begin with, which is noised to the level of the table's first row
        (Meng et al., 2022, arXiv:2108.01073, algorithm 1); None begins with noise alone.
      kept: what is put back after each row, noised to the level of the next one (Lugmayr et al.,
        2022, arXiv:2201.09865, equation 8, without its resampling); None keeps nothing.
      whole_every: the size of a group of rows, of which a denoiser evaluates the first in full and
        the others with what that evaluation kept; 1 evaluates every row in full.

    Returns:
      x_0, in the shape and dtype of `noise`.
    """
    rows = len(columns["timesteps"])
    if sum(stretch.rows for stretch in stretches) != rows:
        raise ValueError(f"the denoisers' rows must add up to {rows}")

    def step(stretch, state, row, features=None):
        x, remembered = state
        estimate, features = stretch.denoise(
            x, row["timesteps"], row["alpha"], row["sigma"], features
        )
        used = estimate if stretch.clamp is None else clamped(estimate, stretch.clamp)
        remembered = (row["p"] * x + row["q"] * used, *remembered[:-1])
        x = row["a"] * x + sum(b * h for b, h in zip(row["b"], remembered, strict=True))
        if stretch.clamp is not None:
            x = x + row["c"] * (estimate - used)
        if fresh_noise is not None:  # past its end, s is 0 and the last draw is read again
            fresh = jax.lax.dynamic_index_in_dim(fresh_noise, row["index"], keepdims=False)
            x = x + row["s"] * fresh
        if kept is not None:
            known = noisy(kept.latents, noise, row["next_alpha"], row["next_sigma"])
            x = kept.mask * x + (1.0 - kept.mask) * known
        return (x, remembered), features

    columns = {**columns, "index": np.arange(rows)}
    if kept is not None:
        columns["next_alpha"] = jnp.append(columns["alpha"][1:], 1.0)
        columns["next_sigma"] = jnp.append(columns["sigma"][1:], 0.0)
    if start is None:
        x = noise * initial_scale
    else:
        x = noisy(start, noise, columns["alpha"][0], columns["sigma"][0])
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
