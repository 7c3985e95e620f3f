"""Compares networks with diffusers' outputs, stored by tools/make_golden_networks.py."""

import json
from pathlib import Path

import networks
import numpy as np
import pytest

with np.load(Path(__file__).parents[1] / "golden" / "networks.npz") as file:
    GOLDEN = dict(file)
CONFIGS = json.loads(str(GOLDEN.pop("configs")))


@pytest.mark.parametrize("case", CONFIGS)
def test_networks(case):
    config, network = CONFIGS[case], case.split(", ")[1]
    run = networks.build(network, config, networks.weight)
    ours = networks.outputs(network, run, networks.inputs(network, config))
    for name, output in ours.items():
        assert networks.difference(output, GOLDEN[f"{case}.{name}"]) <= networks.BOUND, name


def test_every_output_is_stored():
    assert len(GOLDEN) == sum({"unet": 1, "vae": 3}.get(case.split(", ")[1], 4) for case in CONFIGS)
