"""Weights drawn without compiling anything, for checkpoints that tests make."""

import jax
import numpy as np

from jaxdiff.weights.network import abstract_network


def random_params(model_class, config, seed: int) -> dict:
    """Returns random weights of the magnitude of trained ones, without compiling anything."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return (1 + 0.1 * random.standard_normal(leaf.shape)).astype(np.float32)
        if name == "bias":
            return (0.1 * random.standard_normal(leaf.shape)).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 1
        return (random.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_network(model_class, config)[1])
