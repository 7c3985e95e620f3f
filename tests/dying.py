"""Kills processes while they write a dataset. Does not import JAX, so that it can fork.

    python tests/dying.py tell STORY FOLDER CHECKPOINT before|after EVERY [generate's arguments]

runs a scenario of `STORIES` once for every EVERY-th file operation of its last command. Each time
it kills the command at that operation, runs it again and compares the dataset with an uninterrupted
one. It runs the real command, except that the model's images are noise, a loop replaces Beam, and
fsync does nothing: the test simulates the death of a process, not a power failure.

    python tests/dying.py race FOLDER CHECKPOINT

lets three writers, each with different images, race for the shards of one plan and kills them at
random.

Both print the number of killed processes.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import making
import numpy as np

from jaxdiff import cli
from jaxdiff.dataset import ledger
from pipelines import generate, worker
from pipelines.worker import Task

OPERATIONS = ("link", "replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "sendfile")
FEW = [{"prompt": "a ring", "num_images": 3}, "broken", {"prompt": "a star", "seeds": [3, 4]}]
MORE = [*FEW, {"prompt": "a square", "id": "new", "num_images": 2}]
# The commands of each scenario, as rows and arguments; the last command is the one that is killed.
# The model cannot make stars unless a command has --retry-failed.
STORIES = {
    "make": [(FEW, [])],
    "retry": [(FEW, []), (FEW, ["--retry-failed"])],
    "extend": [(FEW, []), (MORE, [])],
    "overwrite": [(FEW, ["--seed=1"]), (FEW, ["--overwrite"])],
}
RACE_SECONDS = 0.06  # per shard


class NoiseModel:
    """The parts of a model that a worker uses."""

    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="test", platform="test")]))

    knows_stars = False
    prompt_sizes = ()
    enlarges = 1
    encodes_ahead = False

    def slots(self, request, batch_size: int) -> int:
        return batch_size

    def stream_bucket(self, requests, batch_size: int) -> Iterator[SimpleNamespace]:
        for request in requests:
            noise = np.random.default_rng(request.seed)
            pixels = noise.integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)
            finite = self.knows_stars or "star" not in request.prompt
            yield SimpleNamespace(pixels=pixels, request=request, finite=finite)


def make_shards(generate_shard, plan, todo: list[int], beam_runner) -> None:
    """Replaces `generate.make_shards`."""
    for shard in todo:
        models = vars(generate_shard.models)
        task = Task(generate_shard.directory, models, shard, generate_shard.mode)
        worker.make_shard(task, lambda _: None)


def started(function: Callable[[], object]) -> int:
    """Starts a function in a process of its own; returns the process id."""
    process = os.fork()
    if process == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def ended(process: int) -> int:
    """Waits for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def forked(function: Callable[[], object]) -> int:
    """Runs a function in a process of its own; returns the exit code."""
    return ended(started(function))


def dies_at(number: int, after: bool) -> None:
    """Makes this process kill itself before, or after, its file operation of this number."""
    numbers = itertools.count()

    def deadly(operation: Callable) -> Callable:
        def run(*args, **kwargs):
            is_last = next(numbers) == number
            if is_last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return operation(*args, **kwargs)
            finally:
                if is_last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return run

    for name in OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))


def imitate() -> None:
    """Makes this process run commands without a model, without Beam and without fsync."""
    worker._load = lambda *_: NoiseModel()
    worker._version = lambda package: ""
    generate.make_shards = make_shards
    generate.runners.choose = lambda *_: (None, None)
    os.fsync = lambda file: None


class Story:
    """A scenario: a directory for its commands, and the state before the last of them."""

    def __init__(self, name: str, folder: Path, checkpoint: Path, more: list[str]):
        *before, self._last = STORIES[name]
        self._folder, self._manifest = folder, folder / "rows.jsonl"
        self._before, self.directory = folder / "before", folder / "out"
        said = {"manifest": self._manifest, "output": self.directory, "model": checkpoint}
        said |= {"width": 16, "height": 8, "batch-size": 2, "images-per-shard": 2}
        self._command = ["generate", *(f"--{name}={value}" for name, value in said.items()), *more]
        for rows, arguments in before:
            assert forked(lambda r=rows, a=arguments: self._run(r, a)) == 0
        if before:
            self.directory.rename(self._before)

    def begin(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._before.exists():
            shutil.copytree(self._before, self.directory)

    def end(self) -> None:
        self._run(*self._last)

    def end_killed(self, number: int, after: bool) -> None:
        dies_at(number, after)
        self.end()

    def _run(self, rows: list, arguments: list[str]) -> None:
        NoiseModel.knows_stars = "--retry-failed" in arguments
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        self._manifest.write_text("\n".join(lines) + "\n")
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main([*self._command, *arguments])
        assert code in (0, 3), said.getvalue()


def tell(name: str, folder: str, checkpoint: str, when: str, every: str, *more: str) -> None:
    imitate()
    story = Story(name, Path(folder), Path(checkpoint), list(more))
    story.begin()
    story.end()  # in this process, so that forked ones have all imports
    expected = making.files(story.directory)
    assert ledger.verify(story.directory)[1] == []
    for number in itertools.count(step=int(every)):
        story.begin()
        code = forked(partial(story.end_killed, number, when == "after"))
        if code == 0:
            print(number)
            return
        where = f"{name}: killed {when} operation {number}"
        assert code == -signal.SIGKILL, where
        story.end()
        assert making.files(story.directory) == expected, where


def race(folder: str, checkpoint: str) -> None:
    imitate()
    manifest, directory = Path(folder, "rows.jsonl"), Path(folder, "out")
    manifest.write_text('{"prompt": "a ring", "num_images": 120}\n')
    said = {"batch_size": 2, "images_per_shard": 2}
    run = making.make_plan(directory, manifest, Path(checkpoint), **said)

    begun = time.monotonic()

    def write(salt: int) -> None:
        chance = random.Random(salt)
        os.fsync = lambda _: time.sleep(chance.choice([0, 0, 0.005]))  # simulates a busy disk
        for shard in range(60):  # all writers at the same shard
            late = time.monotonic() - begun - RACE_SECONDS * shard
            time.sleep(max(0, -late))
            if late < RACE_SECONDS:
                making.make_shard(run, shard, salt=salt)

    chance, salts, kills = random.Random(1), itertools.count(), 0
    writers = [started(partial(write, next(salts))) for _ in range(3)]
    while time.monotonic() < begun + 60 * RACE_SECONDS:
        time.sleep(chance.uniform(0, 2 * RACE_SECONDS))
        number = chance.randrange(3)
        os.kill(writers[number], signal.SIGKILL)
        kills += ended(writers[number]) == -signal.SIGKILL
        writers[number] = started(partial(write, next(salts)))
    assert [ended(writer) for writer in writers] == [0, 0, 0]
    for shard in ledger.todo(run):
        making.make_shard(run, shard)
    ledger.finalize(run, 0.0)
    counts, problems = ledger.verify(directory)
    assert problems == []
    assert counts["made"] == 120
    print(kills)


if __name__ == "__main__":
    {"tell": tell, "race": race}[sys.argv[1]](*sys.argv[2:])
