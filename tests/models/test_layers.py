"""Layers that several networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff.models import layers
from jaxdiff.models.layers import conv, doubled_conv, group_norm


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


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_doubling_and_convolving_in_one_step_is_the_same(device, monkeypatch):
    """A CPU computes what is compiled for TPUs, too."""
    monkeypatch.setattr(layers, "platform", lambda: device)
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 5, 6, 8), np.float32)
    layer = conv(8, 12, 3, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(random.standard_normal(12, np.float32))

    def one_step(x):
        return doubled_conv(layer, x)

    def two_steps(x):
        return layer(x.repeat(2, axis=1).repeat(2, axis=2))

    def gradient(call):
        return jax.grad(lambda x: jnp.sum(jnp.sin(call(x))))(jnp.asarray(x))

    np.testing.assert_allclose(one_step(x), two_steps(jnp.asarray(x)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradient(one_step), gradient(two_steps), rtol=0, atol=1e-5)
