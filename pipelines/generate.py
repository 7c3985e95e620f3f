"""The job behind `jaxdiff generate`: from a manifest to a finished dataset.

    plan      manifest -> _jaxdiff/plan
    generate  missing shards -> data, done-markers: the Beam job of `shard_job`
    finalize  done-markers -> ledger -> card, reports, _SUCCESS

Several processes may run it on one output: see `processes`.

    python -m pipelines.generate --manifest prompts.txt --output out/first
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineRunner

from jaxdiff.dataset import ledger, names, planning
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import run as runs
from jaxdiff.dataset import settings as job_settings
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.manifest import notices
from jaxdiff.dataset.manifest.manifest import Manifest
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.store import Lock, Store, is_address, open_store
from jaxdiff.errors import InputError, UnfinishedError
from jaxdiff.families.ensemble import Ensemble
from pipelines import (
    command_line,
    dry_run,
    generate_options,
    inputs,
    jobs,
    processes,
    runners,
    supervisor,
)
from pipelines.generate_options import Job
from pipelines.jobs import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_SOME_IMAGES_FAILED,
    EXIT_STOPPED,
    StoppedError,
    count,
    say,
    stopped_by_signals,
)
from pipelines.shard_job import GenerateShard, make_shards


def run(job: Job, beam_arguments: list[str]) -> int:
    """Runs a job, or continues it; returns the exit code.

    Raises:
      InputError: if the command or its input cannot be used; nothing has been written.
      OSError: if the disk is full or a write fails; running the same command again continues.
    """
    beam_runner = runners.choose(beam_arguments, job.workers.count)
    supervisor.device_share(0, job.workers.count, os.environ)  # fails before anything is written
    with inputs.unreadable_named():
        if _is_missing(job, beam_runner[1]):
            print(f"{job.manifest} does not exist: nothing to do")
            return EXIT_OK
    if job.dry_run:
        try:
            with inputs.unreadable_named():
                said = dry_run.report(job, beam_runner[1])
        except supervisor.WorkerError as problem:
            say(str(problem))
            return EXIT_FAILED
        print(said)
        return EXIT_OK
    try:
        counts = make(job, beam_runner)
    except StoppedError:
        say(f"stopped; run the same command to continue {job.output}")
        return EXIT_STOPPED
    except UnfinishedError as problem:
        say(str(problem))
        return EXIT_FAILED
    return EXIT_SOME_IMAGES_FAILED if counts["failed"] else EXIT_OK


def make(job: Job, beam_runner: tuple[PipelineRunner, PipelineOptions]) -> dict[str, int]:
    """Makes a job's dataset, or what is missing of it; returns its counts, as `ledger.verify` does.

    Raises:
      InputError: if the job or its input cannot be used; nothing has been written.
      OSError: if the disk is full or a write fails.
      StoppedError: if it was stopped.
      UnfinishedError: if it failed part-way in another way. After this and the two before it,
        making the same job again continues it.
    """
    began, copies = time.monotonic(), contextlib.ExitStack()
    with inputs.unreadable_named():
        ensemble, settings = opened(job)
        fetched = inputs.fetched(
            job.manifest, beam_runner[1], content=job.content, prompts=job.prompts
        )
        manifest = copies.enter_context(fetched)
        identity = planning.identify(manifest, settings, ensemble)
    store = open_store(job.output)
    waiting = None if job.overwrite or job.retry_failed else _waiting(job)
    try:
        with (
            copies,
            stopped_by_signals(),
            store.held(waiting) as lock,
            _full_disk_named(store.address),
        ):
            dataset = _planned(job, manifest, settings, ensemble, identity, lock)
            copies.close()
            try:
                return _finish(job, dataset, lock, beam_runner, time.monotonic() - began)
            except InputError as problem:
                if not store.has_shards() and lock.try_alone():
                    store.clear()
                    raise
                again = f"{problem}; fix this, then run the same command again"
                raise UnfinishedError(again) from None
    except (ledger.IncompleteError, supervisor.WorkerError) as problem:
        raise UnfinishedError(str(problem)) from problem


def opened(job: Job) -> tuple[Ensemble, job_settings.Settings]:
    """Opens a job's models and completes its settings; raises InputError if that is impossible."""
    ensemble = job.models.open()
    settings = job_settings.resolve(job.settings, ensemble)
    _check_bucket(job, settings)
    return ensemble, settings


def _is_missing(job: Job, options: PipelineOptions) -> bool:
    """Returns whether there is no manifest, and the job is to be skipped then."""
    return job.if_missing == "skip" and not job.prompts and not inputs.exists(job.manifest, options)


def _check_bucket(job: Job, settings: job_settings.Settings) -> None:
    """Raises InputError for what cannot be done in a bucket."""
    if is_address(job.output) and job.overwrite:
        raise InputError(f"--overwrite: {job.output} is in a bucket; name a new prefix instead")
    if is_address(job.output) and settings.format == "imagefolder":
        raise InputError(
            "--format imagefolder makes an object of each image, which is slow in a bucket; use "
            "webdataset or parquet"
        )


def _waiting(job: Job) -> Callable[[], None]:
    """Returns what to do while other processes plan or finish the dataset."""
    said = []

    def waiting() -> None:
        if jobs.stopping.is_set():
            raise StoppedError
        if not said:
            said.append(f"waiting for another process, which is working on {job.output}")
            say(*said)

    return waiting


def _finish(
    job: Job,
    dataset: Run,
    lock: Lock,
    beam_runner: tuple[PipelineRunner, PipelineOptions],
    plan_seconds: float,
) -> dict[str, int]:
    """Generates what is missing and writes the reports; returns the counts."""
    ledger.settle(dataset)
    was_finished = not dataset.store.kind(names.SUCCESS)
    there = dataset.snapshot() if was_finished else dataset
    ledger.refuse_damaged(there)
    counts = ledger.finished(there)
    if counts and not (job.retry_failed and counts["failed"]):
        print(f"{job.output} is already finished: {count(counts['made'], 'image')}")
        return counts
    todo = ledger.todo(dataset)
    if was_finished and (todo or counts):  # else only reports are missing, and it stays the root
        dataset.store.delete(names.SUCCESS, names.REPORT)
    _report_plan(dataset)
    _report_todo(dataset, todo)
    how = partial(GenerateShard, dataset, job.models.anywhere(), job.workers)
    is_first = lock.is_first
    with supervisor.closed_afterwards():
        if job.retry_failed:
            make_shards(how("make"), dataset.plan, todo, beam_runner)
            ledger.settle(dataset)
            make_shards(how("retry"), dataset.plan, ledger.with_failed(dataset), beam_runner)
        else:
            lock.share()
            _make_all(how("make"), dataset, todo, beam_runner, is_first)
    if not job.retry_failed and (counts := ledger.finished(dataset)):
        print(f"{job.output} was finished by another process: {count(counts['made'], 'image')}")
        return counts
    report = ledger.finalize(dataset, plan_seconds)
    _summarize(job, dataset, todo, report)
    return report["counts"]


def _make_all(
    generate_shard: GenerateShard,
    dataset: Run,
    todo: list[int],
    beam_runner: tuple[PipelineRunner, PipelineOptions],
    is_first: bool,
) -> None:
    """Makes the shards in `todo`, along with other processes if there are any."""
    place = processes.place(os.environ)
    if place is None:
        order = todo if is_first else processes.shuffled(todo)
        make_shards(generate_shard, dataset.plan, order, beam_runner)
        return
    part = place.first(todo)
    while part:
        make_shards(generate_shard, dataset.plan, part, beam_runner)
        todo, before = ledger.todo(dataset), todo
        if todo == before:
            return  # a runner that lost them: `finalize` says so
        part = place.next(todo)


def _planned(
    job: Job,
    manifest: Manifest,
    settings: job_settings.Settings,
    ensemble: Ensemble,
    identity: dict,
    lock: Lock,
) -> Run:
    """Returns the directory's run; plans it if there is none."""
    store = open_store(job.output)
    old = _old_run(job, store)
    elsewhere = "name another directory, or start over with --overwrite"
    if is_address(job.output):
        elsewhere = "name another prefix"
    # Even with --overwrite, the same command continues until the job is finished.
    goes_on = not job.overwrite or bool(store.kind(names.SUCCESS))
    if old and old.plan.id == plans.digest(identity) and goes_on:
        with _rejected(old) as file:
            _check_strict(job.strict, old.plan, file)
        return old
    if old and not job.overwrite:
        why = f"holds another run ({plans.differences(old.plan.identity, identity)})"
        if not planning.can_extend(old.plan.identity, identity):
            raise InputError(f"--output {job.output} {why}; {elsewhere}")
        if not lock.is_alone:
            raise InputError(f"--output {job.output} {why}, which others are making; wait for them")
        ledger.refuse_damaged(old)
        try:
            return _make_plan(job, manifest, settings, ensemble, identity, old)
        except InputError as problem:
            raise InputError(
                f"--output {job.output} {why} and cannot be extended: {problem}; {elsewhere}"
            ) from None
    made = _make_plan(job, manifest, settings, ensemble, identity)
    if made.plan.id != plans.digest(identity):  # in a bucket, another process was first
        why = plans.differences(made.plan.identity, identity)
        raise InputError(f"--output {job.output} holds another run ({why}); {elsewhere}")
    return made


def _old_run(job: Job, store: Store) -> Run | None:
    try:
        return runs.find(store)
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
    store = open_store(job.output)
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
        with (folder / plan.rejected_file).open("rb") as file:
            _check_strict(job.strict, plan, file)
        if extended:
            kept = count(len(extended.shards), "shard")
            say(f"{job.output} is extended; its {kept} will not change")
        return runs.begin(folder, store, extended)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rejected(dataset: Run) -> BinaryIO:
    return dataset.store.open(f"{names.PLAN}/{dataset.plan.rejected_file}")


def _check_strict(strict: bool, plan: Plan, rejected: BinaryIO) -> None:
    if strict and plan.rows["rejected"]:
        raise InputError(f"--strict: {_rejections(plan, rejected)}")
    for kind, text in plan.notices.items():
        if strict and kind != notices.COPIED:
            raise InputError(f"--strict: {kind}: {text}")


def _report_plan(dataset: Run) -> None:
    """Prints which rows cannot be used, and what the plan does that may not be expected."""
    if dataset.plan.rows["rejected"]:
        with _rejected(dataset) as file:
            rejections = _rejections(dataset.plan, file)
        say(f"{rejections}; see {dataset.address}/{names.REJECTED}")
    for kind, text in dataset.plan.notices.items():
        say(f"{kind}: {text}")


def _report_todo(dataset: Run, todo: list[int]) -> None:
    total = len(dataset.shards)
    made = f", {total - len(todo)} of them already made" if len(todo) < total else ""
    if todo:
        say(f"{count(dataset.plan.images, 'image')} in {count(total, 'shard')}{made}")


def _rejections(plan: Plan, rejected: BinaryIO) -> str:
    number = plan.rows["rejected"]
    first = json.loads(rejected.readline())
    where = f" of {first['file']}" if first["file"] != plan.manifest else ""
    return (
        f"{number} of {number + plan.rows['accepted']} rows of {plan.manifest} cannot be used; "
        f"first: line {first['line']}{where}: {first['reason']}"
    )


def _summarize(job: Job, dataset: Run, todo: list[int], report: dict) -> None:
    """Prints what was made and how long it took, also by this run alone if others began it."""
    counts, whole, label = report["counts"], report, ""
    ends = {stage: report["seconds"][stage] for stage in ("plan", "finalize")}
    if len(todo) < len(dataset.shards):
        markers = [shards.read_marker(dataset, shard) for shard in dataset.shards]
        whole, label = ledger.spent(markers), "all runs: "
        if todo and not job.retry_failed and processes.place(os.environ) is None:
            this = ledger.spent([markers[shard] for shard in todo])
            this["seconds"] |= ends
            print(f"this run: {count(this['made'], 'image')}{_costs(this)}")
    print(f"{label}{count(counts['made'], 'image')} in {job.output}{_costs(whole)}")
    if counts["failed"]:
        print(
            f"{count(counts['failed'], 'image')} could not be generated; see "
            f"{job.output}/{names.FAILED}"
        )


def _costs(spent: dict) -> str:
    """Returns the end of a summary line, and a line of the seconds by stage."""
    stages = ("plan", "load", "compile", "generate", "finalize")
    seconds = {stage: spent["seconds"][stage] for stage in stages if stage in spent["seconds"]}
    return (
        f" on {', '.join(spent['devices'])}: "
        f"{spent['images_per_worker_second'] or 0:.2f} images/s per worker\n"
        + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    )


@contextlib.contextmanager
def _full_disk_named(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or address  # a full disk names no file
        raise


if __name__ == "__main__":
    sys.exit(command_line.run(lambda said: run(*generate_options.parse(said)), sys.argv[1:]))
