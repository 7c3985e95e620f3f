"""A run that is killed, stopped or moved to other devices resumes without any difference."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import RECIPE, SHARDED, finish, lines, start, weights

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    finish(RECIPE, output)
    return output


def assert_same_run(output: Path, other: Path) -> None:
    assert lines(output) == lines(other)
    for name, values in weights(other).items():
        np.testing.assert_array_equal(weights(output)[name], values)


def wait_until(process, condition) -> bool:
    """Waits for a condition; returns whether it came true before the process ended."""
    while not condition():
        if not process.is_alive():
            return False
        time.sleep(0.0005)
    return True


def test_kills_at_any_moment_change_neither_losses_nor_weights(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    rng = random.Random(0)
    moments = [
        lambda: any(folder.glob("*tmp*")),  # while a checkpoint is being written
        lambda: any(folder.glob("deleted/*")),  # while one is being deleted
        (tmp_path / "samples" / "000040.png").exists,
    ]
    for moment in moments:
        process = start(RECIPE, tmp_path)
        assert wait_until(process, moment)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
    assert not (tmp_path / "model").exists()
    finish(RECIPE, tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    assert not list(folder.glob("*tmp*"))


def test_sigterm_saves_between_checkpoints_and_the_run_resumes(uninterrupted, tmp_path):
    process = start(RECIPE, tmp_path)
    assert wait_until(process, (tmp_path / "samples" / "000020.png").exists)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    finish(RECIPE, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_resumes_with_another_number_of_devices(uninterrupted, tmp_path):
    for recipe, steps, devices in ((SHARDED, 20, 4), (RECIPE, 40, 1), (SHARDED, 60, 4)):
        finish(replace(recipe, steps=steps), tmp_path, devices)
    # Sums over several devices are rounded differently.
    for row, other in zip(lines(tmp_path), lines(uninterrupted), strict=True):
        assert row["step"] == other["step"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for name, values in weights(uninterrupted).items():
        np.testing.assert_allclose(weights(tmp_path)[name], values, atol=1e-4)
