import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from making import FACTS, make_plan, make_shard, pixels_of

from jaxdiff.dataset import formats, ledger
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import open_run


@pytest.fixture(params=["webdataset", "parquet"])
def job(request, tmp_path, manifest, tiny_checkpoint):
    """A planned directory of three shards, and its run."""
    said = {"images_per_shard": 4, "batch_size": 2, "format": request.param}
    run = make_plan(tmp_path / "out", manifest, tiny_checkpoint, **said)
    return tmp_path / "out", run


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_shard_holds_its_images_in_order_with_their_records(job):
    directory, run = job
    assert make_shard(run, 1)
    images_name, metadata_name = run.file_names(1)
    read = formats.FORMATS[run.plan.settings.format].read
    samples = list(read(directory / images_name))
    planned = run.planned(1)
    assert [s.record["key"] for s in samples] == [image.key for image in planned]
    assert [s.record["seed"] for s in samples] == [image.request.seed for image in planned]
    assert json.loads(samples[1].record["metadata"]) == {"note": "x"}
    rows = pq.read_table(directory / metadata_name).to_pylist()
    assert [{**s.record, "status": "made"} for s in samples] == [
        {name: row[name] for name in [*s.record, "status"]}
        for s, row in zip(samples, rows, strict=True)
    ]


def test_equal_images_make_equal_shards(job, tmp_path):
    directory, run = job
    shutil.copytree(directory, tmp_path / "second")
    for place in (directory, tmp_path / "second"):
        assert make_shard(open_run(place), 0)
    for name in run.file_names(0):
        assert (directory / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_an_attempt_that_is_not_committed_leaves_nothing(job):
    directory, run = job
    before = files(directory)
    image = run.planned(0)[0]
    with shards.Attempt(run, 0) as attempt:
        attempt.add(shards.encode(image, pixels_of(image), run.plan))
        assert len(files(directory)) > len(before)
    assert files(directory) == before


def test_only_one_of_two_attempts_commits(job):
    directory, run = job
    planned = run.planned(0)
    with (
        shards.Attempt(run, 0) as first,
        shards.Attempt(run, 0) as second,
    ):
        for salt, attempt in enumerate((first, second)):  # as if their bytes differed
            for image in planned:
                attempt.add(shards.encode(image, pixels_of(image, salt), run.plan))
        assert second.commit(FACTS)
        made = files(directory)
        assert not first.commit(FACTS)
    assert {name: made[name] for name in run.file_names(0)} == {
        name: content
        for name, content in files(directory).items()
        if name.startswith(("data/", "metadata/"))
    }
    assert not list((directory / "_jaxdiff" / "tmp").iterdir())
    for shard in (1, 2):
        make_shard(run, shard)
    ledger.finalize(run, 0.0)
    assert ledger.verify(directory)[1] == []


RACER = """
import os, random, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from making import make_shard
from jaxdiff.dataset.run import open_run
directory, salt = Path(sys.argv[2]), int(sys.argv[3])
run = open_run(directory)
order = list(run.shards)
random.Random(salt).shuffle(order)
print("ready", flush=True)
for shard in order:
    make_shard(run, shard, salt=salt)
"""


def test_racing_processes_that_write_different_bytes_never_mix(tmp_path, manifest, tiny_checkpoint):
    directory = tmp_path / "out"
    manifest.write_text('{"prompt": "a", "num_images": 80}\n')
    run = make_plan(directory, manifest, tiny_checkpoint, batch_size=2, images_per_shard=2)
    here = str(Path(__file__).parents[1])
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, here, str(directory), str(salt)], stdout=subprocess.PIPE
        )
        for salt in range(4)
    ]
    for racer in racers:
        assert racer.stdout.readline() == b"ready\n"
    os.kill(racers[0].pid, signal.SIGKILL)
    assert [racer.wait() for racer in racers] == [-signal.SIGKILL, 0, 0, 0]
    for racer in racers:
        racer.stdout.close()
    ledger.finalize(run, 0.0)
    counts, problems = ledger.verify(directory)
    assert problems == []
    assert counts["made"] == 80


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_kill_between_the_marker_and_the_renames_is_repaired(job, renamed):
    directory, run = job
    for shard in range(3):
        make_shard(run, shard)
    marker = shards.read_marker(run, 0)
    for name in run.file_names(0)[renamed:]:  # as the kill would have left them
        os.rename(directory / name, run.store.staging(marker.attempt, name))
    assert ledger.todo(run) == []
    ledger.finalize(run, 0.0)
    assert ledger.verify(directory)[1] == []


def test_a_marker_of_another_plan_is_rejected(job):
    directory, run = job
    make_shard(run, 0)
    path = directory / shards.marker_name(0)
    whole = json.loads(path.read_text())
    for change in (
        {"plan_id": "0" * 64},
        {"shard": 1},
        {"attempt": "../../etc/passwd"},
        {"files": {"../../x": {"sha256": "0", "bytes": 1}}},
        {"made": 3},
    ):
        path.write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match="damaged or belongs to another plan"):
            shards.read_marker(run, 0)
