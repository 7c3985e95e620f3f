"""The measurement in docs/speed.md: its calculation, and a complete run with a random model."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from jaxdiff.worlds import shapes
from tools import measure_speedups as speedups


def test_the_score_is_the_unweighted_mean_of_the_tags():
    tags = ["colors"] * 2 + ["counting"] * 8
    values = np.array([1, 1] + [0, 1] * 4, float)
    mean, within = speedups.mean_of_tags(values, tags)
    assert mean == pytest.approx(0.75)
    # The first tag does not vary; the standard deviation of the second is sqrt(2 / 7).
    assert within == pytest.approx(1.96 * np.sqrt(2 / 7 / 8) / 2)


def test_every_setting_has_a_name_of_its_own(tmp_path):
    files = {setting.file(tmp_path, ".npz") for setting in speedups.SETTINGS}
    assert len(files) == len(speedups.SETTINGS)


@pytest.mark.slow
def test_a_run_generates_missing_images_and_reports_them(tiny_checkpoint, tmp_path):
    rows = [row for tag in shapes.TAGS for row in shapes.benchmark_rows(tag, 2, 1)]
    settings = [
        replace(setting, model=str(tiny_checkpoint))
        for setting in (speedups.PLAIN, speedups.DEEP_CACHE[0])
    ]
    speedups.make_images(tmp_path, rows, settings)
    speedups.measure_speed(tmp_path, 1, settings)
    settings[0].file(tmp_path, ".json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    speedups.make_images(tmp_path, rows, settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    plain, cached = json.loads(json.dumps(speedups.results(tmp_path, rows, settings)))
    assert (plain["evaluations"], cached["evaluations"]) == ([40, 0], [20, 20])
    assert plain["seconds"] is None
    assert len(cached["seconds"]) == 1
    lines = speedups.table([plain, cached]).splitlines()
    assert re.match(r"\| deep cache 2 \| \d+\.\d \| x\d", lines[-1])
    assert "| 20 + 20 |" in lines[-1]
    speedups.plot([plain, cached], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
