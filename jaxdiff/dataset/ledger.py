"""Checks from its files alone whether a dataset is complete and correct.

It is if: rows = blank + rejected + accepted; planned images = made + failed; made = images in the
shards = rows marked "made" in the metadata; every record is as planned; every file has the hash in
its shard's done-marker; and `_SUCCESS`, the root of the proof, records all of it (`proof`).
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff.dataset import contents, names, paths, proof
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.finished import card
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.proof import Root
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.errors import InputError

REPORTS = (names.SUCCESS, *proof.REPORTS)


class IncompleteError(Exception):
    """The dataset cannot be finished; the message gives the reason, on one line."""


def todo(run: Run) -> list[int]:
    """Returns the unfinished shards; raises InputError if a done-marker is damaged."""
    return [shard for shard, marker in enumerate(_markers(run)) if marker is None]


def with_failed(run: Run) -> list[int]:
    """Returns the shards with failed images; raises InputError if a done-marker is damaged."""
    markers = _markers(run)
    return [shard for shard, marker in enumerate(markers) if marker and marker.failed]


def settle(run: Run) -> None:
    """Cleans up after a dead job: publishes its finished shards and deletes its other files.

    Raises:
      InputError: if a done-marker is damaged, or the plan, which cannot be repaired.
    """
    check_plan(run)
    for marker in filter(None, _markers(run)):
        shards.publish(run, marker)
    run.store.sweep()


def _markers(run: Run) -> list[shards.Marker | None]:
    try:
        return [shards.read_marker(run, n) for n in run.shards]
    except ValueError as problem:
        raise InputError(f"{run.directory}: {problem}; {_mend(run)}") from None


def _mend(run: Run) -> str:
    return f"run `jaxdiff verify {run.directory} --repair` to generate it again"


def finished(run: Run) -> dict[str, int] | None:
    """Returns the counts of a finished dataset whose files all exist with their size, else None.

    Raises:
      InputError: if a done-marker is damaged.
    """
    markers = _markers(run)
    if None in markers or not all((run.store.path(name)).is_file() for name in REPORTS):
        return None
    for marker in markers:
        for name, file in marker.files.items():
            path = run.store.path(name)
            if not path.exists() or paths.size(path) != file["bytes"]:
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
    markers = _markers(run)
    problems = [*_check_plan(run)] or [*proof.differences_of_pins_and_markers(root, run)]
    if root.contents is None and None not in markers:
        problems += proof.differences(root, _root(run, markers))
    problems += (
        f"{name} {why}"
        for marker in filter(None, markers)
        for name in marker.files
        if (why := shards.why_not(run, marker, name, deep=False))
    )
    if problems:
        raise InputError(f"{run.directory}: {problems[0]}; {_mend(run)}")


def finalize(run: Run, plan_seconds: float, root: Root | None = None) -> dict:
    """Checks the shards, writes the card and the reports, and `_SUCCESS` last; may be repeated.

    Args:
      plan_seconds: how long planning took, for the report.
      root: what `_SUCCESS` recorded, if `run.json` may stay where it still is the one recorded.

    Returns:
      The content of a new `run.json`.

    Raises:
      IncompleteError: if a shard is missing or does not match its marker.
    """
    began = time.monotonic()
    settle(run)
    run.tidy()
    markers = _markers(run)
    folders = (names.DATA, names.METADATA, names.DONE)  # other files of a user may stay elsewhere
    if problems := [*_check_shards(run), *proof.strays(run, folders)]:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompleteError(f"{run.directory}: {problems[0]}{more}")
    counts = _counts(run.plan, markers)
    for name, content in _reports(run, markers).items():
        run.store.swap(name, content)
    report = _report(run.plan, markers, counts)
    seconds = report["seconds"] | {"plan": plan_seconds, "finalize": time.monotonic() - began}
    report["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    if not (root and proof.has_its_report(root, run)):
        run.store.swap(names.REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    # A lost process on another host may still be writing there.
    shutil.rmtree(run.store.path(names.TMP), ignore_errors=True)
    run.store.swap(names.SUCCESS, str(_root(run, markers)))
    with contextlib.suppress(OSError):
        (run.store.path(names.TMP)).rmdir()
    return report


def verify(directory: Path) -> tuple[dict[str, int], list[str]]:
    """Checks a finished dataset from its files alone, with every pixel in lossless formats.

    Returns:
      The counts, and the problems, one line each; empty if there are none.

    Raises:
      InputError: if there is no jaxdiff run in the directory, or its plan cannot be used.
    """
    if problems := list(proof.misplaced_folders(LocalStore(directory))):
        return {}, problems
    run = open_run(directory)
    if problems := [*_check_plan(run)] or [*_check_rows(run)]:
        return {}, problems
    if problems := [*_check_shards(run, deep=True), *proof.strays(run)]:
        return {}, problems
    markers = _markers(run)
    return _counts(run.plan, markers), list(_check_root(run, markers))


def broken(run: Run) -> list[int]:
    """Returns the finished shards that do not match their markers or the plan.

    Raises:
      InputError: if a done-marker is damaged.
    """
    return [
        shard
        for shard, marker in enumerate(_markers(run))
        if marker and any(_check_shard(run, shard, deep=True))
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
            f"{run.directory}: {problem}; this cannot be repaired: start a new run in another "
            "directory"
        )


def _check_plan(run: Run) -> Iterator[str]:
    with contextlib.suppress(ValueError):  # others say so
        root = proof.read(run.store)
        if root and (problem := proof.plan_problem(root, run)):
            yield problem
    if {*run.plan.sha256} != {run.plan.images_file, run.plan.rejected_file}:
        yield f"{proof.PLAN_FILE} does not name its own files"
        return
    for name, digest in run.plan.sha256.items():
        path = run.store.path(names.PLAN) / name
        if why := paths.wrong_kind(path):
            yield f"{names.PLAN}/{name} {why}"
        elif paths.digest(path) != digest:
            yield f"{names.PLAN}/{name} has changed since the job was planned"


def _check_rows(run: Run) -> Iterator[str]:
    """Checks the numbers in `plan.json` against the plan's other files."""
    images, first, rows = 0, 0, run.plan.rows
    try:
        with pq.ParquetFile(run.images_file) as file:
            for batch in file.iter_batches(columns=["image_index"]):
                images += len(batch)
                first += pc.sum(pc.equal(batch["image_index"], 0)).as_py()
    except contents.UNREADABLE as problem:
        yield f"{names.PLAN}/{run.plan.images_file}: {contents.reason_of(problem)}"
        return
    for what, said, found in (
        ("images", run.plan.images, images),
        ("accepted rows", rows["accepted"], first),  # each of which has a first image
        ("rejected rows", rows["rejected"], _rejected(run).count("\n")),
    ):
        if said != found:
            yield f"{proof.PLAN_FILE} says {said} {what}, but its files have {found}"


def _check_shards(run: Run, deep: bool = False) -> Iterator[str]:
    for shard in run.shards:
        yield from _check_shard(run, shard, deep)


def _check_shard(run: Run, shard: int, deep: bool = False) -> Iterator[str]:
    """Checks that a shard has the bytes that its marker names; if `deep`, also every image."""
    try:
        markers = shards.read_markers(run, shard)
    except ValueError as problem:
        yield f"{problem}; {_mend(run)}"
        return
    if not markers:
        made = f"shard {shard} of {len(run.shards)} is not finished"
        yield f"{made}; run the same generate command to finish it"
        return
    marker = markers[-1]
    wrong = {name: shards.why_not(run, marker, name) for name in marker.files}
    yield from (f"{name} {why}; {_mend(run)}" for name, why in wrong.items() if why)
    images_name, metadata_name = run.file_names(shard)
    odd = paths.wrong_kind_within(run.store.path(images_name), run.is_folder(images_name))
    if deep and not odd and not wrong[metadata_name]:
        yield from contents.problems(run, marker)


def _check_root(run: Run, markers: list[shards.Marker]) -> Iterator[str]:
    """Checks the reports, and everything that `_SUCCESS` records."""
    kinds = {name: paths.wrong_kind(run.store.path(name)) for name in REPORTS}
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
        if not kinds[name] and proof.digest_of(run.store.path(name)) != proof.digest(content)
    ]
    if root:
        wrong += proof.differences(root, _root(run, markers))
    yield from dict.fromkeys(wrong)


def _root(run: Run, markers: list[shards.Marker]) -> Root:
    return proof.now(run, markers, _counts(run.plan, markers))


def _reports(run: Run, markers: list[shards.Marker]) -> dict[str, str]:
    """Returns the reports without a clock in them, by name."""
    return {
        names.REJECTED: _rejected(run),
        names.FAILED: _failed(run, markers),
        names.CARD: card.readme(run.plan, _counts(run.plan, markers)),
        names.CROISSANT: card.croissant(run.plan),
    }


def _counts(plan: Plan, markers: list[shards.Marker]) -> dict[str, int]:
    return {
        **plan.rows,
        "planned": plan.images,
        "made": sum(marker.made for marker in markers),
        "failed": sum(marker.failed for marker in markers),
    }


def _rejected(run: Run) -> str:
    return (run.store.path(names.PLAN) / run.plan.rejected_file).read_text("utf-8")


def _failed(run: Run, markers: list[shards.Marker]) -> str:
    """Returns the lines of `failed.jsonl`: every failed image, with the reason."""
    lines = []
    for marker in markers:
        if marker.failed:
            metadata_name = run.metadata_name(marker.shard)
            with pq.ParquetFile(run.store.path(metadata_name)) as file:
                rows = file.read().to_pylist()
            for image, row in zip(run.planned(marker.shard), rows, strict=True):
                if row["status"] == "failed":
                    what = {"file": image.source, "line": image.line, "reason": row["error"]}
                    names = ("key", "id", "image_index", "prompt", "seed")
                    record = {**what, **{name: row[name] for name in names}}
                    lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _report(plan: Plan, markers: list[shards.Marker], counts: dict[str, int]) -> dict:
    """Returns the run's report from its plan and markers; seconds are sums over the shards."""
    facts = [marker.facts for marker in markers]
    seconds = {
        stage: sum(fact["seconds"].get(stage, 0.0) for fact in facts)
        for stage in facts[0]["seconds"]
    }
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan_id": plan.id,
        "manifest": plan.manifest,
        "model": {"name": plan.model_name, "fingerprint": plan.identity["model"]},
        "settings": asdict(plan.settings),
        "counts": counts,
        "notices": plan.notices,
        "padded": sum(fact["padded"] for fact in facts),
        "images_per_worker_second": round(counts["made"] / seconds["generate"], 3)
        if seconds["generate"]
        else None,
        "seconds": seconds,
        "devices": sorted({fact["device"] for fact in facts}),
        "versions": {
            name: sorted({fact["versions"].get(name, "unknown") for fact in facts})
            for name in facts[0]["versions"]
        },
    }
