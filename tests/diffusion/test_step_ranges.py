"""Tests how a sampler table's rows are divided between experts, with and without guidance."""

import numpy as np
import pytest

from jaxdiff.diffusion.schedule import Clamp
from jaxdiff.diffusion.step_ranges import step_ranges
from jaxdiff.request import Options

TIMESTEPS = np.arange(950, 0, -100)  # ten rows


CLAMPS = (Clamp(1.0), None)  # of the base model, of the refiner


def stretches(distilled=(False,), guided=True, **options):
    return [
        tuple(stretch)
        for stretch in step_ranges(
            TIMESTEPS,
            Options(**options),
            guided=guided,
            guidable=[not each for each in distilled],
            clamps=CLAMPS,
            train_steps=1000,
            steps=len(TIMESTEPS),
        )
    ]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, [(0, 10, True)]),
        ({"guided": False}, [(0, 10, False)]),
        ({"distilled": (True,)}, [(0, 10, False)]),
        (
            {"guidance_start": 0.3, "guidance_stop": 0.7},
            [(0, 3, False), (0, 4, True), (0, 3, False)],
        ),
        ({"distilled": (False, False)}, [(0, 8, True), (1, 2, True)]),
        ({"distilled": (False, True), "refiner_start": 0.5}, [(0, 5, True), (1, 5, False)]),
        (
            {"distilled": (False, False), "guidance_stop": 0.5},
            [(0, 5, True), (0, 3, False), (1, 2, False)],
        ),
        ({"distilled": (False, False), "refiner_start": 0}, [(1, 10, True)]),
    ],
    ids=str,
)
def test_stretches_cover_the_rows(said, expected):
    assert stretches(**said) == [(*each, CLAMPS[each[0]], False) for each in expected]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, [(1, True, False), (1, True, True), (8, True, False)]),  # after 0.1, before 2
        ({"guided": False}, [(1, False, False), (1, False, False), (8, False, False)]),
        ({"guidance_stop": 0.1}, [(1, True, False), (1, False, False), (8, False, False)]),
    ],
    ids=str,
)
def test_layers_are_skipped_in_early_guided_steps(said, expected):
    found = stretches(skip_layers="7, 8", **said)
    assert [(rows, guided, skips) for _, rows, guided, _, skips in found] == expected
