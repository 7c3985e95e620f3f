"""Layers that several networks share."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models.layers import group_norm


@pytest.mark.parametrize("mean", [0, 1, 10, 100])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_group_norm_loses_no_more_than_its_inputs_have_lost(mean, dtype):
    """One pass over bfloat16 is as good as two; float32 would lose by it."""
    x = np.random.default_rng(0).normal(mean, 1, (2, 8, 8, 64))
    groups = x.reshape(2, 64, 32, 2)
    center, width = groups.mean(axis=(1, 3), keepdims=True), groups.std(axis=(1, 3), keepdims=True)
    wanted = ((groups - center) / width).reshape(x.shape)
    norm = group_norm(64, 32, 1e-12, rngs=nnx.Rngs(0))
    made = np.asarray(norm(jnp.asarray(x, dtype)), np.float64)
    rounding = float(jnp.finfo(dtype).eps) / 2
    assert np.abs(made - wanted).max() <= 8 * rounding * (mean + 5)
