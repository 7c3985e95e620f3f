"""A job killed at any moment continues to the same bytes when the command runs again."""

import contextlib
import itertools
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import making
import pytest
from cases import further
from making import files

from jaxdiff import cli
from jaxdiff.dataset import ledger, names, paths
from jaxdiff.dataset.local import LocalStore

DYING = Path(__file__).parents[1] / "dying.py"
ORPHANS_SECONDS = 10.0
KILLS = 10
PAUSE_SECONDS = 0.002


def dying(environment: dict[str, str], *arguments) -> int:
    """Runs `dying.py`; returns the number of killed processes."""
    command = [sys.executable, str(DYING), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def tell(environment, story: str, folder: Path, model: Path, when: str, every: int, format_: str):
    steps = dying(environment, "tell", story, folder, model, when, every, f"--format={format_}")
    assert steps > 80  # of a job of three shards


@pytest.mark.parametrize("every", [2, further(1)])
def test_a_job_killed_between_its_steps_continues(tmp_path, tiny_checkpoint, environment, every):
    tell(environment, "make", tmp_path, tiny_checkpoint, "before", every, "webdataset")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "format_", "when"),
    [
        ("make", "webdataset", "after"),
        ("make", "imagefolder", "before"),
        ("extend", "parquet", "before"),
        ("retry", "imagefolder", "before"),
        ("retry", "imagefolder", "after"),
        ("retry", "webdataset", "before"),
        ("extend", "imagefolder", "after"),
        ("overwrite", "webdataset", "before"),
        ("overwrite", "imagefolder", "after"),
    ],
)
def test_a_job_killed_at_a_third_of_its_steps_continues_in_other_scenarios(
    tmp_path, tiny_checkpoint, environment, story, format_, when
):
    tell(environment, story, tmp_path, tiny_checkpoint, when, 3, format_)


def test_writers_that_race_and_die_never_mix_their_shards(tmp_path, tiny_checkpoint, environment):
    """With `os.replace` for `os.link` in shard.py, 3 of 3 runs end with wrong files."""
    assert dying(environment, "race", tmp_path, tiny_checkpoint) > 10


def test_a_late_writer_does_not_disturb_finalization(tmp_path, manifest, tiny_checkpoint):
    directory, ended = tmp_path / "out", threading.Event()
    run = making.make_plan(directory, manifest, tiny_checkpoint)
    for shard in run.shards:
        making.make_shard(run, shard)

    def write() -> None:
        while not ended.is_set():
            time.sleep(PAUSE_SECONDS)
            with contextlib.suppress(OSError):
                LocalStore(directory).scratch("late").write_text("late")

    with ThreadPoolExecutor() as pool:
        late = pool.submit(write)
        try:
            for _ in range(20):
                ledger.finalize(run, 0.0)
        finally:
            ended.set()
        late.result()
    assert ledger.verify(directory)[1] == []


@pytest.mark.parametrize("format_", ["webdataset", "imagefolder"])
def test_a_path_in_the_place_of_a_shard_is_named(tmp_path, manifest, tiny_checkpoint, format_):
    directory = tmp_path / "out"
    run = making.make_plan(directory, manifest, tiny_checkpoint, format=format_)
    name, _ = run.file_names(0)
    occupied = directory / name
    occupied.parent.mkdir()
    occupied.write_text("") if format_ == "imagefolder" else occupied.mkdir()
    with pytest.raises(OSError, match="a directory") as refused:
        making.make_shard(run, 0)
    assert refused.value.filename == str(occupied)
    paths.delete(occupied)
    for shard in ledger.todo(run):
        making.make_shard(run, shard)
    ledger.finalize(run, 0.0)
    assert ledger.verify(directory)[1] == []


def children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_alive(process: int) -> bool:
    """Returns whether a process runs; an orphan may remain as a zombie, which does not count."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def markers(directory: Path) -> dict[str, tuple[int, int]]:
    """Returns the inode and modification time of each done-marker."""
    stats = {path.name: path.stat() for path in (directory / names.DONE).glob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def wait_for_markers(process: subprocess.Popen, directory: Path, count: int) -> None:
    while len(markers(directory)) < count and process.poll() is None:
        time.sleep(PAUSE_SECONDS)


def test_a_second_job_may_not_start_over_but_takes_over_a_dead_jobs_lock(
    tmp_path, command, environment, manifest, capsys
):
    directory = tmp_path / "out"
    arguments = command(directory, "--num-images=57")
    job = [sys.executable, "-m", "jaxdiff", *arguments]
    rows = manifest.read_text()
    with subprocess.Popen(job, env=environment, stderr=subprocess.DEVNULL) as first:
        wait_for_markers(first, directory, 1)
        first.send_signal(signal.SIGSTOP)  # it holds the directory, but does nothing
        assert cli.main([*arguments, "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert f"process {first.pid} on" in said
        assert "is writing here; wait for it" in said
        first.kill()
    made = markers(directory)
    assert 0 < len(made) < 20
    with subprocess.Popen(job, env=environment, stderr=subprocess.DEVNULL) as second:
        wait_for_markers(second, directory, len(made) + 1)
        manifest.write_text("a manifest that is being rewritten")  # not read once planned
        assert second.wait() == 0
    assert made.items() <= markers(directory).items()
    assert cli.main(["verify", str(directory)]) == 0
    assert "80 made" in capsys.readouterr().out
    assert cli.main(arguments) == 2  # the manifest has changed
    manifest.write_text(rows)
    assert cli.main(arguments) == 0
    assert "is already finished: 80 images" in capsys.readouterr().out


def moment(directory: Path) -> str:
    """Returns what a job was doing, judging by its files."""
    made = len(markers(directory))
    if not (directory / names.PLAN).exists():
        return "not planned"
    if (directory / names.SUCCESS).exists():
        return "finished"
    if (directory / names.CARD).exists():
        return "finalizing"
    return f"{made} made"


def assert_ended(workers: list[int]) -> None:
    deadline = time.monotonic() + ORPHANS_SECONDS
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(PAUSE_SECONDS)


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path, command, environment):
    """Kills half of them at any time of a job, and half while it makes shards or finalizes."""
    directory, whole = tmp_path / "out", tmp_path / "whole"
    job = [sys.executable, "-m", "jaxdiff", *command(directory, "--num-images=57")]
    run = partial(subprocess.run, job, env=environment, check=True, capture_output=True)
    run()  # the first compiles
    directory.rename(whole)
    began = time.monotonic()
    run()
    seconds, shards = time.monotonic() - began, len(markers(directory))
    assert shards == 20
    shutil.rmtree(directory)

    chance, moments = random.Random(4), []
    for number in itertools.count():
        before = markers(directory)
        process = subprocess.Popen(job, env=environment, stderr=subprocess.DEVNULL)
        if number % 2 == 0:
            time.sleep(chance.uniform(0, seconds))
        else:
            wait_for_markers(process, directory, min(len(before) + chance.randint(0, 6), shards))
            time.sleep(chance.uniform(0, 0.05))
        workers = children(process.pid)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            moments.append(moment(directory))
        assert before.items() <= markers(directory).items()  # no shard is made twice
        assert_ended(workers)
        if len(moments) == KILLS:
            break
        if (directory / names.SUCCESS).exists():
            assert files(directory) == files(whole)
            shutil.rmtree(directory)
    run()
    assert files(directory) == files(whole)
    assert cli.main(["verify", str(directory)]) == 0
    print(f"{len(moments)} kills: {dict(Counter(moments))}")
