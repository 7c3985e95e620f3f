"""A dry run prints what the job would do, and does nothing."""

import re
import tempfile
from pathlib import Path

import pytest

from jaxdiff import cli
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run
from pipelines import jobs

ROWS = """\
{"prompt": "a", "num_images": 5}
{"prompt": "b", "width": 16, "height": 8, "guidance_scale": 1}
{"prompt": ""}

{"prompt": "c", "sampler": "heun", "steps": 3}
"""


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_shows_buckets_batches_padding_shards_and_time(tmp_path, command, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    assert cli.main(command(tmp_path / "out", "--dry-run", manifest=path)) == 0
    said = lines(capsys)
    assert said[0] == (
        f"{path}: rows: 3 used, 1 rejected, 1 blank; first rejected: {path}, line 3: "
        "the prompt is empty or missing"
    )
    assert said[1].startswith("images: 7; model: tiny; shards: 4; batch size: 2 per device")
    assert [line.split() for line in said[3:7]] == [
        ["size", "steps", "sampler", "guided", "images", "batches", "padded", "slots", "shards"],
        ["16x8", "2", "ddim", "no", "1", "1", "1", "1"],
        ["64x64", "2", "ddim", "yes", "5", "3", "1", "2"],
        ["64x64", "3", "heun", "yes", "1", "1", "1", "1"],
    ]
    assert said[-2].startswith("time: about ")
    assert " operations: " in said[-2]
    assert " at 0.1 TFLOP/s (two CPU cores), " in said[-2]
    assert re.fullmatch(r"disk space: about \d+ kB as png, for photographs", said[-1])


@pytest.mark.parametrize("rows", [ROWS, '{"prompt": "a"}'])
def test_a_dry_run_measures_the_largest_bucket_and_keeps_nothing(
    tmp_path, command, capsys, noisy, monkeypatch, rows
):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    arguments = command(tmp_path / "out", "--dry-run", "--measure", manifest=path)
    assert cli.main(arguments) == 0
    *_, measured, time, space = lines(capsys)
    assert measured.startswith("measured on 1 x cpu: 2 images of 64x64 in less than 1 s, after ")
    assert time.startswith("time: about ")
    assert time.endswith(" s with 1 worker")
    assert re.fullmatch(r"disk space: about \d+ kB as png, like the measured images", space)
    assert not (tmp_path / "out").exists()
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_a_model_that_cannot_be_measured_is_a_one_line_error(tmp_path, command, capsys, noisy):
    noisy("noise.NoiseModel.make = None")
    assert cli.main(command(tmp_path / "out", "--dry-run", "--measure")) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("jaxdiff: the model fails on every image: TypeError")
    assert cli.main(command(tmp_path / "out", "--measure")) == 2
    assert "--measure is for a dry run: add --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.002, "less than 1 s"), (1.25, "1.2 s"), (99.6, "100 s"), (130, "2.2 min"), (9e3, "2.5 h")],
)
def test_durations_have_plain_units(seconds, said):
    assert jobs.duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(1234, "1 kB"), (1.5e6, "1.5 MB"), (2.25e10, "22.5 GB"), (3e12, "3.0 TB")]
)
def test_sizes_have_plain_units(count, said):
    assert jobs.size(count) == said


def test_a_price_makes_a_bill_of_the_estimated_time(tmp_path, command, capsys):
    more = ("--dry-run", "--num-images=4000")

    def bill(price: str) -> list[float]:
        arguments = command(tmp_path / "out", *more, f"--price-per-chip-hour={price}")
        assert cli.main(arguments) == 0
        time, said = lines(capsys)[-3:-1]
        work = float(time.split()[2])
        assert said.startswith(f"the bill of this time, at {price} an hour: ")
        costs = [float(cost) for cost in re.findall(r"([0-9.]+) \(", said)]
        hours = [work / speed / 3600 for speed in (0.1e12, 100e12)]
        assert costs == pytest.approx([float(price) * each for each in hours], rel=0.06)
        return costs

    assert bill("800000") == pytest.approx([2 * cost for cost in bill("400000")], rel=0.02)


def test_a_dry_run_leaves_nothing_behind(tmp_path, command, capsys, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert cli.main(command(tmp_path / "new" / "out", "--dry-run")) == 0
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert cli.main(command(tmp_path / "new" / "out", "--dry-run", "--manifest=no.txt")) == 2
    assert "manifest no.txt does not exist" in capsys.readouterr().err
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_job_matches_its_dry_run(tmp_path, command, capsys, finish):
    directory = tmp_path / "out"
    arguments = command(directory)
    assert cli.main([*arguments, "--dry-run"]) == 0
    said = lines(capsys)
    finish(directory)
    run = open_run(directory)
    made = sum(shards.read_marker(run, n).made for n in run.shards)
    assert said[1] == "copied columns: 'note' (to the images' metadata)"
    assert said[2].startswith(f"images: {made}; model: tiny; shards: {len(run.shards)};")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert cli.main([*arguments, "--dry-run", "--steps=3"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(directory).rglob("*")} == before
