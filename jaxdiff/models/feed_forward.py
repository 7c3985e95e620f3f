"""The feed-forward layers of transformer blocks, by diffusers' keys."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.linear import Linear


def gelu_tanh(x: Array) -> Array:
    """Computes GELU's approximation by tanh (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


class _GEGLU(nnx.Module):
    """Shazeer, 2020, arXiv:2002.05202: a linear layer gated by the GELU of another."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.proj = Linear(width, 2 * hidden, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class _GELU(nnx.Module):
    """A linear layer, then `gelu_tanh`."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.proj = Linear(width, hidden, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return gelu_tanh(self.proj(x))


class FeedForward(nnx.Module):
    """Maps tokens to four times their width, by GELU or, if it is gated, GEGLU, and back."""

    def __init__(self, width: int, *, gated: bool = False, rngs: nnx.Rngs):
        hidden, first = 4 * width, _GEGLU if gated else _GELU
        # In the checkpoint, the second place is a dropout layer's.
        self.net = nnx.List(
            [first(width, hidden, rngs=rngs), None, Linear(hidden, width, rngs=rngs)]
        )

    def __call__(self, x: Array) -> Array:
        """Maps [..., width] to the same shape."""
        first, _, last = self.net
        return last(first(x))
