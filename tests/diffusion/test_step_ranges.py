"""Tests how a sampler table's rows are divided between experts, with and without guidance."""

import numpy as np
import pytest

from jaxdiff.diffusion.schedule import Clamp
from jaxdiff.diffusion.step_ranges import (
    StepRange,
    after,
    skipped_steps,
    step_ranges,
    with_control,
)
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
    assert stretches(**said) == [(*each, CLAMPS[each[0]], False, False, False) for each in expected]


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
    assert [(rows, guided, skips) for _, rows, guided, _, skips, *_ in found] == expected


@pytest.mark.parametrize(
    ("steps", "strength", "of_flow", "others"),
    [
        (50, 0.8, 10, 10),
        (5, 0.5, 2, 3),  # flow matching takes 3 steps, the others 2
        (4, 0.9999, 0, 1),
        (4, 1.0, 0, 0),
        (4, 0.2, 3, 4),
        (4, 0.0, 4, 4),
    ],
)
def test_strength_skips_steps_as_in_diffusers(steps, strength, of_flow, others):
    assert skipped_steps(steps, strength, is_flow=True) == of_flow
    assert skipped_steps(steps, strength, is_flow=False) == others


def test_rows_are_cut_off_the_first_ranges():
    ranges = [StepRange(0, 3, True), StepRange(0, 4, False), StepRange(1, 2, False)]
    assert after(ranges, 0) == tuple(ranges)
    assert after(ranges, 2) == (ranges[0]._replace(rows=1), *ranges[1:])
    assert after(ranges, 3) == (*ranges[1:],)
    assert after(ranges, 8) == (ranges[2]._replace(rows=1),)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.0, 1.0, [(6, True), (4, False)]),
        (0.0, 0.5, [(5, True), (1, False), (4, False)]),
        (0.25, 0.5, [(3, False), (2, True), (1, False), (4, False)]),
        (0.0, 0.05, [(6, False), (4, False)]),  # no row lies within it
    ],
)
def test_control_splits_the_rows_of_the_base(start, end, expected):
    ranges = [StepRange(0, 6, True), StepRange(1, 4, True)]
    found = with_control(ranges, start, end)
    assert [(part.rows, part.controlled) for part in found] == expected
