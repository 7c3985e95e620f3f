"""Checks from its files alone whether a dataset is complete and correct.

It is if: rows = blank + rejected + accepted; planned images = made + failed; made = images in the
shards = rows marked "made" in the metadata; every record is as planned; every file has the hash in
its shard's done-marker; and `_SUCCESS`, the root of the proof, records all of it (`proof`).
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff.dataset import contents, names, paths, proof
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.finished import card
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.proof import Root
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.dataset.store import is_address, open_store, scheme
from jaxdiff.errors import InputError

REPORTS = (names.SUCCESS, *proof.REPORTS)
FETCHED_AT_ONCE = 4  # shards of a bucket
MOST_THREADS = 16  # each has a shard's metadata in memory
TIMES = ("finished", "seconds", "images_per_worker_second")  # in the report


class IncompleteError(Exception):
    """The dataset cannot be finished; the message gives the reason, on one line."""


def todo(run: Run) -> list[int]:
    """Returns the unfinished shards, from a listing of the done-markers."""
    there = shards.revisions(run)
    return [shard for shard in run.shards if shard not in there]


def with_failed(run: Run) -> list[int]:
    """Returns the shards with failed images; raises InputError if a done-marker is damaged."""
    markers = _markers(run.snapshot())
    return [shard for shard, marker in enumerate(markers) if marker and marker.failed]


def settle(run: Run) -> None:
    """Cleans up after a dead job: publishes its finished shards and deletes its other files.

    Raises:
      InputError: if a done-marker is damaged, or the plan, which cannot be repaired.
    """
    check_plan(run)
    if run.store.renames:  # else no marker needs to be read
        for marker in filter(None, _markers(run)):
            shards.publish(run, marker)
    run.store.sweep()


def _markers(run: Run) -> list[shards.Marker | None]:
    try:
        return [shards.read_marker(run, n) for n in run.shards]
    except ValueError as problem:
        raise InputError(f"{run.address}: {problem}; {_mend(run)}") from None


def _mend(run: Run) -> str:
    return f"run `jaxdiff verify {run.address} --repair` to generate it again"


def finished(run: Run) -> dict[str, int] | None:
    """Returns the counts of a finished dataset whose files all exist with their size, else None.

    Raises:
      InputError: if a done-marker is damaged.
    """
    if any(run.store.kind(name) for name in REPORTS):
        return None
    run = run.snapshot()
    markers = _markers(run)
    if None in markers:
        return None
    if any(
        shards.why_not(run, marker, name, "size") for marker in markers for name in marker.files
    ):
        return None
    return _counts(run.plan, markers)


def refuse_damaged(run: Run) -> None:
    """Refuses to continue a finished dataset that is not what its `_SUCCESS` records.

    For what changes a dataset and then writes `_SUCCESS` anew, which must not vouch for files that
    somebody has changed. Done-markers and reports may be missing: they are made again.

    Raises:
      InputError: names the first difference.
    """
    root = proof.required(run.store)
    if root is None:
        return
    run = run.snapshot()
    markers = _markers(run)
    problems = [*_check_plan(run)] or [*proof.differences_of_pins_and_markers(root, run)]
    if root.contents is None and None not in markers:
        problems += proof.differences(root, _root(run, markers))
    problems += (
        f"{name} {why}"
        for marker in filter(None, markers)
        for name in marker.files
        if (why := shards.why_not(run, marker, name, "size"))
    )
    if problems:
        raise InputError(f"{run.address}: {problems[0]}; {_mend(run)}")


def finalize(run: Run, plan_seconds: float, root: Root | None = None) -> dict:
    """Checks the shards, writes the card and the reports, and `_SUCCESS` last; may be repeated.

    Args:
      plan_seconds: how long planning took, for the report.
      root: what `_SUCCESS` recorded, if `run.json` may stay where it still is the one recorded.

    Returns:
      The content of a new `run.json`.

    Raises:
      IncompleteError: if a shard is missing or does not match its marker, or the plan is another.
    """
    began = time.monotonic()
    if open_run(run.store).plan.id != run.plan.id:
        raise IncompleteError(f"{run.address}: another process replaced the plan")
    settle(run)
    run.tidy()
    store, run = run.store, _swept(run)
    markers = _markers(run)
    folders = (names.DATA, names.METADATA, names.DONE)  # other files of a user may stay elsewhere
    if problems := [*_unfinished(run), *_check_shards(run), *proof.strays(run, markers, folders)]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompleteError(f"{run.address}: {problems[0]}{more}")
    counts = _counts(run.plan, markers)
    for name, content in _reports(run, markers).items():
        store.swap(name, content)
    report = _report(run.plan, markers, counts)
    seconds = report["seconds"] | {"plan": plan_seconds, "finalize": time.monotonic() - began}
    report["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    if not (store.kind(names.REPORT) == "is missing" or _has_report(run, report, root)):
        store.delete(names.REPORT)  # an old one: never what another process has just written
    # Of several processes that finish the dataset, one writes the report that all vouch for.
    store.claim(names.REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    store.swap(names.SUCCESS, str(_root(run, markers)))
    store.sweep()
    return report


def _swept(run: Run) -> Run:
    """Deletes files of attempts that were not the first; returns a snapshot without any.

    The name of such a file has its attempt's revision, and the done-marker of that revision is
    there: so no attempt that is still running will name it.
    """
    now = run.snapshot()
    while lost := _lost(now):  # attempts that are still running may upload more
        run.store.delete(*lost)
        now = run.snapshot()
    return now


def _lost(run: Run) -> list[str]:
    last = {marker.shard: marker for marker in filter(None, _markers(run))}
    lost = []
    for folder in (names.DATA, names.METADATA):
        for entry in run.store.entries(folder):
            match, name = names.HASHED.fullmatch(entry), f"{folder}/{entry}"
            marker = match and last.get(int(match["shard"]))
            if marker and name not in marker.files and int(match["again"] or 0) <= marker.revision:
                lost.append(name)
    return lost


def _has_report(run: Run, report: dict, root: Root | None) -> bool:
    """Returns whether `run.json` is the root's; without one, whether it differs in times only."""
    if root:
        return proof.has_its_report(root, run)
    try:
        old = json.loads(run.store.read(names.REPORT))
        return all(old[name] == report[name] for name in report if name not in TIMES)
    except (KeyError, RecursionError, TypeError, ValueError):
        return False


def verify(
    where: str | Path,
    check_shards: Callable[[Run], Iterable[str]] = lambda run: _check_shards(run, deep=True),
) -> tuple[dict[str, int], list[str]]:
    """Checks a finished dataset from its files alone, with every pixel in lossless formats.

    Args:
      check_shards: returns what `check_shard` says of each shard, in their order.

    Returns:
      The counts, and the problems, one line each; empty if there are none.

    Raises:
      InputError: if there is no jaxdiff run in the directory, or its plan cannot be used.
    """
    store = open_store(where)
    if problems := list(proof.misplaced_folders(store)):
        return {}, problems
    run = open_run(store).snapshot()
    if problems := [*_check_plan(run)] or [*_check_rows(run)]:
        return {}, problems
    if problems := [*_unfinished(run), *check_shards(run)]:
        return {}, problems
    markers = _markers(run)
    if problems := [*proof.strays(run, markers)]:
        return {}, problems
    return _counts(run.plan, markers), list(_check_root(run, markers))


def broken(run: Run) -> list[int]:
    """Returns the finished shards that do not match their markers or the plan.

    Raises:
      InputError: if a done-marker is damaged.
    """
    return [
        shard
        for shard, marker in enumerate(_markers(run))
        if marker and any(check_shard(run, shard, deep=True))
    ]


def disagreement(run: Run, root: Root) -> str | None:
    """Returns why the root of a repaired dataset may not be written anew, or None if it may."""
    markers = _markers(run)
    if None in markers:
        return None  # `finalize` says so
    reports = {name: proof.digest(text) for name, text in _reports(run, markers).items()}
    return proof.disagreement(root, _root(run, markers), reports)


def check_plan(run: Run) -> None:
    """Raises InputError if the plan is damaged: then nothing can be made again."""
    if problem := next(_check_plan(run), None):
        raise InputError(
            f"{run.address}: {problem}; this cannot be repaired: start a new run in another "
            "directory"
        )


def _check_plan(run: Run) -> Iterator[str]:
    with contextlib.suppress(ValueError):  # others say so
        root = proof.read(run.store)
        if root and (problem := proof.plan_problem(root, run)):
            yield problem
    if {*run.plan.sha256} != {run.plan.images_file, run.plan.rejected_file}:
        yield f"{names.PLAN_FILE} does not name its own files"
        return
    for name, digest in run.plan.sha256.items():
        if why := run.store.kind(f"{names.PLAN}/{name}"):
            yield f"{names.PLAN}/{name} {why}"
        elif run.store.digest(f"{names.PLAN}/{name}") != digest:
            yield f"{names.PLAN}/{name} has changed since the job was planned"


def _check_rows(run: Run) -> Iterator[str]:
    """Checks the numbers in `plan.json` against the plan's other files."""
    images, first, rows = 0, 0, run.plan.rows
    try:
        with run.open_images() as file:
            for batch in file.iter_batches(columns=["image_index"]):
                images += len(batch)
                first += pc.sum(pc.equal(batch["image_index"], 0)).as_py()
    except contents.UNREADABLE as problem:
        yield f"{names.PLAN}/{run.plan.images_file}: {contents.reason_of(problem)}"
        return
    for what, said, found in (
        ("images", run.plan.images, images),
        ("accepted rows", rows["accepted"], first),  # each of which has a first image
        ("rejected rows", rows["rejected"], run.rejected().count("\n")),
    ):
        if said != found:
            yield f"{names.PLAN_FILE} says {said} {what}, but its files have {found}"


def _check_shards(run: Run, deep: bool = False) -> Iterator[str]:
    if not deep:
        for shard in run.shards:
            yield from check_shard(run, shard)
        return
    # On a disk, decoding images takes most of the time; it and hashing release the GIL.
    count = FETCHED_AT_ONCE if is_address(run.address) else min(os.cpu_count(), MOST_THREADS)
    with ThreadPoolExecutor(count) as threads:
        for problems in threads.map(lambda shard: [*check_shard(run, shard, True)], run.shards):
            yield from problems


def _unfinished(run: Run) -> Iterator[str]:
    """Yields one line if shards are missing."""
    if missing := todo(run):
        total, how = len(run.shards), "run the same generate command to finish"
        if len(missing) == 1:
            yield f"shard {missing[0]} of {total} is not finished; {how} it"
        else:
            yield f"{len(missing)} of {total} shards are not finished; {how} them"


def check_shard(run: Run, shard: int, deep: bool = False) -> Iterator[str]:
    """Yields how a shard's bytes differ from what its marker names; if `deep`, also its images.

    There is nothing to check in a shard that is not finished.
    """
    try:
        markers = shards.read_markers(run, shard)
    except ValueError as problem:
        yield f"{problem}; {_mend(run)}"
        return
    if not markers:
        return  # `_unfinished` says so
    marker = markers[-1]
    with run.store.fetched(*marker.files) if deep else contextlib.nullcontext() as local:
        here = Run(local, run.plan) if deep else run
        wrong = {name: shards.why_not(here, marker, name, "etag") for name in marker.files}
        images_name, within = marker.images_name, []
        if deep and not wrong[marker.metadata_name]:
            path = local.path(images_name)
            if not paths.wrong_kind_within(path, run.is_folder(images_name)):
                within = [*contents.problems(run, marker, local)]
        if within and wrong[images_name]:  # one problem, and where it is
            more = f", and {len(within) - 1} more" if len(within) > 1 else ""
            first, within = within[0].removeprefix(f"{images_name}: "), []
            wrong[images_name] += f" ({first}{more})"
        yield from (f"{name} {why}; {_mend(run)}" for name, why in wrong.items() if why)
        yield from within


def _check_root(run: Run, markers: list[shards.Marker]) -> Iterator[str]:
    """Checks the reports, and everything that `_SUCCESS` records."""
    kinds = {name: run.store.kind(name) for name in REPORTS}
    for name in filter(kinds.get, REPORTS):
        yield f"{name} {kinds[name]}; run the same generate command to write it"
    try:
        root = proof.read(run.store)
    except ValueError as problem:
        yield str(problem)
        root = None
    reports = _reports(run, markers)
    if root and root.sha256:  # it has their digests, and a later version's may have other words
        del reports[names.CARD], reports[names.CROISSANT]
    wrong = [
        f"{name} differs from what the run wrote"
        for name, content in reports.items()
        if not kinds[name] and proof.digest_of(run.store, name) != proof.digest(content)
    ]
    if root:
        wrong += proof.differences(root, _root(run, markers))
    yield from dict.fromkeys(wrong)


def _root(run: Run, markers: list[shards.Marker]) -> Root:
    return proof.now(run, markers, _counts(run.plan, markers))


def _reports(run: Run, markers: list[shards.Marker]) -> dict[str, str]:
    """Returns the reports without a clock in them, by name."""
    return {
        names.REJECTED: run.rejected(),
        names.FAILED: _failed(run, markers),
        names.CARD: card.readme(run.plan, _counts(run.plan, markers), scheme(run.address)),
        names.CROISSANT: card.croissant(run.plan),
    }


def _counts(plan: Plan, markers: list[shards.Marker]) -> dict[str, int]:
    return {
        **plan.rows,
        "planned": plan.images,
        "made": sum(marker.made for marker in markers),
        "failed": sum(marker.failed for marker in markers),
    }


def _failed(run: Run, markers: list[shards.Marker]) -> str:
    """Returns the lines of `failed.jsonl`: every failed image, with the reason."""
    lines = []
    for marker in markers:
        if marker.failed:
            with run.store.open(marker.metadata_name) as file:
                rows = pq.read_table(file).to_pylist()
            for image, row in zip(run.planned(marker.shard), rows, strict=True):
                if row["status"] == "failed":
                    what = {"file": image.source, "line": image.line, "reason": row["error"]}
                    names = ("key", "id", "image_index", "prompt", "seed")
                    record = {**what, **{name: row[name] for name in names}}
                    lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def spent(markers: list[shards.Marker]) -> dict:
    """Returns what shards cost: images made, seconds by stage, and what follows from them.

    Seconds are sums over the shards, which several workers may have made at the same time.
    """
    facts = [marker.facts for marker in markers]
    seconds = {
        stage: sum(fact["seconds"].get(stage, 0.0) for fact in facts)
        for stage in facts[0]["seconds"]
    }
    made = sum(marker.made for marker in markers)
    rate = made / seconds["generate"] if seconds["generate"] else None
    return {
        "made": made,
        "images_per_worker_second": rate and round(rate, 3),
        "seconds": seconds,
        "devices": sorted({fact["device"] for fact in facts}),
    }


def _report(plan: Plan, markers: list[shards.Marker], counts: dict[str, int]) -> dict:
    """Returns the run's report from its plan and markers."""
    facts, cost = [marker.facts for marker in markers], spent(markers)
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan_id": plan.id,
        "manifest": plan.manifest,
        "model": {"name": plan.model_name, "fingerprint": plan.identity["model"]},
        "settings": asdict(plan.settings),
        "counts": counts,
        "notices": plan.notices,
        "padded": sum(fact["padded"] for fact in facts),
        "images_per_worker_second": cost["images_per_worker_second"],
        "seconds": cost["seconds"],
        "devices": cost["devices"],
        "versions": {
            name: sorted({fact["versions"].get(name, "unknown") for fact in facts})
            for name in facts[0]["versions"]
        },
    }
