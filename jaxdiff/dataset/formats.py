"""The three forms in which a shard's images are stored, each with its writer and its reader.

A writer takes images one at a time, keeps none of them, and gives equal bytes for equal images:
fixed times and owners, no name of a host. A reader yields what a writer was given.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.request import FIELDS

ROW_GROUP_IMAGES = 64
RECORDS = "metadata.jsonl"  # of an imagefolder; the Hub knows it by this name
RECORD_FIELDS = (  # of an image, in the order in which they are written
    ("key", pa.string()),
    ("id", pa.string()),
    ("image_index", pa.int32()),
    *((name, pa.type_for_alias(field.column)) for name, field in FIELDS.items()),
    ("noise", pa.string()),
    ("dtype", pa.string()),
    ("options", pa.string()),  # the run's that are not as usual, "name=value, name=value"
    ("model", pa.string()),
    ("sha256", pa.string()),
    ("pixel_sha256", pa.string()),
    ("metadata", pa.string()),  # a JSON object
)


@dataclass(frozen=True)
class Sample:
    """A stored image: its record by `RECORD_FIELDS`, its file's bytes and its file's extension."""

    record: dict
    image: bytes
    extension: str


class Writer(Protocol):
    """Writes a shard, an image at a time."""

    def add(self, sample: Sample) -> None:
        """Appends an image."""

    def close(self) -> None:
        """Ends the shard. May be called again."""


class TarWriter:
    """WebDataset: for each image KEY.json, KEY.png and KEY.txt, which is the prompt."""

    def __init__(self, path: Path):
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
        for extension in sorted(members):  # TarInfo's own times and owners are all 0
            member = tarfile.TarInfo(f"{sample.record['key']}.{extension}")
            member.size = len(members[extension])
            self._tar.addfile(member, io.BytesIO(members[extension]))

    def close(self) -> None:
        """Ends the file."""
        with self._file:
            self._tar.close()


def read_tar(path: Path) -> Iterator[Sample]:
    """Yields the images of a WebDataset shard; raises ValueError where it is not one of ours."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if member.type != tarfile.REGTYPE or extension in members:
                    raise ValueError(f"{member.name} does not belong there")
                members[extension] = tar.extractfile(member).read()
                if len(members) == 3:
                    yield _sample(key, members)
                    members = {}
    except tarfile.TarError as problem:
        raise ValueError(f"no whole tar archive ({problem})") from problem
    if members:
        raise ValueError("its last image is not whole")


def _sample(key: str, members: dict[str, bytes]) -> Sample:
    try:
        record = json.loads(members.pop("json"))
        prompt = members.pop("txt").decode()
        ((extension, image),) = members.items()
        if record["key"] != key or record["prompt"] != prompt:
            raise ValueError("its files differ in key or prompt")
        record["metadata"] = dump_metadata(record["metadata"])
    except (KeyError, TypeError, ValueError) as problem:
        raise ValueError(f"{key}: no whole image ({problem!r})") from problem
    return Sample(record, image, extension)


def dump_metadata(metadata: dict) -> str:
    """The JSON text of a row's other columns."""
    return json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))


class ParquetWriter:
    """Parquet with the Hugging Face Hub's Image feature: a row an image, its file inside."""

    SCHEMA = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *RECORD_FIELDS],
        {"huggingface": json.dumps({"info": {"features": {
            "image": {"_type": "Image"},
            **{name: {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}
               for name, kind in RECORD_FIELDS},
        }}})},
    )  # fmt: skip

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._parquet = pq.ParquetWriter(self._file, self.SCHEMA)
        self._rows: list[dict] = []

    def add(self, sample: Sample) -> None:
        """Appends an image."""
        path = f"{sample.record['key']}.{sample.extension}"
        self._rows.append({"image": {"bytes": sample.image, "path": path}, **sample.record})
        if len(self._rows) == ROW_GROUP_IMAGES:
            self._flush()

    def close(self) -> None:
        """Ends the file."""
        with self._file:
            self._flush()
            self._parquet.close()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self.SCHEMA))
        self._rows = []


def read_parquet(path: Path) -> Iterator[Sample]:
    """Yields the images of a Parquet shard; raises ValueError where it is not one of ours."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group).to_pylist():
                    image = row.pop("image")
                    yield Sample(row, image["bytes"], image["path"].partition(".")[2])
    except (AttributeError, KeyError, OSError, TypeError, pa.ArrowException) as problem:
        raise ValueError(f"no whole Parquet file ({problem})") from problem


class FolderWriter:
    """The Hugging Face Hub's imagefolder: a folder of image files, and the records beside them.

    `metadata.jsonl` has a line an image: `file_name` and the record, in which the row's other
    columns are a JSON text, as a column of `datasets` can have one type only.
    """

    def __init__(self, path: Path):
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
        """Ends the folder."""
        self._records.close()


def read_folder(path: Path) -> Iterator[Sample]:
    """Yields the images of an imagefolder shard; raises ValueError where it is not one of ours."""
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
            raise ValueError(f"{name} does not belong there")
    except (AttributeError, KeyError, OSError, TypeError) as problem:
        raise ValueError(f"no whole folder of images ({problem})") from problem


class Format(NamedTuple):
    """A form of shards: the ending of their names, their writer and their reader."""

    ending: str
    writer: Callable[[Path], Writer]
    read: Callable[[Path], Iterator[Sample]]


FORMATS = {
    "webdataset": Format("tar", TarWriter, read_tar),
    "parquet": Format("parquet", ParquetWriter, read_parquet),
    "imagefolder": Format("", FolderWriter, read_folder),  # a folder has no ending
}
