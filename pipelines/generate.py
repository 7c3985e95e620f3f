"""The Beam job behind `jaxdiff generate`: from a manifest to a finished dataset.

    plan      manifest -> _jaxdiff/plan
    generate  Create(missing shards) | Reshuffle | ParDo(GenerateShard)
    finalize  done-markers -> ledger -> card, reports, _SUCCESS

The graph is linear and its elements are shard numbers: no pixel crosses a shuffle, and no runner is
trusted with completeness. A job is complete when its files prove it.

    python -m pipelines.generate --manifest prompts.txt --output out/first
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult, PipelineRunner

from jaxdiff.dataset import ledger, names, planning
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.manifest import notices
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.run import Run
from jaxdiff.errors import InputError
from jaxdiff.families.ensemble import Ensemble
from pipelines import (
    command_line,
    dry_run,
    generate_options,
    inputs,
    jobs,
    progress,
    runners,
    supervisor,
)
from pipelines.generate_options import Job, Models, Workers
from pipelines.jobs import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_SOME_IMAGES_FAILED,
    EXIT_STOPPED,
    StoppedError,
    stopped_by_signals,
)
from pipelines.worker import Task

ELSEWHERE = "name another directory, or start over with --overwrite"
NAMESPACE = "jaxdiff"  # of the metrics


class GenerateShard(beam.DoFn):
    """Asks a worker to make each shard; yields statistics.

    Args:
      mode: as in `worker.Task`.
    """

    def __init__(self, run: Run, models: Models, workers: Workers, mode: str):
        self.directory, self.models = str(run.directory.absolute()), models
        self.workers, self.mode = workers, mode
        self.rejected = run.plan.rows["rejected"]
        self.last = run.shards[-1]  # rejected rows are counted with this shard

    def process(self, shard: int) -> Iterator[dict]:
        """Yields the result of `worker.make_shard`, and adds it to Beam's metrics."""
        task = Task(
            self.directory, vars(self.models), shard, self.mode, profile=self.workers.profile
        )
        done = supervisor.make_shard(task, self.workers)
        for name, value in done.items():
            if isinstance(value, int):
                Metrics.counter(NAMESPACE, name).inc(value)
            else:
                Metrics.counter(NAMESPACE, f"{name}_ms").inc(round(1000 * value))
        if shard == self.last:
            Metrics.counter(NAMESPACE, "rejected").inc(self.rejected)
        yield {"shard": shard, **done}


def run(job: Job, beam_arguments: list[str]) -> int:
    """Runs a job, or continues it; returns the exit code.

    Raises:
      InputError: if the command or its input cannot be used; nothing has been written.
      OSError: if the disk is full or a write fails; running the same command again continues.
    """
    began = time.monotonic()
    beam_runner = runners.choose(beam_arguments, job.workers.count)
    supervisor.device_share(0, job.workers.count, os.environ)  # fails before anything is written
    copies = contextlib.ExitStack()
    if job.dry_run:
        with _unreadable_named():
            said = dry_run.report(job, beam_runner[1])
        print(said)
        return EXIT_OK
    with _unreadable_named():
        ensemble = job.models.open()
        settings = job_settings.resolve(job.settings, ensemble)
        manifest = copies.enter_context(inputs.fetched(job.manifest, beam_runner[1]))
        identity = planning.identify(manifest, settings, ensemble)
    store = LocalStore(job.output)
    with copies, store.held(), stopped_by_signals(), _full_disk_named(job.output):
        dataset = _planned(job, manifest, settings, ensemble, identity)
        copies.close()
        try:
            counts = _finish(job, dataset, beam_runner, time.monotonic() - began)
        except StoppedError:
            _say(f"stopped; run the same command to continue {job.output}")
            return EXIT_STOPPED
        except (ledger.IncompleteError, supervisor.WorkerError) as problem:
            _say(str(problem))
            return EXIT_FAILED
        except InputError as problem:
            if store.has_shards():
                _say(f"{problem}; fix this, then run the same command again")
                return EXIT_FAILED
            store.clear()
            raise
    return EXIT_SOME_IMAGES_FAILED if counts["failed"] else EXIT_OK


def _finish(
    job: Job,
    dataset: Run,
    beam_runner: tuple[PipelineRunner, PipelineOptions],
    plan_seconds: float,
) -> dict[str, int]:
    """Generates what is missing and writes the reports; returns the counts."""
    ledger.settle(dataset)
    ledger.refuse_damaged(dataset)
    counts = ledger.finished(dataset)
    if counts and not (job.retry_failed and counts["failed"]):
        print(f"{job.output} is already finished: {_count(counts['made'], 'image')}")
        return counts
    todo = ledger.todo(dataset)
    if todo or counts:  # else only reports are missing: it stays the root until they are there
        dataset.store.path(names.SUCCESS).unlink(missing_ok=True)
    _report_plan(job, dataset)
    shards = partial(GenerateShard, dataset, job.models.anywhere(), job.workers)
    make_shards(shards("make"), dataset.plan, todo, beam_runner)
    if job.retry_failed:
        ledger.settle(dataset)
        failed = ledger.with_failed(dataset)
        make_shards(shards("retry"), dataset.plan, failed, beam_runner)
    report = ledger.finalize(dataset, plan_seconds)
    _summarize(job, report)
    return report["counts"]


def _planned(
    job: Job,
    manifest: Manifest,
    settings: job_settings.Settings,
    ensemble: Ensemble,
    identity: dict,
) -> Run:
    """Returns the directory's run; plans it if there is none."""
    old = _old_run(job)
    # Even with --overwrite, the same command continues until the job is finished.
    goes_on = not job.overwrite or not (job.output / names.SUCCESS).exists()
    if old and old.plan.id == plans.digest(identity) and goes_on:
        _check_strict(job, old.plan, job.output / names.PLAN)
        return old
    if old and not job.overwrite:
        why = f"holds another run ({plans.differences(old.plan.identity, identity)})"
        if not planning.can_extend(old.plan.identity, identity):
            raise InputError(f"--output {job.output} {why}; {ELSEWHERE}")
        ledger.refuse_damaged(old)
        try:
            return _make_plan(job, manifest, settings, ensemble, identity, old)
        except InputError as problem:
            raise InputError(
                f"--output {job.output} {why} and cannot be extended: {problem}; {ELSEWHERE}"
            ) from None
    return _make_plan(job, manifest, settings, ensemble, identity)


def _old_run(job: Job) -> Run | None:
    try:
        return runs.find(job.output)
    except InputError:
        if job.overwrite:
            return None
        raise


def _make_plan(
    job: Job,
    manifest: Manifest,
    settings: job_settings.Settings,
    ensemble: Ensemble,
    identity: dict,
    extended: Run | None = None,
) -> Run:
    store = LocalStore(job.output)
    folder = store.scratch("plan")
    models = job.models.anywhere().planned()
    try:
        plan = planning.make(
            manifest,
            settings,
            ensemble,
            identity,
            folder,
            models=models,
            image_root=job.image_root,
            extended=extended,
        )
        _check_strict(job, plan, folder)
        if extended:
            kept = _count(len(extended.shards), "shard")
            _say(f"{job.output} is extended; its {kept} will not change")
        else:
            store.set_aside()
        return runs.begin(folder, store)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_strict(job: Job, plan: Plan, folder: Path) -> None:
    if job.strict and plan.rows["rejected"]:
        raise InputError(f"--strict: {_rejections(job, plan, folder)}")
    for kind, text in plan.notices.items():
        if job.strict and kind != notices.COPIED:
            raise InputError(f"--strict: {kind}: {text}")


def _report_plan(job: Job, dataset: Run) -> None:
    """Prints which rows cannot be used, and what the plan does that may not be expected."""
    if dataset.plan.rows["rejected"]:
        rejections = _rejections(job, dataset.plan, job.output / names.PLAN)
        _say(f"{rejections}; see {job.output / names.REJECTED}")
    for kind, text in dataset.plan.notices.items():
        _say(f"{kind}: {text}")


def _rejections(job: Job, plan: Plan, folder: Path) -> str:
    count = plan.rows["rejected"]
    with (folder / plan.rejected_file).open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    where = f" of {first['file']}" if first["file"] != job.manifest else ""
    return (
        f"{count} of {count + plan.rows['accepted']} rows of {job.manifest} cannot be used; "
        f"first: line {first['line']}{where}: {first['reason']}"
    )


def make_shards(
    generate_shard: GenerateShard,
    plan: Plan,
    todo: list[int],
    beam_runner: tuple[PipelineRunner, PipelineOptions],
) -> PipelineResult | None:
    """Runs the Beam job for the shards in `todo`; returns its result, with the metrics.

    Raises:
      StoppedError, InputError, OSError, WorkerError: as in `supervisor.make_shard`.
    """
    if not todo:
        return None
    runner, beam_options = beam_runner
    shown, total = contextlib.nullcontext(), len(plan.shard_sizes)
    if generate_shard.mode == "make":
        shown = progress.shown(Run(LocalStore(Path(generate_shard.directory)), plan))
        made = f", {total - len(todo)} of them already made" if len(todo) < total else ""
        _say(f"{_count(plan.images, 'image')} in {_count(total, 'shard')}{made}")
    else:
        _say(f"{_count(len(todo), 'shard')} of {total} to {generate_shard.mode}")
    try:
        with (
            shown,
            jobs.failures_raised(),
            supervisor.closed_afterwards(),
            beam.Pipeline(runner=runner, options=beam_options) as pipeline,
        ):
            shards = pipeline | "Shards" >> beam.Create(todo, reshuffle=False)
            _ = shards | beam.Reshuffle() | "GenerateShard" >> beam.ParDo(generate_shard)
        return pipeline.result
    except (StoppedError, InputError, OSError, supervisor.WorkerError):
        raise
    except Exception as failure:  # on a cluster, which reports a worker's error as text
        *_, last = str(failure).splitlines() or [type(failure).__name__]
        raise supervisor.WorkerError(last.partition(" [while running")[0]) from failure


def _summarize(job: Job, report: dict) -> None:
    counts, seconds = report["counts"], report["seconds"]
    stages = ("plan", "load", "compile", "generate", "finalize")
    print(
        f"{_count(counts['made'], 'image')} in {job.output} on {', '.join(report['devices'])}: "
        f"{report['images_per_worker_second'] or 0:.2f} images/s per worker\n"
        + ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in stages)
    )
    if counts["failed"]:
        print(
            f"{_count(counts['failed'], 'image')} could not be generated; see "
            f"{job.output / names.FAILED}"
        )


@contextlib.contextmanager
def _unreadable_named() -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        name = problem.filename or "the input"
        raise InputError(f"{name} cannot be read: {problem.strerror}") from None


@contextlib.contextmanager
def _full_disk_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(directory)  # a full disk names no file
        raise


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _say(message: str) -> None:
    print(f"jaxdiff: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(command_line.run(lambda said: run(*generate_options.parse(said)), sys.argv[1:]))
