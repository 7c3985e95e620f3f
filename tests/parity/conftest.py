"""What the comparisons with PyTorch diffusers and transformers share."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.checkpoint.diffusers import abstract_network, load_params

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # such small networks only wait for their threads


@pytest.fixture(scope="session")
def load():
    """A function that reads a network with our loader from a folder that diffusers wrote.

    It returns a function `run(*arrays, method="__call__")` of the compiled network.
    """

    def load(model_class, config_class, folder: Path):
        config = config_class.from_json(json.loads((folder / "config.json").read_text()))
        graph, shapes = abstract_network(model_class, config)
        params = load_params(shapes, sorted(folder.glob("*.safetensors")), np.float32)

        def run(*arrays, method="__call__"):
            return jax.jit(lambda p, *a: getattr(nnx.merge(graph, p), method)(*a))(params, *arrays)

        return run

    return load


@pytest.fixture(scope="session")
def assert_close():
    """A function with the bound of every component: 1e-4 relative to the reference's norm."""

    def assert_close(ours, reference, bound=1e-4):
        ours, reference = np.asarray(ours), np.asarray(reference)
        assert ours.shape == reference.shape
        assert np.linalg.norm(ours - reference) <= bound * np.linalg.norm(reference)

    return assert_close
