"""Networks without weights: the shapes of their parameters, and their modules."""

import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxdiff import cache


def abstract_network(model_class, config, **options) -> tuple[nnx.GraphDef, dict]:
    """Makes a network without weights, which costs only the tracing, and that only once.

    Args:
      model_class: an `nnx.Module` that can be called as
        `model_class(config, rngs=..., **options)`.
      config: the network's config dataclass, which must be hashable.

    Returns:
      the network's graph definition, and the shapes of its parameters as a nested dict;
      `load_params` turns the shapes into arrays, and `nnx.merge(graph, params)` is the network.
    """
    graph, shapes = _traced(model_class, config, tuple(sorted(options.items())))
    return graph, jax.tree.map(lambda leaf: leaf, shapes)  # a dict that the caller may change


@functools.lru_cache(maxsize=16)
def _traced(model_class, config, options: tuple) -> tuple[nnx.GraphDef, dict]:
    # No weights are drawn, so one key is enough; `nnx.Rngs` would count the keys in the traced
    # program, which takes ten times as long (9 s for Stable Diffusion's U-Net).
    rngs = SimpleNamespace(params=lambda: jax.random.key(0))
    made = nnx.eval_shape(lambda: model_class(config, rngs=rngs, **dict(options)))
    graph, state = nnx.split(made)
    # Without the mesh that is set here and now: it may be another when they are used.
    plain = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state)
    )
    return graph, plain


class Network(NamedTuple):
    """A network without its weights, which is traced only if it is called.

    Attributes:
      model_class, config, options: as in `abstract_network`.
      sharding: the rules that split its parameters over a mesh, as in
        `parallel.parameter_shardings`.
    """

    model_class: type[nnx.Module]
    config: Any
    sharding: Sequence[tuple[str, int]]
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def shapes(self) -> dict:
        """A `jax.ShapeDtypeStruct` for each parameter, as a nested dict."""
        versions = [importlib.metadata.version(name) for name in ("flax", "jax")]
        name = f"{self.model_class} {self.config} {dict(self.options)} {versions}"

        def traced() -> bytes:
            _, shapes = abstract_network(self.model_class, self.config, **self.options)
            found = jax.tree_util.tree_leaves_with_path(shapes)
            return json.dumps(
                [[[key.key for key in path], leaf.shape, leaf.dtype.name] for path, leaf in found]
            ).encode()

        kept = cache.remembered("networks", name, traced)
        shapes = {}
        for (*folders, last), shape, dtype in json.loads(kept):
            folder = functools.reduce(lambda inner, key: inner.setdefault(key, {}), folders, shapes)
            folder[last] = jax.ShapeDtypeStruct(tuple(shape), dtype)
        return shapes

    def __call__(self, params: dict) -> nnx.Module:
        """Returns the Flax module with these parameters, at no cost inside of `jax.jit`."""
        graph, _ = _traced(self.model_class, self.config, tuple(sorted(self.options.items())))
        return nnx.merge(graph, params)
