"""Compares networks with diffusers' outputs, stored by tools/make_golden_networks.py."""

import json
from pathlib import Path

import networks
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compiled_faster")

with np.load(Path(__file__).parents[1] / "golden" / "networks.npz") as file:
    GOLDEN = dict(file)
CONFIGS = json.loads(str(GOLDEN.pop("configs")))
TRANSFORMER_CONFIGS = json.loads(str(GOLDEN.pop("transformer_configs")))  # of these families


def stored(case: str) -> dict[str, np.ndarray]:
    """The arrays of a case by the rest of their names."""
    start = f"{case}."
    return {name.removeprefix(start): GOLDEN[name] for name in GOLDEN if name.startswith(start)}


@pytest.mark.parametrize("case", CONFIGS)
def test_networks(case):
    config, network = CONFIGS[case], case.split(", ")[1]
    run = networks.build(network, config, networks.weight)
    ours = networks.outputs(network, run, networks.inputs(network, config))
    assert ours.keys() == stored(case).keys()
    for name, expected in stored(case).items():
        assert networks.difference(ours[name], expected) <= networks.BOUND, name


@pytest.mark.parametrize("case", TRANSFORMER_CONFIGS)
def test_networks_of_transformer_families(case):
    parts = {"input": {}, "output": {}}
    for name, array in stored(case).items():
        kind, _, name = name.partition(".")
        parts[kind][name] = array
    ours = networks.outputs_of(TRANSFORMER_CONFIGS[case], parts["input"])
    # diffusers' class of Sana's autoencoder has no variance.
    lacking = {"log_variance"} if case == "Sana, vae" else set()
    assert ours.keys() - parts["output"].keys() == lacking
    for name, expected in parts["output"].items():
        assert networks.difference(ours[name], expected) <= networks.BOUND, name


def test_every_network_of_a_transformer_family_is_stored():
    """But for those that Stable Diffusion has, too, and for ControlNets."""
    others = (
        "AutoencoderKL",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "FluxControlNetModel",
    )
    wanted = {made for name, made in networks.ARCHITECTURES.items() if name not in others}
    assert set(map(networks.architecture, TRANSFORMER_CONFIGS.values())) == wanted
