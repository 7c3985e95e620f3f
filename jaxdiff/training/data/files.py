"""Reads captioned images from a folder, tar shards or Parquet files.

A dataset is scanned once, when it is opened. The scan gives one `Entry` per image; a thread-safe
function reads an image file by its entry's `place`. A file name listed in metadata is opened only
if it is inside the folder.
"""

import csv
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.dataset.manifest.readers import JSON, MAX_LINE_BYTES, READERS
from jaxdiff.errors import InputError
from jaxdiff.images import decoding

CAPTIONS = ("text", "caption", "prompt")  # default caption columns
METADATA = ("metadata.jsonl", "metadata.csv")
ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp")
IMAGE_COLUMN = "image"  # in Parquet files from the Hub: a struct of bytes and path
CACHE_BYTES = 2**30  # of row groups in memory


class Entry(NamedTuple):
    """A captioned image.

    Attributes:
      name: for messages: the file, with the row or the archive member.
      caption: the caption.
      size: height and width in pixels.
      place: the location of the image file, the argument of the format's read function.
      control: the location of its control image; None if there are none.
    """

    name: str
    caption: str
    size: tuple[int, int]
    place: tuple
    control: tuple | None = None


def scan_folder(folder: Path, column: str, control: str = "") -> Iterator[Entry]:
    """Yields the images listed in a folder's `metadata.jsonl` or `metadata.csv`, in order.

    The format is the Hub's imagefolder: `file_name` and a caption column, and perhaps one with the
    file names of control images, called `control`.

    Raises:
      InputError: for an invalid row, or an image file without a row.
    """
    metadata = next(folder / name for name in METADATA if (folder / name).is_file())
    rows = _read_csv(metadata) if metadata.suffix == ".csv" else _read_jsonl(metadata)
    named = set()
    for line, row in rows:
        where = f"{metadata} line {line}"
        path = _inside(folder, "file_name", row.get("file_name"), where)
        caption = _caption(row, column, where)
        steering = control and _inside(folder, control, row.get(control), where)
        named |= {path, steering}
        try:
            with path.open("rb") as file:
                size = decoding.read_size(file, str(path))
            extent = steering and (steering, 0, steering.stat().st_size)
            yield Entry(str(path), caption, size, (path, 0, path.stat().st_size), extent)
        except OSError as problem:
            raise InputError(
                f"{where}: {path} cannot be read: {problem.strerror}; restore it or remove the row"
            ) from None
    for path in sorted(folder.iterdir()):
        is_image = path.suffix.lower().lstrip(".") in ENDINGS and not path.name.startswith("._")
        if is_image and path not in named:
            raise InputError(
                f"{metadata} has no row for {path.name}; add one or move the image away"
            )


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for entry in READERS["jsonl"](path, str(path), None):
        if entry.error:
            raise InputError(f"{path} line {entry.line}: {entry.error}; fix or remove it")
        if entry.values is not None:
            yield entry.line, entry.values


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(iter(partial(file.readline, MAX_LINE_BYTES), ""), strict=True)
            for row in reader:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as problem:
        raise InputError(f"{path} is not a valid UTF-8 CSV file ({problem}); fix it") from None


def _inside(folder: Path, column: str, name, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise InputError(f"{where} has no {column}; add the name of the image")
    parts = PurePosixPath(name).parts
    leads_out = PureWindowsPath(name).anchor or name.startswith("/") or ".." in parts
    if leads_out or any(character < " " for character in name):
        raise InputError(
            f"{where}: {column} {checks.shown(name)} is not a path inside {folder}; move the "
            "image there"
        )
    return folder / name


def _caption(values: Mapping, column: str, where: str) -> str:
    """Returns the caption of a row; raises InputError if it has none."""
    names = (column,) if column else CAPTIONS
    caption = next((values[name] for name in names if values.get(name) is not None), None)
    if not isinstance(caption, str) or not caption.strip():
        raise InputError(
            f"{where} has no caption: no text in {' or '.join(names)}; add one, or set the caption "
            "column"
        )
    try:
        return checks.text("its caption", caption)
    except checks.BadValueError as problem:
        raise InputError(f"{where}: {problem}; fix it") from None


def read_span(place: tuple[Path, int, int]) -> bytes:
    """Reads an image's bytes from a file, given as (file, offset, number of bytes)."""
    path, offset, count = place
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def scan_tar(path: Path, column: str, control: str = "") -> Iterator[Entry]:
    """Yields the samples of a WebDataset shard.

    A sample consists of consecutive files with the same name (KEY) up to the first dot. The image
    is found by its extension. The caption is KEY.txt, a string in KEY.json, or the file with the
    extension `column`. A control image is the file with the extension `control`, for instance
    "control.png".

    Raises:
      InputError: for a damaged archive, or a sample without an image or a caption.
    """
    sample: dict[str, tarfile.TarInfo] = {}
    key = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                if not stem:  # hidden, such as macOS's "._NAME"; webdataset skips them too
                    continue
                if folder + slash + stem != key:
                    if sample:
                        yield _sample(path, tar, key, sample, column, control)
                    key, sample = folder + slash + stem, {}
                if ending.lower() in sample:
                    raise InputError(
                        f"{path} contains {checks.shown(member.name)} twice; write the shard again"
                    )
                sample[ending.lower()] = member
            if sample:
                yield _sample(path, tar, key, sample, column, control)
    except (tarfile.TarError, OSError) as problem:
        raise InputError(f"{path} is not a valid tar archive ({problem}); copy it again") from None


def _sample(
    path: Path,
    tar: tarfile.TarFile,
    key: str,
    members: dict[str, tarfile.TarInfo],
    column: str,
    control: str,
) -> Entry:
    name = f"{path}: {checks.shown(key)}"
    image = next((members[ending] for ending in ENDINGS if ending in members), None)
    if image is None:
        raise InputError(f"{name} has no image ({', '.join(ENDINGS)}); remove it from the shard")
    if control and control not in members:
        raise InputError(f"{name} has no control image ({control}); add it, or set data.control")
    values = {}
    for ending, member in members.items():
        if ending in ("txt", "json", column):
            if member.size > MAX_LINE_BYTES:
                raise InputError(
                    f"{name}.{ending} exceeds 1 MiB, too much for a caption; replace it"
                )
            try:
                text = tar.extractfile(member).read().decode("utf-8-sig")
            except UnicodeDecodeError as problem:
                raise InputError(f"{name}.{ending} is not UTF-8 ({problem}); convert it") from None
            values |= _parsed(text, name) if ending == "json" else {ending: text}
    if not column and "txt" in values:
        column = "txt"
    caption = _caption(values, column, name)
    size = decoding.read_size(tar.extractfile(image), name)
    steering = control and (path, members[control].offset_data, members[control].size)
    return Entry(name, caption, size, (path, image.offset_data, image.size), steering)


def _parsed(text: str, name: str) -> dict:
    try:
        values = JSON.decode(text)
    except (RecursionError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{name}.json is not a JSON object; fix or remove it")
    return values


class Cell(NamedTuple):
    """The location of an image in a Parquet file: row group, row and column of bytes."""

    path: Path
    group: int
    row: int
    group_bytes: int
    column: str


def scan_parquet(path: Path, column: str, control: str = "") -> Iterator[Entry]:
    """Yields the rows of a Parquet file with embedded images, as the Hub stores them.

    A column `control` of the same form may have control images.

    Raises:
      InputError: if the file or a row of it is invalid.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            leaf, caption = _image_column(path, schema, IMAGE_COLUMN), _column(path, schema, column)
            steering = control and _image_column(path, schema, control)
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).total_byte_size
                if size > CACHE_BYTES:
                    raise InputError(
                        f"{path} has a row group of {size / 2**20:.0f} MiB, over the limit of "
                        f"{CACHE_BYTES // 2**20} MiB; write it with a smaller row_group_size"
                    )
                table = file.read_row_group(group, [leaf, caption])
                cells = zip(_flat(table[IMAGE_COLUMN]), table[caption], strict=True)
                for index, (image, text) in enumerate(cells):
                    name = f"{path} row {row + 1}"
                    if not image.is_valid:
                        raise InputError(f"{name} has no embedded image; embed its bytes")
                    said = _caption({caption: text.as_py()}, caption, name)
                    shape = decoding.read_size(pa.BufferReader(image.as_buffer()), name)
                    cell = Cell(path, group, index, size, leaf)
                    beside = cell._replace(column=steering) if steering else None
                    yield Entry(name, said, shape, cell, beside)
                    row += 1
    except (OSError, pa.ArrowException) as problem:
        reason, *_ = str(problem).splitlines() or [type(problem).__name__]
        raise InputError(f"{path} is not a valid Parquet file ({reason}); copy it again") from None


def _image_column(path: Path, schema: pa.Schema, name: str) -> str:
    """Returns the path of the column that has the bytes of images."""
    kind = schema.field(name).type if name in schema.names else None
    is_struct = kind is not None and pa.types.is_struct(kind)
    if is_struct and "bytes" in {field.name for field in kind}:
        return f"{name}.bytes"
    if kind is not None and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return name
    raise InputError(
        f"{path} has no {name} column with image bytes; its columns are "
        f"{checks.shown(', '.join(schema.names))}; store images as the Image feature of the "
        "datasets library does"
    )


def _column(path: Path, schema: pa.Schema, column: str) -> str:
    """Returns the name of the column with captions."""
    names = (column,) if column else CAPTIONS
    caption = next((name for name in names if name in schema.names), None)
    if caption is None:
        raise InputError(
            f"{path} has no {' or '.join(names)} column; its columns are "
            f"{checks.shown(', '.join(schema.names))}; set the caption column"
        )
    return caption


def _flat(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the images' bytes, null where an image is missing."""
    return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


def parquet_reader(places: Sequence[Cell]) -> Callable[[Cell], bytes]:
    """Returns a function that reads images from Parquet files, with an LRU cache of row groups."""
    largest = max(cell.group_bytes for cell in places)

    @lru_cache(max(1, CACHE_BYTES // max(1, largest)))
    def read_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
        with pq.ParquetFile(path) as file:
            return _flat(file.read_row_group(group, [column])[column.removesuffix(".bytes")])

    lock = threading.Lock()  # otherwise threads that miss the same group would each load a copy

    def read(cell: Cell) -> bytes:
        with lock:
            images = read_group(cell.path, cell.group, cell.column)
        return images[cell.row].as_py() or b""

    return read
