"""The scan that walks from noise to x_0 along a sampler's table."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxdiff.diffusion.solvers import REMEMBERED


def sample(
    denoisers: Sequence[tuple[int, Callable[[Array, Array, Array, Array], Array]]],
    noise: Array,
    initial_scale: Array | float,
    columns: dict[str, Array],
    fresh_noise: Array | None = None,
) -> Array:
    """Runs a sampler from noise to x_0.

    Args:
      denoisers: how many rows of the table each takes, in turn and together all, and a function
        (x, timestep, alpha, sigma) to the estimate of x_0, in x's shape. Each is one `lax.scan`;
        what is remembered goes on from one to the next.
      noise: [batch, ...], standard normal.
      initial_scale, columns: of a `SamplerTable`.
      fresh_noise: [draws, batch, ...], standard normal, of a table with as many `draws` or fewer;
        None where it has none.

    Returns:
      x_0, in the shape and dtype of `noise`.
    """
    rows = len(columns["timesteps"])
    if sum(taken for taken, _ in denoisers) != rows:
        raise ValueError(f"the denoisers must take {rows} rows together")

    def scan(denoise, state, part):
        def step(state, row):
            x, remembered = state
            estimate = denoise(x, row["timesteps"], row["alpha"], row["sigma"])
            remembered = (row["p"] * x + row["q"] * estimate, *remembered[:-1])
            x = row["a"] * x + sum(b * h for b, h in zip(row["b"], remembered, strict=True))
            if fresh_noise is not None:  # past its end s is 0, and the last one is read again
                fresh = jax.lax.dynamic_index_in_dim(fresh_noise, row["index"], keepdims=False)
                x = x + row["s"] * fresh
            return (x, remembered), None

        return jax.lax.scan(step, state, part)[0]

    columns = {**columns, "index": np.arange(rows)}
    x = noise * initial_scale
    state, begin = (x, (jnp.zeros_like(x),) * REMEMBERED), 0
    for taken, denoise in denoisers:
        part = {name: column[begin : begin + taken] for name, column in columns.items()}
        state, begin = scan(denoise, state, part), begin + taken
    return state[0]
