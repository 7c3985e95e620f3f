"""The three storage formats of shards, each with its writer and its reader.

A writer takes one image at a time, streams it to disk, and writes equal bytes for equal images:
times and owners are fixed, and there is no host name. A reader yields the images of a writer.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.request import FIELDS, IMAGE_COLUMNS

ROW_GROUP_IMAGES = 64
RECORDS = "metadata.jsonl"  # of an imagefolder; the Hub requires this name
UPSCALED = ("upscaled_width", "upscaled_height")  # in pixels, of images that were enlarged
RECORD_FIELDS = (  # of an image's record, in the order in which they are written
    ("key", pa.string()),
    ("id", pa.string()),
    ("image_index", pa.int32()),
    *((name, pa.type_for_alias(field.column)) for name, field in FIELDS.items()),
    *((name, pa.type_for_alias(column)) for name, column in IMAGE_COLUMNS.items()),
    *((name, pa.int32()) for name in UPSCALED),
    ("tokens_lost", pa.int32()),  # of both prompts, at their ends; see `Plan.counts_tokens`
    ("noise", pa.string()),
    ("dtype", pa.string()),
    ("options", pa.string()),  # the run's non-default options, "name=value, name=value"
    ("model", pa.string()),  # its fingerprint
    ("model_name", pa.string()),  # see `Plan.record_version`
    ("sha256", pa.string()),
    ("pixel_sha256", pa.string()),
    ("metadata", pa.string()),  # a JSON object
)
Fields = Sequence[tuple[str, pa.DataType]]  # names and types, as in `RECORD_FIELDS`


@dataclass(frozen=True)
class Sample:
    """A stored image: its record (of `RECORD_FIELDS`), and its file's bytes and extension."""

    record: dict
    image: bytes
    extension: str


class Writer(Protocol):
    """Writes a shard, one image at a time."""

    def add(self, sample: Sample) -> None:
        """Appends an image."""

    def close(self) -> None:
        """Finishes the shard; may be called again."""


class TarWriter:
    """Writes WebDataset: KEY.json, KEY.png and KEY.txt (the prompt) for each image."""

    def __init__(self, path: Path, _: Fields):
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, sample: Sample) -> None:
        """Appends an image."""
        record = {**sample.record, "metadata": json.loads(sample.record["metadata"])}
        members = {
            "json": json.dumps(record, ensure_ascii=False).encode(),
            "txt": sample.record["prompt"].encode(),
            sample.extension: sample.image,
        }
        for extension in sorted(members):  # TarInfo's default times and owners are 0
            member = tarfile.TarInfo(f"{sample.record['key']}.{extension}")
            member.size = len(members[extension])
            self._tar.addfile(member, io.BytesIO(members[extension]))

    def close(self) -> None:
        """Closes the file."""
        with self._file:
            self._tar.close()


def read_tar(path: Path) -> Iterator[Sample]:
    """Yields the images of a WebDataset shard; raises ValueError if it is invalid."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            size = path.stat().st_size
            for member in tar:
                if member.offset_data + member.size > size:  # or Python would allocate it
                    raise tarfile.ReadError("unexpected end of data")
                key, _, extension = member.name.partition(".")
                if member.type != tarfile.REGTYPE or extension in members:
                    raise ValueError(f"{member.name} is an unexpected file")
                members[extension] = tar.extractfile(member).read()
                if len(members) == 3:
                    yield _sample(key, members)
                    members = {}
    except tarfile.TarError as problem:
        raise ValueError(f"not a complete tar archive ({problem})") from problem
    if members:
        raise ValueError("its last image is incomplete")


def _sample(key: str, members: dict[str, bytes]) -> Sample:
    try:
        record = json.loads(members.pop("json"))
        prompt = members.pop("txt").decode()
        ((extension, image),) = members.items()
        if record["key"] != key or record["prompt"] != prompt:
            raise ValueError("its files differ in key or prompt")
        record["metadata"] = dump_metadata(record["metadata"])
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{key}: not a complete image ({problem!r})") from problem
    return Sample(record, image, extension)


def dump_metadata(metadata: dict) -> str:
    """Returns the JSON text of a row's other columns."""
    return json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))


class ParquetWriter:
    """Writes Parquet with the Hugging Face Hub's Image feature: one row per image and file."""

    def __init__(self, path: Path, fields: Fields):
        features = {"image": {"_type": "Image"}} | {name: _feature(kind) for name, kind in fields}
        image = ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        said = {"huggingface": json.dumps({"info": {"features": features}})}
        self._schema = pa.schema([image, *fields], said)
        self._file = path.open("wb")
        self._parquet = pq.ParquetWriter(self._file, self._schema)
        self._rows: list[dict] = []

    def add(self, sample: Sample) -> None:
        """Appends an image."""
        path = f"{sample.record['key']}.{sample.extension}"
        self._rows.append({"image": {"bytes": sample.image, "path": path}, **sample.record})
        if len(self._rows) == ROW_GROUP_IMAGES:
            self._flush()

    def close(self) -> None:
        """Closes the file."""
        with self._file:
            self._flush()
            self._parquet.close()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []


def _feature(kind: pa.DataType) -> dict[str, str]:
    """Returns a column's type as `datasets` stores it; from 4.7 on, it knows JSON."""
    if kind == pa.json_():
        return {"_type": "Json"}
    return {"dtype": dtype(kind), "_type": "Value"}


def dtype(kind: pa.DataType) -> str:
    """Returns the name of a column's type in dataset cards and for `datasets`."""
    return {"double": "float64", "extension<arrow.json>": "json"}.get(str(kind), str(kind))


def read_parquet(path: Path) -> Iterator[Sample]:
    """Yields the images of a Parquet shard; raises ValueError if it is invalid."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    image = row.pop("image")
                    yield Sample(row, image["bytes"], image["path"].partition(".")[2])
    except (AttributeError, KeyError, OSError, TypeError, pa.ArrowException) as problem:
        raise ValueError(f"not a complete Parquet file ({problem})") from problem


class FolderWriter:
    """Writes the Hugging Face Hub's imagefolder: a folder of image files and their records.

    `metadata.jsonl` has one line per image: `file_name` and the record. In it, the row's other
    columns are JSON text, because a column of `datasets` can have only one type.
    """

    def __init__(self, path: Path, _: Fields):
        path.mkdir()
        self._path = path
        self._records = (path / RECORDS).open("wb")

    def add(self, sample: Sample) -> None:
        """Appends an image."""
        name = f"{sample.record['key']}.{sample.extension}"
        (self._path / name).write_bytes(sample.image)
        line = json.dumps({"file_name": name, **sample.record}, ensure_ascii=False)
        self._records.write(line.encode() + b"\n")

    def close(self) -> None:
        """Closes the file of records."""
        self._records.close()


def read_folder(path: Path) -> Iterator[Sample]:
    """Yields the images of an imagefolder shard; raises ValueError if it is invalid."""
    expected = {RECORDS}
    try:
        with (path / RECORDS).open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                name = record.pop("file_name")
                key, _, extension = name.partition(".")
                if key != record["key"] or Path(name).name != name:
                    raise ValueError(f"{RECORDS}: {name} is not image {record['key']}")
                yield Sample(record, (path / name).read_bytes(), extension)
                expected.add(name)
        for name in sorted(set(os.listdir(path)) - expected):
            raise ValueError(f"{name} is an unexpected file")
    except (AttributeError, KeyError, OSError, TypeError) as problem:
        raise ValueError(f"not a complete folder of images ({problem})") from problem


class Format(NamedTuple):
    """A storage format.

    Attributes:
      ending: of its shards' names.
      writer: its class; it takes the shard's path and the fields of the images' records.
      read: yields the images of a shard.
    """

    ending: str
    writer: Callable[[Path, Fields], Writer]
    read: Callable[[Path], Iterator[Sample]]


FORMATS = {
    "webdataset": Format("tar", TarWriter, read_tar),
    "parquet": Format("parquet", ParquetWriter, read_parquet),
    "imagefolder": Format("", FolderWriter, read_folder),  # a folder has no ending
}
