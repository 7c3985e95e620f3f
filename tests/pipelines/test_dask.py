"""Runs a job on a Dask cluster of two processes, and kills one of them during the job."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from injected import in_noise_at
from making import files

from jaxdiff import cli
from jaxdiff.dataset import names

SECONDS = 120  # before a test gives up
SHARDS = 12
SETTINGS = ("--images-per-shard=2",)


@pytest.fixture
def environment(noisy) -> dict[str, str]:
    """Returns an environment whose jobs take a while: each shard waits."""
    noisy(in_noise_at("", "import time; time.sleep(0.3)"))
    return dict(os.environ)


@pytest.fixture
def cluster(tmp_path, environment) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Yields a scheduler's address, and two single-threaded workers without a nanny."""
    with contextlib.ExitStack() as ends:

        def start(name: str, *arguments: str) -> subprocess.Popen:
            log = ends.enter_context((tmp_path / f"{name}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments, "--host=127.0.0.1", "--no-dashboard"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            ends.callback(end, process)
            return process

        file = tmp_path / "scheduler.json"
        start("scheduler", "scheduler", "--port=0", f"--scheduler-file={file}")
        wait_until(file.exists)
        address = json.loads(file.read_text())["address"]
        worker = ("worker", address, "--nthreads=1", "--no-nanny")
        worker += (f"--local-directory={tmp_path}",)
        yield address, [start(f"worker{n}", *worker) for n in range(2)]


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happens():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def start_job(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "jaxdiff", *arguments], env=environment, **pipes)


def children(pid: int) -> set[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for thread in threads for child in thread.read_text().split()}


def done(directory: Path) -> int:
    return len(list((directory / names.DONE).glob("*.json")))


def test_a_killed_worker_changes_nothing(tmp_path, command, environment, cluster):
    local, directory = tmp_path / "local", tmp_path / "dask"
    alone = start_job(command(local, *SETTINGS), environment)
    said, _ = alone.communicate(timeout=SECONDS)
    assert alone.returncode == 0, said

    address, workers = cluster
    logs = [tmp_path / f"worker{n}.log" for n in range(2)]
    dask = ("--runner=DaskRunner", f"--dask_client_address={address}")
    job = start_job(command(directory, *SETTINGS, *dask), environment)
    wait_until(lambda: all("is loaded" in log.read_text() for log in logs) and done(directory) >= 2)
    orphans = children(workers[0].pid)
    workers[0].kill()
    assert done(directory) < SHARDS
    said, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, said
    assert workers[0].wait() == -signal.SIGKILL
    assert len(orphans) == 1  # jaxdiff's worker, which holds the device
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))

    assert cli.main(["verify", str(directory)]) == 0
    assert done(directory) == SHARDS
    assert files(directory) == files(local)
