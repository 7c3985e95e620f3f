"""The feed-forward layers of transformer blocks, by diffusers' keys."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class _GEGLU(nnx.Module):
    """Shazeer, 2020, arXiv:2002.05202: a linear layer gated by the GELU of another."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(width, 2 * hidden, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class _GELU(nnx.Module):
    """Hendrycks and Gimpel, 2016, arXiv:1606.08415: a linear layer, then GELU's tanh form."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(width, hidden, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(self.proj(x), approximate=True)


class _Identity(nnx.Module):
    """Takes the place of a dropout layer, so that the indices match the checkpoint's."""

    def __call__(self, x: Array) -> Array:
        return x


class FeedForward(nnx.Module):
    """A layer of four times the width and one back, with GELU or, if it is gated, GEGLU."""

    def __init__(self, width: int, *, gated: bool = False, rngs: nnx.Rngs):
        hidden, first = 4 * width, _GEGLU if gated else _GELU
        self.net = nnx.List(
            [
                first(width, hidden, rngs=rngs),
                _Identity(),
                nnx.Linear(hidden, width, rngs=rngs),
            ]
        )

    def __call__(self, x: Array) -> Array:
        """Maps [..., width] to the same shape."""
        for layer in self.net:
            x = layer(x)
        return x
