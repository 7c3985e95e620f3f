"""Recomputing activations for the gradient instead of storing them."""

import jax
from flax import nnx
from jax import Array


def call(module: nnx.Module, *arrays: Array | None, remat: bool, **options) -> Array:
    """Calls the module; with `remat` the gradient recomputes the activations inside it.

    The options are static.
    """
    if not remat:
        return module(*arrays, **options)
    # Not `nnx.remat`: it also updates the module's variables, which flax refuses where JAX has
    # changed the trace since they were made, as it does for weights that LoRA has just added up.
    graph, state = nnx.split(module)

    @jax.checkpoint
    def pure(state: nnx.State, *arrays: Array | None) -> Array:
        return nnx.merge(graph, state)(*arrays, **options)

    return pure(state, *arrays)
