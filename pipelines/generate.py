"""The Beam job behind `jaxdiff generate`: from a manifest to a finished dataset.

    plan      manifest -> _jaxdiff/plan
    generate  Create(shards that are not made) | Reshuffle | ParDo(GenerateShard)
    finalize  done-markers -> ledger -> card, reports, _SUCCESS

The graph is linear and its element is the number of a shard: no pixel crosses a shuffle, and no
runner is trusted with completeness. A job is complete when its files prove it.

    python -m pipelines.generate --manifest prompts.txt --output out/first
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from jaxdiff.checkpoint.ensemble import Ensemble
from jaxdiff.dataset import directory as layout
from jaxdiff.dataset import ledger, planning
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset.plan import Plan
from jaxdiff.errors import InputError
from pipelines import options, progress, worker
from pipelines.options import Job, Models

ELSEWHERE = "name another directory, or start anew with --overwrite"
EXIT_OK, EXIT_FAILED, EXIT_SOME_IMAGES_FAILED, EXIT_STOPPED = 0, 1, 3, 75


class GenerateShard(beam.DoFn):
    """Makes the shards whose numbers it is given; what it yields is only for people."""

    def __init__(self, directory: str, models: Models):
        self.directory, self.models = directory, models

    def process(self, shard: int) -> Iterator[dict]:
        """Yields what `worker.make_shard` returns."""
        yield worker.make_shard(Path(self.directory), self.models, shard)


def run(job: Job, beam_arguments: list[str]) -> int:
    """Runs a job, or continues it; returns the exit code.

    Raises:
      InputError: if the command or its input cannot be used; nothing has been written then.
      OSError: if the disk is full or refuses; the same command continues the job.
    """
    began = time.monotonic()
    beam_options = _beam_options(beam_arguments)
    try:
        ensemble = job.models.open()
        settings = job_settings.resolve(job.settings, ensemble)
        identity = planning.identify(job.manifest, settings, ensemble)
    except OSError as problem:
        raise InputError(f"{problem.filename} cannot be read: {problem.strerror}") from None
    with layout.held(job.output), _stopped_by_signals(), _full_disk_named(job.output):
        plan = _plan(job, settings, ensemble, identity)
        plan_seconds = time.monotonic() - began
        try:
            if counts := ledger.finished(job.output, plan):
                print(f"{job.output} is finished already: {_count(counts['made'], 'image')}")
                return EXIT_SOME_IMAGES_FAILED if counts["failed"] else EXIT_OK
            (job.output / layout.SUCCESS).unlink(missing_ok=True)
            _report_rejected(job, plan)
            _generate(job, plan, beam_options)
            report = ledger.finalize(job.output, plan, plan_seconds)
        except worker.StoppedError:
            _say(f"stopped; the same command continues {job.output}")
            return EXIT_STOPPED
        except ledger.IncompleteError as problem:
            _say(str(problem))
            return EXIT_FAILED
        except InputError as problem:
            if layout.has_shards(job.output):
                _say(f"{problem}; when that is mended, the same command continues")
                return EXIT_FAILED
            layout.clear(job.output)
            raise
    _summarize(job, report)
    return EXIT_SOME_IMAGES_FAILED if report["counts"]["failed"] else EXIT_OK


def _plan(job: Job, settings: job_settings.Settings, ensemble: Ensemble, identity: dict) -> Plan:
    """The directory's plan, made now if there is none."""
    if not job.overwrite and (old := plans.load(job.output)):
        if old.id == plans.digest(identity):
            _check_strict(job, old, job.output / layout.PLAN)
            return old
        why = f"holds another run ({plans.differences(old.identity, identity)})"
        if not planning.can_extend(old.identity, identity):
            raise InputError(f"--output {job.output} {why}; {ELSEWHERE}")
        try:
            return _make_plan(job, settings, ensemble, identity, (job.output, old))
        except InputError as problem:
            raise InputError(
                f"--output {job.output} {why} and cannot be extended: {problem}; {ELSEWHERE}"
            ) from None
    return _make_plan(job, settings, ensemble, identity)


def _make_plan(
    job: Job,
    settings: job_settings.Settings,
    ensemble: Ensemble,
    identity: dict,
    extended: tuple[Path, Plan] | None = None,
) -> Plan:
    folder = layout.temporary(job.output, "plan")
    models = vars(job.models.anywhere())
    try:
        plan = planning.make(
            job.manifest, settings, ensemble, identity, folder, models=models, extended=extended
        )
        _check_strict(job, plan, folder)
        if extended:
            made = len(extended[1].shard_sizes)
            _say(f"{job.output} is extended; its {_count(made, 'shard')} stay as planned")
        else:
            layout.set_aside(job.output)
        plans.store(folder, job.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return plan


def _check_strict(job: Job, plan: Plan, folder: Path) -> None:
    if job.strict and plan.rows["rejected"]:
        raise InputError(f"--strict: {_rejections(job, plan, folder)}")


def _report_rejected(job: Job, plan: Plan) -> None:
    if plan.rows["rejected"]:
        rejections = _rejections(job, plan, job.output / layout.PLAN)
        _say(f"{rejections}; see {job.output / layout.REJECTED}")


def _rejections(job: Job, plan: Plan, folder: Path) -> str:
    count = plan.rows["rejected"]
    with (folder / plan.rejected_file).open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    return (
        f"{count} of {count + plan.rows['accepted']} rows of {job.manifest} cannot be used; the "
        f"first is line {first['line']}: {first['reason']}"
    )


def _generate(job: Job, plan: Plan, beam_options: PipelineOptions) -> None:
    """Makes the shards that are not made yet."""
    todo = ledger.todo(job.output, plan)
    total = len(plan.shard_sizes)
    made = f", {total - len(todo)} of them made already" if len(todo) < total else ""
    _say(f"{_count(plan.images, 'image')} in {_count(total, 'shard')}{made}")
    if not todo:
        return
    runner = beam_options.view_as(StandardOptions).runner or FnApiRunner()
    generate_shard = GenerateShard(str(job.output.absolute()), job.models.anywhere())
    try:
        with (
            progress.shown(job.output, plan),
            beam.Pipeline(runner=runner, options=beam_options) as pipeline,
        ):
            shards = pipeline | "Shards" >> beam.Create(todo, reshuffle=False)
            _ = shards | beam.Reshuffle() | "GenerateShard" >> beam.ParDo(generate_shard)
    except Exception as failure:
        if worker.stopping.is_set():
            raise worker.StoppedError from None
        cause = failure.__context__  # what the DoFn raised, if it ran here; Beam rewrites it
        if isinstance(cause, worker.StoppedError | InputError | OSError):
            raise cause from None
        raise


def _summarize(job: Job, report: dict) -> None:
    counts, seconds = report["counts"], report["seconds"]
    stages = {"plan": "plan", "load": "load", "generate": "compile and generate"}
    stages["finalize"] = "finalize"
    print(
        f"{_count(counts['made'], 'image')} in {job.output} on {', '.join(report['devices'])}: "
        f"{report['images_per_worker_second']:.2f} images/s a worker\n"
        + ", ".join(f"{text} {seconds[stage]:.1f} s" for stage, text in stages.items())
    )
    if counts["failed"]:
        print(
            f"{_count(counts['failed'], 'image')} could not be made: {job.output / layout.FAILED}"
        )


def _beam_options(arguments: list[str]) -> PipelineOptions:
    """Beam's options; without a --runner, which may have its own, a name unknown to it is wrong."""
    beam_options = PipelineOptions(arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            known = beam_options.get_all_options()
            every = beam_options.get_all_options(retain_unknown_options=True)
    except SystemExit:
        last = (said.getvalue().splitlines() or ["they cannot be read"])[-1]
        raise InputError(f"Beam's options: {last.rpartition('error: ')[2]}") from None
    runner = beam_options.view_as(StandardOptions).runner
    if runner is None:
        for name in every:
            if name not in known:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"unknown option {option}{options.suggest(name)}")
        return beam_options
    try:
        create_runner(runner)
    except (AttributeError, ImportError, ValueError) as problem:
        raise InputError(f"--runner {runner}: {problem}") from None
    return beam_options


@contextlib.contextmanager
def _full_disk_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(directory)  # a full disk names no file
        raise


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the job after the current batch, the second at once."""
    worker.stopping.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, _) -> None:
        os.write(2, b"\njaxdiff: stopping after the current batch\n")  # print may be running
        worker.stopping.set()
        signal.signal(number, old[number])

    for number in old:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _say(message: str) -> None:
    print(f"jaxdiff: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from jaxdiff import cli

    sys.exit(cli.main(["generate", *sys.argv[1:]]))
