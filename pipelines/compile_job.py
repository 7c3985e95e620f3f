"""`jaxdiff compile`: fills a directory with a job's compiled programs. Generates nothing.

The directory is one of JAX's persistent compilation cache. Another process compiles, because this
one has no JAX.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path

from jaxdiff import cache
from jaxdiff.devices import batching, slices
from jaxdiff.errors import InputError
from jaxdiff.request import Options
from pipelines import dry_run, inputs, runners, slice_report, supervisor
from pipelines.compile_programs import Task
from pipelines.dry_run import Planned
from pipelines.generate_options import Job
from pipelines.jobs import EXIT_OK, count, is_debugging, say

CACHE = "JAX_COMPILATION_CACHE_DIR"


def run(job: Job, beam_arguments: list[str]) -> int:
    """Compiles the programs of a job; returns the exit code.

    Raises:
      InputError: if the command or its input cannot be used, or a program does not fit.
      RuntimeError: if a program cannot be compiled or written.
    """
    _, options = runners.choose(beam_arguments, job.workers.count)
    devices = supervisor.device_share(0, job.workers.count, os.environ)
    if job.target is not None:
        _check_target(job.target.name)
        devices = slice_report.DESCRIBED
    with inputs.unreadable_named():
        planned = dry_run.planned(job, options)
    directory = Path(job.output).absolute()
    if not cache.make_private(directory):
        raise InputError(
            f"--output {job.output} is no directory that you, and nobody else, can write to; name "
            "a new one"
        )
    task = _task(job, planned)
    where = task.target or "the devices here"
    say(f"compiling for {where}; a large model takes many minutes")
    buckets = [*planned.shares]
    with contextlib.closing(_compiled(task, directory, devices)) as programs:
        for found in programs:
            title = slice_report.fitting(where, buckets[found["bucket"]], task.options, found)
            print(f"{title}: {found['what']}, {found['seconds']:.1f} s", flush=True)
    sizes = [path.stat().st_size for path in _programs(directory)]
    print(f"{job.output} has {count(len(sizes), 'program')}, {sum(sizes) / 2**20:.1f} MiB")
    fixed = ""
    if task.batch_size != planned.settings.batch_size:
        fixed = f" and --batch-size {task.batch_size}"
    print(f"run jaxdiff generate with {CACHE}={directory}{fixed}")
    return EXIT_OK


def _check_target(name: str) -> None:
    """Raises InputError if programs for a target cannot be compiled, or not used there."""
    where = slices.parse(name)
    if where.chip.gpu is not None:
        raise InputError(
            f"--target {name}: programs for GPUs are tuned by running them; leave it out, and run "
            "this on a machine with such a GPU"
        )
    slice_report.check_compiler(where)


def _task(job: Job, planned: Planned) -> Task:
    settings, buckets = planned.settings, planned.counted()
    sizes, batch_size = planned.plan.shard_sizes, settings.batch_size
    if job.target is not None and batch_size == batching.AUTO:
        batch_size = 1
        if planned.ensemble.samples:
            batch_size = slice_report.largest_batch_size(
                job, settings, planned.ensemble, buckets, sizes
            )
    return Task(
        models=asdict(job.models),
        options={field.name: getattr(settings, field.name) for field in fields(Options)},
        rows=[each.example for each in buckets],
        most=[min(each.images, max(sizes)) for each in buckets],
        target=None if job.target is None else job.target.name,
        batch_size=batch_size,
    )


def _compiled(task: Task, directory: Path, devices: Mapping[str, str]) -> Iterator[dict]:
    """Runs `compile_programs` in a process of its own, and yields what it tells of each program.

    If it is stopped, the program that was being compiled leaves nothing behind.

    Args:
      directory: where the programs are kept.
      devices: environment variables that decide for which devices they are.

    Raises:
      InputError: if it refuses.
      RuntimeError: if a program cannot be compiled or written.
    """
    kept = {
        CACHE: str(directory),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    finished = {*_programs(directory)}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "pipelines.compile_programs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if is_debugging() else subprocess.DEVNULL,  # libtpu says much
        env=slice_report.environment({**devices, **kept}),
        encoding="utf-8",
    ) as process:
        try:
            process.stdin.write(json.dumps(asdict(task)))
            process.stdin.close()
            for line in process.stdout:
                found = json.loads(line)
                if "refused" in found:
                    raise InputError(found["refused"])
                if "failed" in found:
                    raise RuntimeError(found["failed"])
                yield found
                finished = {*_programs(directory)}
            if process.wait():
                raise RuntimeError("a program cannot be compiled")
        except BaseException:
            process.kill()
            process.wait()
            for path in {*_programs(directory)} - finished:  # JAX never replaces a broken one
                path.unlink(missing_ok=True)
            raise


def _programs(directory: Path) -> Iterator[Path]:
    return directory.glob("*-cache")
