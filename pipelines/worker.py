"""The process that makes shards: it holds the model, encodes images on threads, commits shards.

    python -m pipelines.worker

Its supervisor writes tasks to standard input and reads events from standard output, one line of
JSON each. The process ends when its input does, so it cannot outlive its supervisor.
"""

import functools
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import queue
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import pyarrow.parquet as pq

from jaxdiff.dataset import names
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.plan import PlannedImage
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.dataset.store import open_store
from jaxdiff.devices import batching
from jaxdiff.errors import InputError
from jaxdiff.images import loading
from jaxdiff.request import Options, Request
from pipelines.generate_options import Models
from pipelines.jobs import StoppedError
from pipelines.profiling import Profile
from pipelines.shard_images import ShardImages, device_of, reason_of

if TYPE_CHECKING:
    from jaxdiff.engine.engine import TextToImage

MOST_COMPILED = 16  # programs compiled ahead of use
PACKAGES = ("jaxdiff", "apache-beam", "flax", "jax", "jaxlib", "numpy", "pillow", "pyarrow")
DEBUG = "--debug"  # shows tracebacks
NVIDIA = Path("/proc/driver/nvidia/version")  # exists where NVIDIA's driver is loaded

stopping = threading.Event()  # abandons the current shard


@dataclass(frozen=True)
class Task:
    """One shard to make.

    Attributes:
      directory: the dataset's, absolute, or its address.
      models: the arguments of `generate_options.Models`.
      mode: "make" makes a missing shard; "retry" retries the failed images of a finished shard;
        "repair" remakes a finished shard's files, with the same bytes as in its marker; "measure"
        times some batches of it and keeps nothing.
      alone: the keys of images to compute in batches of their own, padded with copies, because they
        were being made when the process died.
      deadly: the keys of images that have killed the process too often, each with the reason.
      profile: the folder for a trace of a few batches, or None.
    """

    directory: str
    models: dict
    shard: int
    mode: Literal["make", "retry", "repair", "measure"] = "make"
    alone: tuple[str, ...] = ()
    deadly: dict[str, str] | None = None
    profile: str | None = None


_held: tuple[tuple, "TextToImage"] | None = None  # the model, and the key it was loaded for


def make_shard(task: Task, tell: Callable[[dict], None]) -> dict[str, float]:
    """Makes and commits one shard of a directory's plan, unless it is done.

    Args:
      tell: called with {"running": [key, ...]} whenever the images being made change, and with
        {"loaded": "the device"}.

    Returns:
      The numbers of "images" made, "failed" images and "padded" batch slots, and the seconds per
      stage, with the names that the marker uses.

    Raises:
      StoppedError: if `stopping` was set; nothing of the shard is kept.
      InputError: if the model is not the plan's or fails on every image, if another kind of device
        has made a shard, or if a shard cannot be repaired.
    """
    run = _run(task.directory)
    marker = shards.read_marker(run, task.shard)
    if marker and (task.mode == "make" or (task.mode == "retry" and not marker.failed)):
        return {"images": 0, "failed": 0, "padded": 0}
    started = time.monotonic()
    planned = run.planned(task.shard)
    model = _load(task, run, planned[0].request, tell)
    _check_device(run, model)
    is_retry = task.mode == "retry"
    revision = marker.revision + 1 if is_retry else 0
    batch_size = _batch_size(run, model, planned[0].request)
    if task.mode == "measure":
        return _measured(model, run, planned, batch_size, started, tell)
    loaded = time.monotonic()
    files = marker.files if is_retry else ()
    with run.store.fetched(*files) as local, shards.Attempt(run, task.shard, revision) as attempt:
        work = ShardImages(
            model,
            run.plan,
            batch_size,
            alone=task.alone,
            deadly=task.deadly,
            tell=tell,
            is_stopping=stopping.is_set,
            profile=_profile(task.profile),
        )
        kept = _kept_keys(Run(local, run.plan), marker) if is_retry else set()
        samples = shards.samples(run, marker, local) if is_retry else iter(())
        work.fill(attempt, planned, kept, samples)
        _profile(task.profile).end()
        seconds = {"load": loaded - started} | work.seconds(time.monotonic() - loaded)
        seconds = {stage: round(value, 3) for stage, value in seconds.items()}
        facts = _facts(model, batch_size, work.padded, seconds, marker.facts if is_retry else None)
        if task.mode == "repair":
            attempt.repair(marker)
        elif work.made or task.mode == "make":
            attempt.commit(facts)
    run.store.forget_old()  # now that this run has a shard
    return {"images": work.made, "failed": work.failed, "padded": work.padded} | seconds


def _measured(
    model: "TextToImage",
    run: Run,
    planned: list[PlannedImage],
    batch_size: int,
    started: float,
    tell: Callable[[dict], None],
) -> dict:
    """Makes a batch of a shard to warm up, then up to two batches, and keeps none of them.

    Returns:
      "device"; "slots", the images that all devices compute at once; "startup", the seconds until
      the first batch is made; "seconds", what each batch takes after that; "bytes" of an image's
      file, None if all images failed.
    """
    slots = model.slots(planned[0].request, batch_size)
    times = [started]
    for images in (planned[:slots], planned[slots : 3 * slots] or planned[:slots]):
        work = ShardImages(
            model,
            run.plan,
            batch_size,
            tell=tell,
            is_stopping=stopping.is_set,
            profile=Profile(None),
        )
        with shards.Attempt(run, 0) as attempt:
            work.fill(attempt, images, set(), iter(()))
            files = attempt.image_bytes
        times.append(time.monotonic())
    return {
        "device": device_of(model),
        "slots": slots,
        "startup": times[1] - times[0],
        "seconds": (times[2] - times[1]) / -(-len(images) // slots),
        "bytes": sum(files) / len(files) if files else None,
    }


@functools.cache  # one per process
def _profile(directory: str | None) -> Profile:
    return Profile(directory)


def _run(directory: str) -> Run:
    return _run_of(directory, open_store(directory).version(names.PLAN_FILE))


@functools.lru_cache(maxsize=1)  # a plan of 100,000 shards takes a while to read
def _run_of(directory: str, _: str) -> Run:
    return open_run(directory)


def _kept_keys(run: Run, marker: shards.Marker) -> set[str]:
    """Returns the keys of a shard's successful images; raises InputError if it is damaged."""
    shards.check_files(run, marker)
    with run.store.open(marker.metadata_name) as file:
        rows = pq.read_table(file, columns=["key", "status"]).to_pylist()
    return {row["key"] for row in rows if row["status"] == "made"}


def _load(task: Task, run: Run, first: Request, tell: Callable[[dict], None]) -> "TextToImage":
    """Returns the plan's model; the process keeps the last one that it loaded.

    While reading the weights, it compiles the plan's programs, the one for `first` before others.
    """
    global _held
    models = Models(**task.models)
    options = {field.name: getattr(run.plan.settings, field.name) for field in fields(Options)}
    key = (run.plan.identity["model"], *options.values())
    if _held is None or _held[0] != key:
        _held = None  # frees the old model's memory first
        import jaxdiff

        check_devices()
        kinds = [first, *(run.kinds() if task.mode == "make" else ())]
        sizes = {kind.bucket: (kind, _known_batch_size(run, kind)) for kind in kinds}
        expecting = {kind: size for kind, size in sizes.values() if size is not None}
        expecting = dict(itertools.islice(expecting.items(), MOST_COMPILED))
        loaded = jaxdiff.load(**vars(models), **options, expecting=expecting)
        if loaded.ensemble.fingerprint != run.plan.identity["model"]:
            raise InputError(f"model {models.model} is not the one that the job was planned for")
        _held = key, loaded
        tell({"loaded": device_of(loaded)})
    return _held[1]


def check_devices() -> None:
    """Raises InputError if the platform is missing, or if JAX silently fell back to the CPU."""
    import jax

    wanted = os.environ.get("JAX_PLATFORMS", "")
    try:
        platform = jax.local_devices()[0].platform
    except (AssertionError, RuntimeError) as problem:  # for CUDA, the assertion has no text
        first, *_ = str(problem).splitlines() or [""]
        raise InputError(
            f"JAX_PLATFORMS={wanted}: JAX finds no such device here {f'({first})' if first else ''}"
        ) from None
    if platform == "cpu" and not wanted and NVIDIA.exists():
        raise InputError(
            "this host has an NVIDIA GPU that JAX does not see: pip install 'jax[cuda12]', or set "
            "JAX_PLATFORMS=cpu to run without it"
        )


def _check_device(run: Run, model: "TextToImage") -> None:
    """Raises InputError if another kind of device, whose pixels differ, began the dataset."""
    from jaxdiff.devices import parallel

    here = parallel.hardware(model.mesh)
    begun_on = run.store.claim(names.DEVICE, here)
    if begun_on != here:
        same = "with NPROC set to that number" if "threads" in begun_on else "on the same hardware"
        raise InputError(
            f"{run.address} was begun on {begun_on}, but this is {here}: continue {same}, or "
            "start over with --overwrite"
        )


def _batch_size(run: Run, model: "TextToImage", request: Request) -> int:
    """Returns the run's batch size for images like this one; it never changes within the run.

    An accelerator's kernels depend on it, so the largest that fits is found before any image is
    made, and recorded for all workers.
    """
    known = _known_batch_size(run, request)
    if known is not None:
        return known
    counts = {kind.bucket: count for kind, count in run.kinds().items()}
    most = min(counts[request.bucket], max(run.plan.shard_sizes))
    largest = model.largest_batch_size(
        loading.blank(request, model.prompt_sizes, model.enlarges), most
    )
    return int(run.store.claim(_pin(request), str(largest)))


def _known_batch_size(run: Run, request: Request) -> int | None:
    """Returns the batch size that was given or found before, or a CPU's own; None if unknown."""
    if run.plan.settings.batch_size != batching.AUTO:
        return run.plan.settings.batch_size
    import jax

    if jax.default_backend() == "cpu":
        return batching.on_cpu(request.width, request.height)
    pin = _pin(request)
    if run.store.kind(pin) == "is missing":
        return None
    text = run.store.read(pin).decode("utf-8", "replace")
    if not re.fullmatch(r"[1-9][0-9]?", text):
        raise InputError(f"{run.address}/{pin} is damaged: start over with --overwrite")
    return int(text)


def _pin(request: Request) -> str:
    *usual, strength, masked, control, modes = request.bucket
    images = [] if strength is None else [f"{strength:g}", "masked" if masked else "image"]
    images += [] if control is None else ["control", *(f"{share:g}" for share in control)]
    images += [f"{modes}modes"] if modes else []
    return f"{names.BATCH}/{'-'.join(map(str, [*usual, *images]))}"


def _facts(
    model: "TextToImage",
    batch_size: int,
    padded: int,
    seconds: dict[str, float],
    before: dict | None,
) -> dict:
    """Returns a marker's facts; for a revision, they include the shard's earlier costs."""
    before = before or {"padded": 0, "seconds": {}}
    return {
        "device": device_of(model),
        "batch_size": batch_size,
        "padded": before["padded"] + padded,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "seconds": {
            stage: round(before["seconds"].get(stage, 0.0) + value, 3)
            for stage, value in seconds.items()
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # jaxdiff, in a checkout
        return "not installed"


def main(tasks: TextIO, answers: TextIO, debug: bool) -> None:
    """Makes shards until the input ends; answers each task with its events and a final line."""
    todo: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks, todo), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())

    def tell(event: dict) -> None:
        answers.write(json.dumps(event) + "\n")
        answers.flush()

    while True:
        task = todo.get()
        try:
            tell({"done": make_shard(Task(**task), tell)})
        except Exception as problem:
            if debug:
                traceback.print_exc()
            tell(_described(problem))


def _described(problem: Exception) -> dict:
    """Returns an error in the form from which the supervisor raises it again."""
    if isinstance(problem, StoppedError):
        return {"stopped": True}
    if isinstance(problem, InputError):
        return {"refused": str(problem)}
    if isinstance(problem, OSError):
        name = problem.filename and str(problem.filename)
        return {"os": [problem.errno, problem.strerror or str(problem), name]}
    return {"broken": reason_of(problem)}


def _listen(tasks: TextIO, todo: queue.SimpleQueue) -> None:
    """Reads the supervisor's messages; exits the process at once when the supervisor is gone."""
    for line in tasks:
        message = json.loads(line)
        if message == "stop":
            stopping.set()
        else:
            todo.put(message)
    os._exit(1)


if __name__ == "__main__":
    # Keeps the libraries' prints out of the answers.
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    debug = DEBUG in sys.argv
    level = logging.INFO if debug else logging.ERROR
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("jaxdiff").setLevel(logging.INFO if debug else logging.WARNING)
    if not debug:
        warnings.simplefilter("ignore")
    main(sys.stdin, own, debug)
