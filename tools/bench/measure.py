"""The measurements: each yields figures from rounds that alternate the engines, A B A B."""

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
    """The results of one measurement.

    Attributes:
      name: what was measured.
      batch: the batch size.
      unit: the unit of the values; higher is better for rates, lower for everything else.
      rounds: by column, one value per round.
      failures: by column, the reason if there are no values.
      operations: floating-point operations of the timed work, if known.
      samples: by column, a sample of the first output, which should not differ much.
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
    """How to measure.

    Attributes:
      columns: the engines; the first is jaxdiff.
      batches: the batch sizes.
      rounds: the rounds per measurement.
      one_at_a_time: whether each engine is started only for its turn, with all the memory.
      job_images: the images per job.
    """

    columns: Sequence[Column]
    batches: Sequence[int]
    rounds: int
    one_at_a_time: bool
    job_images: int


def parts(name: str, work: Workload, plan: Plan) -> Iterator[Figure]:
    """Measures "text", "step" or "decode" in seconds, or "images" per second, for each batch."""
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
    """Measures the seconds of a large matrix product, which gives the device's peak."""
    figure = _paired("product", 1, work, plan)
    platform = "cpu" if "cpu" in figure.devices.values() else "gpu"
    figure.operations = workload.product_operations(workload.product_size(platform))
    yield figure


def start(work: Workload, plan: Plan) -> Iterator[Figure]:
    """Measures the seconds from a new process to its first image, with cold and warm caches."""
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
    """Measures the peak MiB of a process that loads the model and makes one batch of images."""
    work = replace(work, batches_a_turn=1)
    for batch in plan.batches:
        figure = Figure("memory", batch, "MiB")
        for column in plan.columns:
            with _noted(figure, column), closing(Engine(column, "first", batch, work)) as engine:
                figure.rounds[column] = [engine.peak_bytes() / MIB]
        yield figure


def job(work: Workload, plan: Plan) -> Iterator[Figure]:
    """Measures images/s of `jaxdiff generate`, and of a loop over diffusers that writes PNG files.

    Both exclude loading and compiling and use the largest batch size. The share is relative to a
    bare loop over `TextToImage`, which writes nothing. The whole command's rate covers everything.
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
    """Records an engine's failure in the table, so that the others continue."""
    try:
        yield
    except EngineError as problem:
        figure.failures[column] = str(problem)


def _paired(part: str, batch: int, work: Workload, plan: Plan) -> Figure:
    """Measures the seconds of a part; starts its engines first unless they run one at a time."""
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
    """Returns the images/s of a job: from its own stage times, and for the whole command."""
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
            raise EngineError("jaxdiff generate failed")
        elapsed = time.perf_counter() - began
        seconds = json.loads((folder / "out" / "run.json").read_text())["seconds"]
    return images / (seconds["generate"] + seconds["write"]), images / elapsed
