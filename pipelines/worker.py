"""Making one shard in a worker process: the model, the encoding threads, the commit."""

import importlib.metadata
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.plan import Plan, PlannedImage
from jaxdiff.errors import InputError
from jaxdiff.request import Options
from pipelines.options import Models

if TYPE_CHECKING:
    from jaxdiff.text_to_image import Image, TextToImage

ENCODING_THREADS = min(4, os.cpu_count() or 1)
PACKAGES = ("jaxdiff", "apache-beam", "flax", "jax", "jaxlib", "numpy", "pillow", "pyarrow")
NOT_FINITE = "the model's values were not finite"

stopping = threading.Event()  # set by a signal: the running shard is given up
_device = threading.Lock()  # one shard at a time, however many threads the runner has
_held: tuple[tuple, "TextToImage"] | None = None


class StoppedError(Exception):
    """The job was asked to stop."""


def make_shard(directory: Path, models: Models, shard: int) -> dict:
    """Makes and commits one shard of the directory's plan, unless that has been done.

    Args:
      models: those that the plan was made for.

    Returns:
      The shard, how many of its images were made and failed, and the seconds by stage.

    Raises:
      StoppedError: if `stopping` was set meanwhile; nothing of the shard is left.
      InputError: if the model is not the plan's, or another kind of device has made a shard.
    """
    plan = plans.load(directory)
    with _device:
        if marker := shards.read_marker(directory, plan, shard):
            shards.publish(directory, marker)
            return {"shard": shard, "made": 0, "failed": 0, "seconds": {}}
        if stopping.is_set():
            raise StoppedError
        loading = time.monotonic()
        loaded = _load(models, plan)
        _check_device(directory, plan, loaded)
        started = time.monotonic()
        with shards.Attempt(directory, plan, shard) as attempt:
            made = _fill(attempt, loaded, plan, plans.read_shard(directory, plan, shard))
            finished = time.monotonic()
            seconds = {"load": started - loading, "generate": finished - started}
            seconds = {stage: round(value, 3) for stage, value in seconds.items()}
            attempt.commit(_facts(loaded, plan, seconds))
    layout.forget_old(directory)  # now that this run has a shard
    failed = plan.shard_sizes[shard] - made
    return {"shard": shard, "made": made, "failed": failed, "seconds": seconds}


def _fill(
    attempt: shards.Attempt, model: "TextToImage", plan: Plan, planned: list[PlannedImage]
) -> int:
    """Generates, encodes and stores the images; returns how many were made."""
    requests = (image.request for image in planned)
    images = model.stream(requests, plan.settings.batch_size)
    made = 0
    with ThreadPoolExecutor(ENCODING_THREADS) as pool:
        samples = _ahead(
            partial(_encode, plan),
            zip(planned, images, strict=True),
            pool,
            depth=2 * plan.settings.batch_size * model.mesh.shape["data"],
        )
        for image, sample in zip(planned, samples, strict=True):
            if stopping.is_set():
                raise StoppedError
            if sample is None:
                attempt.add_failed(image, NOT_FINITE)
            else:
                attempt.add(sample)
                made += 1
    return made


def _encode(plan: Plan, pair: tuple[PlannedImage, "Image"]) -> Sample | None:
    planned, image = pair
    return shards.encode(planned, image.pixels, plan) if image.finite else None


def _ahead(function: Callable, items: Iterable, pool: ThreadPoolExecutor, depth: int) -> Iterator:
    """Maps on the pool, in order, at most `depth` items ahead of the consumer."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _load(models: Models, plan: Plan) -> "TextToImage":
    """The plan's model; the process keeps the last one that it has loaded."""
    global _held
    import jaxdiff

    options = {field.name: getattr(plan.settings, field.name) for field in fields(Options)}
    key = (plan.identity["model"], *options.values())
    if _held is None or _held[0] != key:
        _held = None  # frees the old model's memory first
        loaded = jaxdiff.load(**vars(models), **options)
        if loaded.ensemble.fingerprint != plan.identity["model"]:
            raise InputError(f"model {models.model} is not the one that the job was planned for")
        _held = (key, loaded)
        tqdm.write(f"jaxdiff: {plan.model_name} is loaded on {_device_of(loaded)}", sys.stderr)
    return _held[1]


def _device_of(model: "TextToImage") -> str:
    devices = model.mesh.devices
    return f"{devices.size} x {devices.flat[0].device_kind}"


def _check_device(directory: Path, plan: Plan, model: "TextToImage") -> None:
    """Refuses to mix kinds of devices, whose pixels differ, in one dataset."""
    here = _device_of(model)
    made = (int(p.stem) for p in (directory / layout.DONE).glob("*.json") if p.stem.isdecimal())
    marker = next(filter(None, (shards.read_marker(directory, plan, s) for s in made)), None)
    if marker and marker.facts["device"].partition(" x ")[2] != here.partition(" x ")[2]:
        raise InputError(
            f"{directory} was begun on {marker.facts['device']}, but here is {here}: continue on "
            "the same hardware, or start anew with --overwrite"
        )


def _facts(model: "TextToImage", plan: Plan, seconds: dict[str, float]) -> dict:
    return {
        "device": _device_of(model),
        "batch_size": plan.settings.batch_size,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "seconds": seconds,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # jaxdiff in a checkout
        return "not installed"
