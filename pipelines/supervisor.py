"""Manages the processes that make shards: starts, monitors and restarts them.

The process that runs Beam never imports JAX. Its children hold the models and the devices, so a
crash or a hung device call ends one child, not the job, on any runner. When a child dies, the
images it was making are known: after three deaths, that image is given up, not the job.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from jaxdiff.errors import InputError
from pipelines import jobs
from pipelines.generate_options import Workers
from pipelines.jobs import StoppedError
from pipelines.worker import DEBUG, Task

MOST_DEATHS = 3
PACKAGES = Path(__file__).parents[1]  # the folder of this package
TPU = Path("/dev/accel0")
LOOK_SECONDS = 0.5  # how often to check whether the job is stopping


class WorkerError(Exception):
    """The image-making processes cannot work; the message gives the reason."""


class _DeathError(Exception):
    """A worker died while making the images with these keys."""

    def __init__(self, how: str, running: list[str]):
        super().__init__(how)
        self.how, self.running = how, running


# The host's workers, and the idle ones among them; created when first needed.
_workers: list["_Worker"] = []
_free: queue.LifoQueue | None = None
_lock = threading.Lock()


@contextlib.contextmanager
def closed_afterwards() -> Iterator[None]:
    """Ends the workers when the job ends, even if it fails."""
    try:
        yield
    finally:
        close()


def make_shard(task: Task, workers: Workers) -> dict:
    """Asks one of this host's workers to make a shard; waits until one is free.

    Returns:
      What `worker.make_shard` returns; an empty dict if the job in this process has failed.

    Raises:
      StoppedError: if `jobs.stopping` is set.
      InputError, OSError: as in `worker.make_shard`.
      WorkerError: if the worker keeps dying, or fails in another way.
    """
    with jobs.failures_kept(), _free_worker(workers) as worker:
        if not jobs.has_failed():
            return _make_shard(worker, task, workers)
    return {}


def _make_shard(worker: "_Worker", task: Task, workers: Workers) -> dict:
    deaths, idle_deaths = Counter(), 0
    while True:
        try:
            return worker.ask(task, workers.patience)
        except _DeathError as death:
            if worker.is_closed or jobs.stopping.is_set():
                raise StoppedError from None
            worker.end()
            tqdm.write(f"jaxdiff: a worker {death.how}; restarting it", sys.stderr)
            if not death.running:
                idle_deaths += 1
                if idle_deaths == MOST_DEATHS:
                    raise WorkerError(f"a worker {death.how} while making no image") from None
            deaths.update(death.running)
            deadly = dict(task.deadly or {})
            if len(death.running) == 1 and deaths[death.running[0]] >= MOST_DEATHS:
                deadly[death.running[0]] = f"the process {death.how}, {MOST_DEATHS} times"
            task = replace(task, alone=(*sorted(deaths),), deadly=deadly)


def close() -> None:
    """Ends the workers at once."""
    global _workers, _free
    with _lock:
        for worker in _workers:
            worker.is_closed = True
            worker.end()
        _workers, _free = [], None


@contextlib.contextmanager
def _free_worker(workers: Workers) -> Iterator["_Worker"]:
    global _workers, _free
    with _lock:
        if _free is None:
            shares = [device_share(n, workers.count, os.environ) for n in range(workers.count)]
            _workers, _free = [_Worker(share) for share in shares], queue.LifoQueue()
            for worker in _workers:
                _free.put(worker)
        free = _free
    worker = free.get()
    try:
        yield worker
    finally:
        free.put(worker)


class _Worker:
    """One child process, started at its first task."""

    def __init__(self, environment: dict[str, str]):
        self.is_closed = False
        self._environment = environment
        self._process: subprocess.Popen | None = None

    def ask(self, task: Task, patience: float) -> dict:
        """Runs a task in the process; raises the task's error, or `_DeathError`."""
        if self._process is None:
            self._start()
        process, running = self._process, []
        heard, stop_sent = time.monotonic(), False
        try:
            self._say(asdict(task))
            while True:
                if (jobs.stopping.is_set() or jobs.has_failed()) and not stop_sent:
                    stop_sent = True
                    self._say("stop")
                if stop_sent and not self._has_model:  # loading it may take minutes
                    self.end()
                    raise StoppedError
                try:
                    answer = self._answers.get(timeout=LOOK_SECONDS)
                except queue.Empty:
                    if time.monotonic() - heard > patience:
                        raise _DeathError(
                            f"finished no batch in {patience:g} s (--patience)", running
                        ) from None
                    continue
                heard = time.monotonic()
                if answer is None:
                    raise BrokenPipeError
                if "running" in answer:
                    running = answer["running"]
                elif "loaded" in answer:
                    self._has_model = True
                    tqdm.write(f"jaxdiff: the model is loaded on {answer['loaded']}", sys.stderr)
                else:
                    return _unpack(answer)
        except BrokenPipeError:
            raise _DeathError(_how(process.wait()), running) from None

    def end(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # unsent messages
                process.stdin.close()

    def _start(self) -> None:
        # -P keeps the user's working directory off the import path.
        paths = [*filter(None, [self._environment.get("PYTHONPATH")]), str(PACKAGES)]
        self._has_model = False
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "pipelines.worker",
                *([DEBUG] if jobs.is_debugging() else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**self._environment, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # only the supervisor gets the terminal's Ctrl-C
        )
        self._answers: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        threading.Thread(
            target=_listen, args=(self._process.stdout, self._answers), daemon=True
        ).start()

    def _say(self, message: dict | str) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()


def _listen(lines, answers: queue.SimpleQueue) -> None:
    try:
        with lines:
            for line in lines:
                answers.put(json.loads(line))
    finally:
        answers.put(None)


def _unpack(answer: dict) -> dict:
    ((kind, what),) = answer.items()
    if kind == "done":
        return what
    if kind == "stopped":
        raise StoppedError
    if kind == "refused":
        raise InputError(what)
    if kind == "os":
        raise OSError(*what)
    raise WorkerError(what)


def _how(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def device_share(index: int, count: int, environment: dict[str, str]) -> dict[str, str]:
    """Returns an environment in which one of several workers sees only its own devices.

    NVIDIA GPUs (those in CUDA_VISIBLE_DEVICES, or all) are divided among the workers. CPU cores are
    shared, so that results do not depend on the number of workers.

    Raises:
      InputError: if the GPUs cannot be divided evenly, or there are TPUs, of which one process
        takes all.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if count > 1 and ("tpu" in platforms or (not platforms and TPU.exists())):
        raise InputError(f"--workers {count}: one worker takes all of a host's TPU chips")
    devices = environment.get("CUDA_VISIBLE_DEVICES")
    if devices is None:
        devices = ",".join(str(n) for n in range(_nvidia_gpus()))
    gpus = [device for device in devices.split(",") if device]
    if count == 1 or not gpus or platforms == "cpu":
        return dict(environment)
    if len(gpus) % count:
        raise InputError(f"--workers {count}: {len(gpus)} GPUs cannot be divided evenly")
    own = gpus[index * len(gpus) // count : (index + 1) * len(gpus) // count]
    return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(own)}


def _nvidia_gpus() -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    return 0
