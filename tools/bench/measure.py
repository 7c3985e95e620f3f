"""The measurements: each gives figures, in rounds that take the engines in turn, A B A B."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tools.bench import workload
from tools.bench.checkpoints import ROOT
from tools.bench.engine import Column, Engine, EngineError, environment_of
from tools.bench.workload import Workload

MIB = 2**20
OPERATIONS = {"step": workload.step_operations, "decode": workload.decode_operations}


@dataclass
class Figure:
    """What was measured of one thing.

    Attributes:
      name: of what.
      batch: of images.
      unit: of the values; of rates more is better, of the others less.
      rounds: by column, a value each round.
      failures: by column, why there are no values.
      operations: floating-point operations of what took the seconds, where they are known.
      samples: by column, numbers of the first output, which should not differ much.
      devices: by column, the device's name.
    """

    name: str
    batch: int
    unit: str
    rounds: dict[Column, list[float]] = field(default_factory=dict)
    failures: dict[Column, str] = field(default_factory=dict)
    operations: int | None = None
    samples: dict[Column, np.ndarray] = field(default_factory=dict)
    devices: dict[Column, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How it is measured.

    Attributes:
      columns: the engines, the first of them jaxdiff.
      batches: sizes, of images.
      rounds: of every measurement.
      one_at_a_time: whether an engine is started for its turn only, and has all the memory.
      job_images: of the job.
    """

    columns: Sequence[Column]
    batches: Sequence[int]
    rounds: int
    one_at_a_time: bool
    job_images: int


def parts(name: str, work: Workload, plan: Plan) -> Iterator[Figure]:
    """Seconds of "text", "step" or "decode", or whole "images" a second, for each batch."""
    for batch in plan.batches:
        figure = _paired(name, batch, work, plan)
        if name in OPERATIONS:
            figure.operations = OPERATIONS[name](work, batch)
        if name == "images":
            figure.unit = "images/s"
            for seconds in figure.rounds.values():
                seconds[:] = [batch * work.batches_a_turn / each for each in seconds]
        yield figure


def product(work: Workload, plan: Plan) -> Iterator[Figure]:
    """Seconds of a large product of matrices: what can be had of a device at most."""
    figure = _paired("product", 1, work, plan)
    platform = "cpu" if "cpu" in figure.devices.values() else "gpu"
    figure.operations = workload.product_operations(workload.product_size(platform))
    yield figure


def start(work: Workload, plan: Plan) -> Iterator[Figure]:
    """Seconds from a new process to its first image: with nothing compiled before, and again."""
    work = replace(work, batches_a_turn=1)
    cold, warm = Figure("first image, cold", 1, "s"), Figure("first image, warm", 1, "s")
    share = Figure("first image, warm / cold", 1, "")
    for _ in range(plan.rounds):
        for column in plan.columns:
            with tempfile.TemporaryDirectory() as cache, _noted(share, column):
                for figure in (cold, warm):
                    seconds = _first_image_seconds(column, work, Path(cache))
                    figure.rounds.setdefault(column, []).append(seconds)
                ratio = warm.rounds[column][-1] / cold.rounds[column][-1]
                share.rounds.setdefault(column, []).append(ratio)
    yield from (cold, warm, share)


def memory(work: Workload, plan: Plan) -> Iterator[Figure]:
    """MiB at most, of a process that loads the model and makes one batch of images."""
    work = replace(work, batches_a_turn=1)
    for batch in plan.batches:
        figure = Figure("memory", batch, "MiB")
        for column in plan.columns:
            with _noted(figure, column), closing(Engine(column, "first", batch, work)) as engine:
                figure.rounds[column] = [engine.peak_bytes() / MIB]
        yield figure


def job(work: Workload, plan: Plan) -> Iterator[Figure]:
    """Images a second of `jaxdiff generate`, and of a loop over diffusers that writes PNG files.

    Both without loading and compiling, at the largest batch. The share is of a bare loop over
    `TextToImage`, which writes nothing. The whole command's rate includes all that it does.
    """
    ours, *others = plan.columns
    batch = max(plan.batches)
    work = replace(work, batches_a_turn=-(-plan.job_images // batch))
    images = work.batches_a_turn * batch
    rates, share = Figure("job", batch, "images/s"), Figure("job / bare loop", batch, "")
    whole = Figure("job, whole command", batch, "images/s")
    loops: dict[Column, Engine] = {}
    with ExitStack() as stack:
        for column, part in [(ours, "images"), *((column, "files") for column in others)]:
            with _noted(rates, column):
                loops[column] = stack.enter_context(closing(Engine(column, part, batch, work)))
        for _ in range(plan.rounds):
            for column, loop in loops.items():
                with _noted(rates, column):
                    rate = images / loop.seconds()
                    if column == ours:
                        bare, (rate, at_all) = rate, _job_rates(ours, batch, images, work)
                        share.rounds.setdefault(ours, []).append(rate / bare)
                        whole.rounds.setdefault(ours, []).append(at_all)
                    rates.rounds.setdefault(column, []).append(rate)
    yield from (rates, share, whole)


@contextmanager
def _noted(figure: Figure, column: Column) -> Iterator[None]:
    """Keeps an engine's failure in its place in the table; the others go on."""
    try:
        yield
    except EngineError as problem:
        figure.failures[column] = str(problem)


def _paired(part: str, batch: int, work: Workload, plan: Plan) -> Figure:
    """Seconds of a part, its engines prepared before the first round unless one at a time."""
    figure, engines = Figure(part, batch, "s"), {}
    with ExitStack() as stack:
        for column in () if plan.one_at_a_time else plan.columns:
            with _noted(figure, column):
                engines[column] = stack.enter_context(closing(Engine(column, part, batch, work)))
        for _ in range(plan.rounds):
            for column in plan.columns:
                if column in figure.failures:
                    continue
                with _noted(figure, column), ExitStack() as turn:
                    engine = engines.get(column) or turn.enter_context(
                        closing(Engine(column, part, batch, work))
                    )
                    figure.rounds.setdefault(column, []).append(engine.seconds())
                    figure.samples[column] = engine.sample
                    figure.devices[column] = engine.device
    return figure


def _first_image_seconds(column: Column, work: Workload, cache: Path) -> float:
    caches = {
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    began = time.perf_counter()
    with closing(Engine(column, "first", 1, work, **caches)):
        return time.perf_counter() - began


def _job_rates(column: Column, batch: int, images: int, work: Workload) -> tuple[float, float]:
    """Images a second of a job: by its own account of its stages, and of the whole command."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prompts = "\n".join(workload.prompts(0, images))
        (folder / "prompts.txt").write_text(prompts)
        options = {
            "manifest": folder / "prompts.txt",
            "output": folder / "out",
            "model": work.model,
            "width": work.width,
            "height": work.height,
            "steps": work.steps,
            "guidance-scale": work.guidance_scale,
            "dtype": column.dtype,
            "batch-size": batch,
        }
        command = [sys.executable, "-m", "jaxdiff", "generate"]
        command += [f"--{name}={value}" for name, value in options.items()]
        began = time.perf_counter()
        job = subprocess.run(command, cwd=ROOT, env=environment_of(work), stdout=sys.stderr)
        if job.returncode:
            raise EngineError("the job failed")
        elapsed = time.perf_counter() - began
        seconds = json.loads((folder / "out" / "run.json").read_text())["seconds"]
    return images / (seconds["generate"] + seconds["write"]), images / elapsed
