"""Recomputing activations for the gradient instead of storing them."""

from flax import nnx
from jax import Array


def call(module: nnx.Module, *arrays: Array | None, remat: bool) -> Array:
    """Calls the module; with `remat` the gradient recomputes the activations inside it."""
    if not remat:
        return module(*arrays)
    return nnx.remat(lambda module, *arrays: module(*arrays))(module, *arrays)
