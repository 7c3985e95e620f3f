"""What the comparisons with PyTorch diffusers and transformers share."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdiff.checkpoint.diffusers import abstract_network, load_params
from jaxdiff.checkpoint.weight_files import read_weights
from jaxdiff.models import clip
from jaxdiff.models.unet import UNet2DConditionModel, UNetConfig
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig

if importlib.util.find_spec("torch"):
    import torch

    torch.set_num_threads(1)  # such small networks only wait for their threads

CONFIGS = {
    "text_encoder": clip.CLIPTextConfig,
    "unet": UNetConfig,
    "vae": AutoencoderKLConfig,
}
NETWORKS = {
    "text_encoder": clip.network,
    "unet": lambda config: UNet2DConditionModel,
    "vae": lambda config: AutoencoderKL,
}


@pytest.fixture(scope="session")
def load():
    """A function that reads a network with our loader from a folder in the diffusers layout.

    It returns a function `run(*arrays, method="__call__", options={}, **arrays)` of the compiled
    network; the options are not traced.
    """

    def load(network: str, folder: Path):
        config = CONFIGS[network].from_json(json.loads((folder / "config.json").read_text()))
        graph, shapes = abstract_network(NETWORKS[network](config), config)
        (file,) = folder.glob("*.safetensors")
        params = load_params(shapes, read_weights(network, file), np.float32)

        def run(*arrays, method="__call__", options=None, **named):
            def call(params, arrays, named):
                merged = nnx.merge(graph, params)
                return getattr(merged, method)(*arrays, **named, **(options or {}))

            return jax.jit(call)(params, arrays, named)

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
