"""Checks from its files alone whether a dataset is complete and correct.

It is if: rows = blank + rejected + accepted; planned images = made + failed; made = images in the
shards = rows marked "made" in the metadata; every hash matches; and a done-marker names every file.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq

from jaxdiff.dataset import formats, image_files, names, paths
from jaxdiff.dataset import plan as plans
from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.finished import card
from jaxdiff.dataset.plan import Plan
from jaxdiff.dataset.run import Run, open_run
from jaxdiff.errors import InputError

REPORTS = (
    *(names.SUCCESS, names.CARD, names.CROISSANT),
    *(names.REPORT, names.REJECTED, names.FAILED),
)


class IncompleteError(Exception):
    """The dataset cannot be finished; the message gives the reason, on one line."""


def todo(run: Run) -> list[int]:
    """Returns the unfinished shards; raises InputError if a done-marker is damaged."""
    return [shard for shard, marker in enumerate(_markers(run)) if marker is None]


def with_failed(run: Run) -> list[int]:
    """Returns the shards with failed images; raises InputError if a done-marker is damaged."""
    markers = _markers(run)
    return [shard for shard, marker in enumerate(markers) if marker and marker.failed]


def revised(run: Run, some: list[int]) -> list[int]:
    """Returns those of some finished shards that are revisions."""
    return [shard for shard in some if shards.read_marker(run, shard).revision]


def settle(run: Run) -> None:
    """Cleans up after a dead job: publishes its finished shards and deletes its other files.

    Raises:
      InputError: if a done-marker is damaged, or the plan, which cannot be repaired.
    """
    if problem := next(_check_plan(run), None):
        raise InputError(
            f"{run.directory}: {problem}; this cannot be repaired: start a new run in another "
            "directory"
        )
    for marker in filter(None, _markers(run)):
        shards.publish(run, marker)
    run.store.sweep()


def _markers(run: Run) -> list[shards.Marker | None]:
    try:
        return [shards.read_marker(run, n) for n in run.shards]
    except ValueError as problem:
        mend = f"run `jaxdiff verify {run.directory} --repair` to generate its shard again"
        raise InputError(f"{run.directory}: {problem}; {mend}") from None


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


def finalize(run: Run, plan_seconds: float) -> dict:
    """Checks the shards, writes the card and the reports, and `_SUCCESS` last; may be repeated.

    Args:
      plan_seconds: how long planning took, for the report.

    Returns:
      The content of `run.json`.

    Raises:
      IncompleteError: if a shard is missing or does not match its marker.
    """
    began = time.monotonic()
    settle(run)
    markers = _markers(run)
    if problems := list(_check_files(run)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise IncompleteError(f"{run.directory}: {problems[0]}{more}")
    counts = _counts(run.plan, markers)
    run.store.swap(names.REJECTED, _rejected(run))
    run.store.swap(names.FAILED, _failed(run, markers))
    run.store.swap(names.CARD, card.readme(run.plan, counts))
    run.store.swap(names.CROISSANT, card.croissant(run.plan))
    report = _report(run.plan, markers, counts)
    seconds = report["seconds"] | {"plan": plan_seconds, "finalize": time.monotonic() - began}
    report["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    run.store.swap(names.REPORT, _dump(report))
    run.tidy()
    # A lost process on another host may still be writing there.
    shutil.rmtree(run.store.path(names.TMP), ignore_errors=True)
    run.store.swap(names.SUCCESS, _success(run.plan, markers, counts))
    with contextlib.suppress(OSError):
        (run.store.path(names.TMP)).rmdir()
    return report


def verify(directory: Path) -> tuple[dict[str, int], list[str]]:
    """Checks a finished dataset from its files alone, with every pixel in lossless formats.

    Returns:
      The counts, and the problems, one line each; empty if there are none.

    Raises:
      InputError: if there is no jaxdiff run in the directory.
    """
    run = open_run(directory)
    problems = list(_check_plan(run))
    if problems:
        return {}, problems
    problems = list(_check_files(run))
    for shard in run.shards:
        problems += _check_content(run, shard)
    if problems:
        return {}, problems
    markers = _markers(run)
    counts = _counts(run.plan, markers)
    expected = {
        names.REJECTED: _rejected(run),
        names.FAILED: _failed(run, markers),
        names.CARD: card.readme(run.plan, counts),
        names.CROISSANT: card.croissant(run.plan),
        names.SUCCESS: _success(run.plan, markers, counts),
    }
    for name, content in expected.items():
        path = run.store.path(name)
        if not path.is_file():
            problems.append(f"{name} is missing; run the same generate command to write it")
        elif path.read_bytes() != content.encode():
            problems.append(f"{name} differs from what the run wrote")
    return counts, problems


def broken(run: Run) -> list[int]:
    """Returns the finished shards that do not match their markers or the plan.

    Deletes damaged markers, and cleans up after a dead job.

    Raises:
      InputError: if the plan is damaged.
    """
    for shard in run.shards:
        while True:
            try:
                shards.read_marker(run, shard)
            except ValueError:
                shards.forget(run, shard)
            else:
                break
    settle(run)
    return [
        shard
        for shard, marker in enumerate(_markers(run))
        if marker and (any(_check_shard(run, shard)) or any(_check_content(run, shard)))
    ]


def _check_plan(run: Run) -> Iterator[str]:
    for name, digest in run.plan.sha256.items():
        path = run.store.path(names.PLAN) / name
        if not path.is_file():
            yield f"{names.PLAN}/{name} is missing"
        elif paths.digest(path) != digest:
            yield f"{names.PLAN}/{name} has changed since the job was planned"


def _check_files(run: Run) -> Iterator[str]:
    """Checks that every shard has the bytes that its marker names, and that no file is extra."""
    expected = set()
    for shard in run.shards:
        expected.update(run.file_names(shard))
        expected.update(path.name for path in shards.marker_paths(run, shard))
        yield from _check_shard(run, shard)
    for folder in (names.DATA, names.METADATA, names.DONE):
        for path in sorted((run.store.path(folder)).glob("*")):
            name = path.relative_to(run.directory).as_posix()
            if name not in expected and not (folder == names.DONE and path.name in expected):
                yield f"{name} does not belong to the run; move it elsewhere"


def _check_shard(run: Run, shard: int) -> Iterator[str]:
    """Checks that a shard has the bytes that its marker names."""
    mend = f"run `jaxdiff verify {run.directory} --repair` to generate it again"
    try:
        marker = shards.read_marker(run, shard)
    except ValueError as problem:
        yield f"{problem}; {mend}"
        return
    if marker is None:
        made = f"shard {shard} of {len(run.shards)} is not finished"
        yield f"{made}; run the same generate command to finish it"
        return
    for name, file in marker.files.items():
        path = run.store.path(name)
        if not path.exists():
            yield f"{name} is missing; {mend}"
        elif (size := paths.size(path)) != file["bytes"]:
            yield f"{name} has {size} bytes instead of {file['bytes']}; {mend}"
        elif paths.digest(path) != file["sha256"]:
            yield f"{name} has changed: its SHA-256 is not {file['sha256']}; {mend}"


def _check_content(run: Run, shard: int) -> Iterator[str]:
    """Checks that a shard's images and metadata match the plan."""
    images_name, metadata_name = run.file_names(shard)
    if not all(run.store.path(name).exists() for name in (images_name, metadata_name)):
        return  # already reported
    samples = shards.samples(run, shard)
    try:
        metadata = pq.read_table(run.store.path(metadata_name)).to_pylist()
        planned = run.planned(shard)
        if len(metadata) != len(planned):
            yield f"{metadata_name} has {len(metadata)} rows instead of {len(planned)}"
            return
        for image, row in zip(planned, metadata, strict=True):
            wanted = image.columns()
            if any(row[name] != wanted[name] for name in plans.SCHEMA.names if name in row):
                yield f"{metadata_name}: the row of image {image.key} does not match the plan"
            if row["status"] == "made":
                problem = _check_sample(next(samples, None), row, run.plan.settings.image_format)
                if problem:
                    yield f"{images_name}: image {image.key} {problem}"
        if next(samples, None) is not None:
            yield f"{images_name} holds more images than {metadata_name} has rows"
    except (KeyError, OSError, ValueError) as problem:
        yield f"{images_name}: {problem}"


def _check_sample(sample: formats.Sample | None, row: dict, image_format: str) -> str | None:
    if sample is None:
        return "is missing"
    if any(sample.record.get(name) != row[name] for name, _ in formats.RECORD_FIELDS):
        return "has a record that differs from its row in the metadata"
    if hashlib.sha256(sample.image).hexdigest() != row["sha256"]:
        return "has a file that does not match its sha256"
    if image_format not in image_files.LOSSLESS:
        return None
    if image_files.pixel_sha256(image_files.decode(sample.image)) != row["pixel_sha256"]:
        return "has pixels that do not match its pixel_sha256"
    return None


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
            rows = pq.read_table(run.store.path(metadata_name)).to_pylist()
            for image, row in zip(run.planned(marker.shard), rows, strict=True):
                if row["status"] == "failed":
                    what = {"file": image.source, "line": image.line, "reason": row["error"]}
                    names = ("key", "id", "image_index", "prompt", "seed")
                    record = {**what, **{name: row[name] for name in names}}
                    lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _success(plan: Plan, markers: list[shards.Marker], counts: dict[str, int]) -> str:
    sums = "".join(
        f"{file['sha256']}  {name}\n"
        for marker in markers
        for name, file in sorted(marker.files.items())
    )
    digest = hashlib.sha256(sums.encode()).hexdigest()
    return _dump({"plan_id": plan.id, "counts": counts, "files_sha256": digest})


def _report(plan: Plan, markers: list[shards.Marker], counts: dict[str, int]) -> dict:
    """Returns the run's report from its plan and markers; seconds are sums over the shards."""
    facts = [marker.facts for marker in markers]
    seconds = {
        stage: sum(fact["seconds"][stage] for fact in facts) for stage in facts[0]["seconds"]
    }
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "plan_id": plan.id,
        "manifest": plan.manifest,
        "model": {"name": plan.model_name, "fingerprint": plan.identity["model"]},
        "settings": asdict(plan.settings),
        "counts": counts,
        "padded": sum(fact["padded"] for fact in facts),
        "images_per_worker_second": round(counts["made"] / seconds["generate"], 3)
        if seconds["generate"]
        else None,
        "seconds": seconds,
        "devices": sorted({fact["device"] for fact in facts}),
        "versions": {
            name: sorted({fact["versions"][name] for fact in facts})
            for name in facts[0]["versions"]
        },
    }


def _dump(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
