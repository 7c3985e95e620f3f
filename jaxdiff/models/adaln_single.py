"""adaLN-single: modulations that all blocks of a network share, and each block's own additions.

See Chen et al., 2023, arXiv:2310.00426, section 2.3.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxdiff.models.embeddings import NumberEmbedding
from jaxdiff.models.linear import Linear


class _Embeddings(nnx.Module):
    """Embeds timesteps and, optionally, the sizes of images."""

    def __init__(self, width: int, *, takes_sizes: bool, rngs: nnx.Rngs):
        self.timestep_embedder = NumberEmbedding(width, rngs=rngs)
        self.resolution_embedder, self.aspect_ratio_embedder = (
            NumberEmbedding(width // 3, rngs=rngs) if takes_sizes else None for _ in range(2)
        )

    def __call__(self, timesteps: Array, sizes: Array | None, dtype) -> Array:
        embedded = self.timestep_embedder(timesteps, dtype)
        if self.resolution_embedder is None:
            return embedded
        sides = self.resolution_embedder(sizes[:, :2], dtype).reshape(len(sizes), -1)
        ratio = self.aspect_ratio_embedder(sizes[:, 2], dtype)
        return embedded + jnp.concatenate([sides, ratio], axis=-1)


class AdaLayerNormSingle(nnx.Module):
    """Maps timesteps, and optionally sizes, to the six modulations that all blocks share."""

    def __init__(self, width: int, *, takes_sizes: bool = False, rngs: nnx.Rngs):
        """Makes the layers; with `takes_sizes`, the width is a multiple of 3."""
        self.emb = _Embeddings(width, takes_sizes=takes_sizes, rngs=rngs)
        self.linear = Linear(width, 6 * width, rngs=rngs)

    def __call__(self, timesteps: Array, dtype, sizes: Array | None = None) -> tuple[Array, Array]:
        """Embeds the numbers and computes the modulations.

        Args:
          timesteps: [batch].
          dtype: of the results.
          sizes: float32 [batch, 3], height, width and height / width, with `takes_sizes`.

        Returns:
          the embedding, [batch, width], and the modulations, [batch, 6, width].
        """
        embedding = self.emb(timesteps, sizes, dtype)
        shared = self.linear(nnx.silu(embedding))
        return embedding, shared.reshape(len(shared), 6, -1)


def modulation_table(count: int, width: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """Draws `count` modulations to add to the shared ones."""
    return nnx.Param(jax.random.normal(rngs.params(), (count, width)) / width**0.5)


def modulations(table: nnx.Param, shared: Array) -> Sequence[Array]:
    """Adds the table to [batch, count or 1, width]; returns `count` arrays [batch, width]."""
    return jnp.unstack(table[...] + shared, axis=1)
