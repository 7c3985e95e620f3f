"""Reads the finished shards of a dataset, one image at a time, and checks their records."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.dataset import shard as shards
from jaxdiff.dataset.run import Run
from jaxdiff.errors import InputError
from jaxdiff.images import image_files as image_files
from jaxdiff.request import FIELDS

ROWS_AT_ONCE = 500
ALWAYS_THERE = (  # also for a failed image
    *("key", "id", "image_index", *FIELDS, "metadata"),
)


def images(run: Run) -> Iterator[tuple[dict, bytes | None]]:
    """Yields the metadata row and the file of each image; the file of a failed image is None.

    Skips unfinished shards.

    Raises:
      InputError: at the first damaged file or row.
    """
    for shard in run.shards:
        yield from images_of(run, shard)


def images_of(run: Run, shard: int) -> Iterator[tuple[dict, bytes | None]]:
    """Yields the `images` of one shard."""
    extension = image_files.EXTENSIONS[run.plan.settings.image_format]
    name = run.images_name(shard)
    try:
        marker = shards.read_marker(run, shard)
        if marker is None or run.store.kind(marker.images_name, run.is_folder(name)):
            return
        name = marker.images_name
        with run.store.fetched(*marker.files) as local:
            samples = shards.samples(run, marker, local)
            for row in _rows(local.path(marker.metadata_name)):
                if row["status"] != "made":
                    yield row, None
                    continue
                sample = next(samples, None)
                if sample is None or sample.extension != extension:
                    raise ValueError(f"image {row['key']} is missing")
                if hashlib.sha256(sample.image).hexdigest() != row["sha256"]:
                    raise ValueError(f"image {row['key']} has changed")
                yield row, sample.image
    except (OSError, RecursionError, ValueError, pa.ArrowException) as problem:
        raise InputError(
            f"{run.address}/{name} cannot be read: {problem}; for details, run `jaxdiff verify "
            f"{run.address}`"
        ) from None


def _rows(path: Path) -> Iterator[dict]:
    with pq.ParquetFile(path) as file:
        columns = list(file.schema_arrow)
        if not {*ALWAYS_THERE, "status"} <= {column.name for column in columns} or any(
            column not in shards.METADATA_SCHEMA for column in columns
        ):
            raise ValueError(f"{path.name} has columns that jaxdiff does not write")
        absent = dict.fromkeys(shards.METADATA_SCHEMA.names)  # for columns of later versions
        for batch in file.iter_batches(ROWS_AT_ONCE):
            for row in (absent | row for row in batch.to_pylist()):
                if any(row[name] is None for name in ALWAYS_THERE):
                    raise ValueError(f"{path.name} has a row with missing values")
                if not re.fullmatch(r"[0-9]{9}", row["key"]):
                    raise ValueError(f"{path.name} has an invalid key")
                if not isinstance(_read_json(row["metadata"]), dict):
                    raise ValueError(f"{path.name} has metadata that is not a JSON object")
                yield row


def _read_json(text: str):
    """Parses JSON as a browser does, without Python's NaN and infinities."""

    def refuse(name: str):
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)
