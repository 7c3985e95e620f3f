"""Compares samplers with diffusers' trajectories, stored by tools/make_golden_trajectories.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from trajectories import difference, ours

from jaxdiff.diffusion.samplers import SAMPLERS

with np.load(Path(__file__).parents[1] / "golden" / "trajectories.npz") as file:
    GOLDEN = dict(file)
ABOUT = json.loads(str(GOLDEN["about"]))
CASES = ABOUT["cases"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_trajectories(number):
    theirs = [GOLDEN[f"{number:02d}.{name}"] for name in ("timesteps", "points")]
    assert difference(ours(**CASES[number]), theirs) <= 1e-3, CASES[number]


def test_each_sampler_has_three_cases():
    samplers = [case["sampler"] for case in CASES]
    assert all(samplers.count(name) >= 3 for name in SAMPLERS)
