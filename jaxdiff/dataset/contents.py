"""Checks what a finished shard holds, image by image, against the plan."""

import hashlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.formats import Sample
from jaxdiff.dataset.local import LocalStore
from jaxdiff.dataset.run import Run
from jaxdiff.dataset.shard import Marker
from jaxdiff.images import image_files

UNREADABLE = (  # what readers raise for bytes that no writer wrote
    *(ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RecursionError),
    *(TypeError, ValueError, pa.ArrowException),
)


def problems(run: Run, marker: Marker, local: LocalStore) -> Iterator[str]:
    """Yields how a shard's images and metadata differ from the plan and from its marker.

    Args:
      local: has the shard's files: what `fetched` of the run's store yields.
    """
    try:
        yield from _compared(run, marker, local)
    except UNREADABLE as problem:
        yield f"{marker.images_name}: {reason_of(problem)}"


def reason_of(problem: Exception) -> str:
    """Returns a library's error message on one line."""
    reason, *_ = str(problem).splitlines() or [type(problem).__name__]
    return reason


def _compared(run: Run, marker: Marker, local: LocalStore) -> Iterator[str]:
    images_name, metadata_name = marker.images_name, marker.metadata_name
    with pq.ParquetFile(local.path(metadata_name)) as file:
        schema = shards.metadata_schema(run.plan)
        if any(column not in schema for column in file.schema_arrow):
            yield f"{metadata_name} has columns that jaxdiff does not write"
            return
        rows = file.read().to_pylist()
    planned = run.planned(marker.shard)
    if len(rows) != len(planned):
        yield f"{metadata_name} has {len(rows)} rows instead of {len(planned)}"
        return
    made = sum(row["status"] == "made" for row in rows)
    if made != marker.made:
        yield f"{metadata_name} has {made} images instead of the {marker.made} of its done-marker"
    samples = shards.samples(run, marker, local)
    for known, row in zip(shards.records(planned, run.plan), rows, strict=True):
        sample = next(samples, None) if row["status"] == "made" else None
        if not _is_as_planned(known, marker, row):
            yield f"{metadata_name}: the row of image {known['key']} does not match the plan"
        if row["status"] == "made" and (
            problem := _check_sample(sample, row, run.plan.settings.image_format)
        ):
            yield f"{images_name}: image {known['key']} {problem}"
    if next(samples, None) is not None:
        yield f"{images_name} holds more images than {metadata_name} has rows"


def _is_as_planned(known: dict, marker: Marker, row: dict) -> bool:
    """Returns whether a row has what is known without the image; it may lack later columns."""
    if row["status"] == "made":
        known |= {"error": None, "file": marker.images_name}
        sound = True
    else:
        known |= dict.fromkeys(("sha256", "pixel_sha256", "file", "bytes"))
        sound = row["status"] == "failed" and bool(row["error"])
    return sound and all(row[name] == value for name, value in known.items() if name in row)


def _check_sample(sample: Sample | None, row: dict, image_format: str) -> str | None:
    if sample is None:
        return "is missing"
    recorded = row.keys() - {name for name, _ in shards.OUTCOME_FIELDS}
    if any(sample.record.get(name) != row[name] for name in recorded):
        return "has a record that differs from its row in the metadata"
    if sample.extension != image_files.EXTENSIONS[image_format]:
        return f"is a file named .{sample.extension}"
    if hashlib.sha256(sample.image).hexdigest() != row["sha256"]:
        return "has a file that does not match its sha256"
    if len(sample.image) != row["bytes"]:
        return f"has {len(sample.image)} bytes instead of {row['bytes']}"
    if image_format not in image_files.LOSSLESS:
        return None
    if image_files.pixel_sha256(image_files.decode(sample.image)) != row["pixel_sha256"]:
        return "has pixels that do not match its pixel_sha256"
    return None
