"""What the comparisons of denoisers with diffusers share.

A parsed config chooses the network by its `_class_name`; both sides get the weights of
`networks.weight`. That part needs no torch and is in `networks`.
"""

from collections.abc import Callable
from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import torch
from flax import nnx
from networks import POSITIONS, opened, read, shapes_of

from jaxdiff.devices import compilation
from jaxdiff.errors import InputError
from jaxdiff.weights.load import file_shapes


def compiled(config: dict, dtype=np.float32, **options) -> Callable[[dict], jax.Array]:
    """Our network as a function of its arrays by name; the options are those of its call."""
    graph, params = opened(config, dtype)
    run = compilation.jit(lambda params, arrays: nnx.merge(graph, params)(**arrays, **options))
    return partial(run, params)


def reference(config: dict) -> torch.nn.Module:
    """diffusers' network."""
    network = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    weights = network.state_dict()
    for key, value in weights.items():
        if key != POSITIONS:
            weights[key] = torch.tensor(networks.weight(key, tuple(value.shape)))
    network.load_state_dict(weights)
    return network


def check_that_neighbours_do_not_matter(config: dict, arrays: dict[str, np.ndarray]) -> None:
    """Changes all images of a batch but the first, whose output must keep every bit."""
    run, count = compiled(config), len(arrays["latents"])
    others = {name: array[[0, *range(count - 1)]] for name, array in arrays.items()}
    before, after = np.asarray(run(arrays)), np.asarray(run(others))
    np.testing.assert_array_equal(before[0], after[0])
    for one, other in zip(before[1:], after[1:], strict=True):
        assert networks.difference(one, other) > 0.01


def check_bfloat16(config: dict, arrays: dict[str, np.ndarray]) -> None:
    """Compares the output in bfloat16, whose dtype must be that, with the one in float32."""
    exact = np.asarray(compiled(config)(arrays))
    halved = arrays.keys() & {"latents", "context", "pooled"}
    half = arrays | {name: arrays[name].astype(jnp.bfloat16) for name in halved}
    ours = compiled(config, jnp.bfloat16)(half)
    assert ours.dtype == jnp.bfloat16
    assert networks.difference(ours.astype(np.float32), exact) <= 0.05  # NaN is not


def check_recomputed_gradients(config: dict, arrays: dict[str, np.ndarray], blocks: int) -> dict:
    """Checks that each block recomputes its activations by itself, and returns the gradients."""
    found = []
    (recomputing,) = {step.primitive for step in jax.make_jaxpr(jax.checkpoint(jnp.sin))(0.0).eqns}
    for remat in (False, True):
        graph, params = opened(config, remat=remat)

        def loss(params, graph=graph):
            return (nnx.merge(graph, params)(**arrays) ** 2).mean()

        steps = [step.primitive for step in jax.make_jaxpr(loss)(params).eqns]
        assert steps.count(recomputing) == blocks * remat
        found.append(compilation.jit(jax.grad(loss))(params))
    plain, recomputed = found
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), recomputed, plain)
    flat, others = (jax.flatten_util.ravel_pytree(each)[0] for each in found)
    assert networks.difference(others, np.asarray(flat)) <= 1e-5
    return plain


def check_full_size(config: dict, count: int) -> dict[str, tuple[int, ...]]:
    """Compares keys and shapes with diffusers', of which there are `count`, and returns them.

    The config must survive writing, and four devices must hold about a quarter of the weights each:
    they copy only small ones.
    """
    _, shapes = shapes_of(config)
    with torch.device("meta"):
        theirs = getattr(diffusers, config["_class_name"]).from_config(config).state_dict()
    ours = file_shapes(shapes)
    assert ours == {key: tuple(value.shape) for key, value in theirs.items()}
    assert len(ours) == count

    written = read(config).to_json()
    assert read(written) == read(config)
    assert written | config == config | written  # where both have a key

    sizes, held = networks.shares(config)
    total = sum(sizes.values())
    assert sum(held.values()) <= 0.27 * total
    assert [key for key in sizes if held[key] == sizes[key] > 0.01 * total] == []
    return ours


def check_refusal(config: dict, message: str) -> None:
    """Expects one line that names the file and has the message, a regular expression."""
    with pytest.raises(InputError, match=f"^transformer/config.json: [^\n]*{message}[^\n]*$"):
        read(config)
