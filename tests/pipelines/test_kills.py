"""A job that dies at any moment is continued by the same command to the same bytes."""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from making import files

from jaxdiff import cli
from jaxdiff.dataset import directory as layout

DYING = Path(__file__).parents[1] / "dying.py"
ORPHANS_SECONDS = 10.0
KILLS = 20
PAUSE_SECONDS = 0.002


def dying(environment: dict[str, str], *arguments) -> int:
    """Runs `dying.py`; returns how many processes were killed."""
    command = [sys.executable, str(DYING), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.parametrize(("story", "format_"), [("make", "webdataset"), ("retry", "imagefolder")])
def test_a_kill_between_any_two_steps_is_healed(
    tmp_path, tiny_checkpoint, environment, story, format_
):
    kills = dying(
        environment, "tell", story, tmp_path, tiny_checkpoint, "before", f"--format={format_}"
    )
    assert kills > 80  # the steps of a job of three shards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "format_", "when"),
    [
        ("make", "webdataset", "after"),
        ("make", "imagefolder", "before"),
        ("extend", "parquet", "before"),
        ("retry", "imagefolder", "after"),
        ("retry", "webdataset", "before"),
        ("extend", "imagefolder", "after"),
        ("overwrite", "webdataset", "before"),
        ("overwrite", "imagefolder", "after"),
    ],
)
def test_so_is_one_in_every_other_story(
    tmp_path, tiny_checkpoint, environment, story, format_, when
):
    more = f"--format={format_}"
    assert dying(environment, "tell", story, tmp_path, tiny_checkpoint, when, more) > 80


def test_writers_that_race_and_die_never_mix_their_shards(tmp_path, tiny_checkpoint, environment):
    """With `os.replace` for `os.link` in shard.py, files differ from their markers: 3 of 3 runs."""
    assert dying(environment, "race", tmp_path, tiny_checkpoint) > 10


def children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_alive(process: int) -> bool:
    """Whether it runs; nobody waits for an orphan, so it may stay as a zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def markers(directory: Path) -> dict[str, tuple[int, int]]:
    """When each done-marker was made."""
    stats = {path.name: path.stat() for path in (directory / layout.DONE).glob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def wait_for_markers(process: subprocess.Popen, directory: Path, count: int) -> None:
    while len(markers(directory)) < count and process.poll() is None:
        time.sleep(PAUSE_SECONDS)


def moment(directory: Path) -> str:
    """What a job was doing, by its files."""
    made = len(markers(directory))
    if not (directory / layout.PLAN).exists():
        return "not planned"
    if (directory / layout.SUCCESS).exists():
        return "finished"
    if (directory / layout.CARD).exists():
        return "finalizing"
    return f"{made} made"


def assert_ended(workers: list[int]) -> None:
    deadline = time.monotonic() + ORPHANS_SECONDS
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(PAUSE_SECONDS)


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(tmp_path, command, environment):
    """Half of them at any time of a whole job, half while it makes shards or ends."""
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
        if (directory / layout.SUCCESS).exists():
            assert files(directory) == files(whole)
            shutil.rmtree(directory)
    run()
    assert files(directory) == files(whole)
    assert cli.main(["verify", str(directory)]) == 0
    print(f"{len(moments)} kills: {dict(Counter(moments))}")
