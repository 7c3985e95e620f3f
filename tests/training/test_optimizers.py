"""The optimizers: their effect on kernels, embeddings and vectors."""

from dataclasses import replace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training.optimizers import average_decay, optimizer
from jaxdiff.training.recipe import Average, Optimizer

NAMES = get_args(get_type_hints(Optimizer)["name"])
CONFIG = Optimizer(learning_rate=0.01, warmup_steps=0, schedule="constant", weight_decay=0.0)


def parameters() -> dict:
    """Returns a parameter of each kind, with integers among the keys, as in networks."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {0: {"kernel": (3, 3, 2, 4), "bias": (4,)}},
        "linear": {"kernel": (8, 4)},
        "token_embedding": {"embedding": (5, 4)},
        "norm": {"scale": (4,)},
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def first_update(config: Optimizer, gradients: dict, params: dict) -> dict:
    transform, _ = optimizer(config, 100)
    updates, _ = jax.jit(transform.update)(gradients, transform.init(params), params)
    return updates


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_reduces_every_parameter(name):
    transform, _ = optimizer(replace(CONFIG, name=name, clip_norm=0.0), 100)
    params = parameters()

    @jax.jit
    def step(_, carry):
        params, state = carry
        updates, state = transform.update(params, state, params)  # the gradient of params**2 / 2
        return jax.tree.map(jnp.add, params, updates), state

    learned, _ = jax.lax.fori_loop(0, 50, step, (params, transform.init(params)))
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(learned), strict=True):
        assert jnp.sum(after**2) < 0.9 * jnp.sum(before**2)


@pytest.mark.parametrize("name", NAMES)
def test_only_kernels_and_embeddings_decay(name):
    params = parameters()
    updates = first_update(
        replace(CONFIG, name=name, weight_decay=0.1), jax.tree.map(jnp.zeros_like, params), params
    )
    for old, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        wanted = -0.01 * 0.1 * old if old.ndim > 1 else 0 * old
        np.testing.assert_allclose(update, wanted, atol=1e-8)


def test_muon_makes_kernels_orthogonal_and_leaves_embeddings_to_adam():
    params = parameters()
    updates = first_update(replace(CONFIG, name="muon"), params, params)
    for kernel in (updates["conv"][0]["kernel"].reshape(18, 4), updates["linear"]["kernel"]):
        values = np.linalg.svd(kernel, compute_uv=False) / (0.01 * 0.2 * np.sqrt(len(kernel)))
        assert (values > 0.5).all()
        assert (values < 1.5).all()
    by_adam = first_update(CONFIG, params, params)
    for path in ("token_embedding", "norm"):
        jax.tree.map(np.testing.assert_array_equal, updates[path], by_adam[path])


def test_long_gradients_are_clipped_unless_clipping_is_off():
    params = parameters()
    config = replace(CONFIG, name="sgd", clip_norm=1.0)

    def length(config):
        updates = jax.tree.leaves(first_update(config, params, params))
        return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in updates)))

    assert length(config) == pytest.approx(0.01)
    assert length(replace(config, clip_norm=0.0)) > 0.05


def test_the_learning_rate_warms_up_and_then_stays_or_decays_to_zero():
    config = replace(CONFIG, warmup_steps=10)
    _, constant = optimizer(config, 100)
    _, cosine = optimizer(replace(config, schedule="cosine"), 100)
    values = [float(constant(step)) for step in (0, 5, 10, 99)]
    assert values == pytest.approx([0, 5e-3, 0.01, 0.01])
    _, cooled = optimizer(replace(config, cooldown_steps=20), 100)
    values = [float(cooled(step)) for step in (5, 10, 80, 90, 100)]
    assert values == pytest.approx([5e-3, 0.01, 0.01, 5e-3, 0])
    values = [float(cosine(step)) for step in (0, 5, 10, 55, 100)]
    assert values == pytest.approx([0, 5e-3, 0.01, 5e-3, 0])


@pytest.mark.parametrize("relative_width", [0.05, 0.1, 0.2])
def test_an_average_has_its_relative_width(relative_width):
    config, steps = Average(relative_width=relative_width), 2000
    shares = np.zeros(steps)  # each step's share in the average
    for step in range(steps):
        decay = average_decay(config, step)
        shares *= decay
        shares[step] = 1 - decay
    times = np.arange(1, steps + 1) / steps
    mean = np.sum(shares * times)
    assert shares.sum() == pytest.approx(1.0)
    assert np.sqrt(np.sum(shares * (times - mean) ** 2)) == pytest.approx(relative_width, rel=0.01)


def test_a_fixed_decay_starts_low():
    decays = [float(average_decay(Average(decay=0.999), step)) for step in (0, 90, 10**6)]
    assert decays == pytest.approx([0.1, 0.91, 0.999])
