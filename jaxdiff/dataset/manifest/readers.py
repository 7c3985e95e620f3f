"""Reads a file's rows, one at a time: JSONL, CSV, TSV, Parquet, JSON, plain text or tar.

Each reader takes the file's path, its name in messages, and the name of the prompt column, if the
user has given it. An image inside the file itself is a value `Inside`.
"""

import contextlib
import csv
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.dataset.manifest import columns, json_list
from jaxdiff.dataset.manifest.json_list import JSON
from jaxdiff.dataset.manifest.parquet import Inside, ParquetRows
from jaxdiff.errors import InputError
from jaxdiff.images import archives

MAX_LINE_BYTES = 2**20
MAX_RAW_CHARACTERS = 500
MAX_PARQUET_BYTES = 2**36  # of a gzipped Parquet file, which is unpacked into a temporary one
IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp")
OURS = {"key", "image", "image_index", "pixel_sha256"}  # columns of a dataset of ours as Parquet
LINE_END = re.compile(rb"(?<=\r)(?!\n)")  # after a CR alone


class Entry(NamedTuple):
    """One row of a manifest, not interpreted yet.

    Attributes:
      line: its first line, or its position in Parquet or a JSON list, counted from 1.
      text: its text, if it has one.
      values: by column; None if there is no readable row.
      error: why it could not be read. An entry with neither values nor error is a blank line.
    """

    line: int
    text: str
    values: dict | None = None
    error: str | None = None

    @property
    def raw(self) -> str:
        """The text for a UTF-8 report: shortened, with invalid bytes escaped."""
        text = self.text or json.dumps(self.values, ensure_ascii=False, default=repr)
        return text[:MAX_RAW_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def read_item(path: Path, item: str, prompt_column: str | None) -> Iterator[Entry]:
    """Yields the only row of a file whose text, without a final newline, is one prompt."""
    with path.open("rb") as file:
        content = file.read(MAX_LINE_BYTES + 1)
    if len(content) > MAX_LINE_BYTES:
        yield Entry(
            1, _decode(content[: 4 * MAX_RAW_CHARACTERS]), error="the file is longer than 1 MiB"
        )
        return
    text = _without_newline(_decode(json_list.without_mark(content, str(path))))
    yield Entry(1, text, {"id": item, prompt_column or "prompt": text})


def _read_text(path: Path, name: str, prompt_column: str | None) -> Iterator[Entry]:
    for number, line, error in _lines(path, name):
        text = _without_newline(line)
        blank = error is None and not text.strip()
        values = None if blank or error else {prompt_column or "prompt": text}
        yield Entry(number, text, values, error)


def _read_jsonl(path: Path, name: str, _) -> Iterator[Entry]:
    for number, line, error in _lines(path, name):
        values = None
        if error is None and line.strip():
            try:
                values = JSON.decode(line)
                if not isinstance(values, dict):
                    values, error = None, 'the line is not a JSON object like {"prompt": "..."}'
            except json.JSONDecodeError as problem:
                what = problem.msg.removesuffix(" at")
                error = f"the line is not JSON ({what} at character {problem.pos + 1})"
            except (RecursionError, ValueError) as problem:
                error = f"the line is not JSON ({problem})"
        yield Entry(number, _without_newline(line), values, error)


def _read_json(path: Path, name: str, prompt_column: str | None) -> Iterator[Entry]:
    """Reads a list of prompts (as in HPSv2) or of objects."""
    with _open(path) as file, _damage_named(name):
        for place, values in enumerate(json_list.items(file, name), 1):
            if isinstance(values, str):
                values = {prompt_column or "prompt": values}
            if isinstance(values, dict):
                yield Entry(place, "", values)
            else:
                text = json.dumps(values, ensure_ascii=False)
                yield Entry(place, text, error="the item is neither text nor a JSON object")


def _read_tsv(path: Path, name: str, prompt_column: str | None) -> Iterator[Entry]:
    """Reads tab-separated values as defined by IANA: quotation marks have no meaning."""
    meaning = None
    for number, line, error in _lines(path, name):
        text = _without_newline(line)
        if meaning is None:
            meaning = _header(name, text.split("\t"), prompt_column)
        elif error or not text.strip():
            yield Entry(number, text, None, error)
        else:
            yield _table_entry(number, text, meaning, text.split("\t"))


def _read_csv(path: Path, name: str, prompt_column: str | None) -> Iterator[Entry]:
    """Reads comma-separated values (RFC 4180); a quoted field may contain line breaks."""
    record = _Record(_lines(path, name))
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(record, strict=True)
    meaning = None
    while True:
        record.clear()
        try:
            fields, error = next(reader), record.error
        except StopIteration:
            return
        except csv.Error as problem:
            until = f", to line {record.last_line}" if record.last_line > record.line else ""
            fields = []
            error = f"the row{until} is not CSV ({problem}); check its quotation marks"
        text = _without_newline(record.text)
        if meaning is None:
            meaning = _header(name, fields, prompt_column)
        elif error or not fields:
            yield Entry(record.line, text, None, error)
        else:
            yield _table_entry(record.line, text, meaning, fields)


class _Record:
    """The lines of a CSV file, as an iterator, and the text of the reader's current row."""

    def __init__(self, lines: Iterator[tuple[int, str, str | None]]):
        self._lines = lines

    def clear(self) -> None:
        self.line = self.last_line = self._length = 0
        self.text, self.error = "", None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line, error = next(self._lines)
        self.line = self.line or number
        self.last_line = number
        self.error = self.error or error
        self._length += len(line)
        if self._length > MAX_LINE_BYTES:  # after this, the CSV reader starts a new row
            raise csv.Error("longer than 1 MiB")
        if len(self.text) <= MAX_RAW_CHARACTERS:
            self.text += line
        # Of a truncated line, it only matters whether it opens or closes a quoted field.
        return '"' * (line.count('"') % 2) if error else line


def _read_parquet(path: Path, name: str, prompt_column: str | None) -> Iterator[Entry]:
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(path.open("rb"))
        if name.lower().endswith(".gz"):  # a Parquet file is read from its end
            source = stack.enter_context(tempfile.TemporaryFile())
            _unpack(path, name, source)
        try:
            table = ParquetRows(source, name, prompt_column)
            meaning = _header(name, table.names, prompt_column)
            is_ours = meaning.keys() >= OURS
            for line, (values, error) in enumerate(table, 1):
                if is_ours and values is not None:
                    values = _of_record(values, meaning, prompt_column)
                yield Entry(line, "", values, error)
        except (OSError, ValueError, pa.ArrowException) as problem:
            reason = str(problem).splitlines()[0]
            raise InputError(
                f"manifest {name} is not a complete Parquet file ({reason})"
            ) from problem


def _of_record(values: dict, meaning: dict[str, str | None], prompt_column: str | None) -> dict:
    """Returns the row for an image of ours: with its own prompt, but the settings of the job."""
    image = values.pop("image")
    prompt = next(values[column] for column, means in meaning.items() if means == "prompt")
    return {
        "id": values["key"],
        "image": image,
        prompt_column or "prompt": prompt,
        "record": values,
    }


def _unpack(path: Path, name: str, target: BinaryIO) -> None:
    with _open(path) as packed, _damage_named(name):
        while chunk := packed.read(2**20):
            target.write(chunk)
            if target.tell() > MAX_PARQUET_BYTES:
                raise InputError(
                    f"manifest {name} unpacks to more than {MAX_PARQUET_BYTES // 2**30} GiB; use "
                    "the uncompressed Parquet file"
                )


def _read_tar(path: Path, name: str, prompt_column: str | None) -> Iterator[Entry]:
    """Reads a WebDataset: the files KEY.png (or another image), KEY.txt and KEY.json of each row.

    The prompt is the text, or else what the JSON object says; the object is copied as `record`.
    """
    try:
        found = archives.members(path)
    except BadValueError as problem:
        raise InputError(f"manifest {problem}") from None
    rows: dict[str, dict[str, str]] = {}
    for member in found:
        folder, slash, base = member.rpartition("/")
        key, _, ending = base.partition(".")
        rows.setdefault(f"{folder}{slash}{key}", {})[ending.lower()] = member
    for number, (key, files) in enumerate(rows.items(), 1):
        try:
            yield Entry(number, key, _tar_row(path, key, files, found, prompt_column))
        except ValueError as problem:
            yield Entry(number, key, error=f"{key}: {problem}")


def _tar_row(
    path: Path, key: str, files: dict[str, str], found: Mapping, prompt_column: str | None
) -> dict:
    def text(ending: str) -> str:
        member = found[files[ending]]
        if member.size > MAX_LINE_BYTES:
            raise BadValueError(f"its .{ending} file is longer than 1 MiB")
        with path.open("rb") as file:
            file.seek(member.offset)
            return _decode(file.read(member.size))

    values = {"id": key}
    image = next((files[each] for each in IMAGE_ENDINGS if each in files), None)
    if image is not None:
        values["image"] = Inside(image)
    if "json" in files:
        record = JSON.decode(text("json"))
        values["record"] = record
        said = record if isinstance(record, dict) else {}
        meaning = columns.meaning(tuple(said), prompt_column)
        for column, means in meaning.items():
            if means == "prompt":
                values[prompt_column or "prompt"] = said[column]
    if "txt" in files and prompt_column is None:
        values["prompt"] = _without_newline(text("txt"))
    return values


def _read_image(path: Path, name: str, _) -> Iterator[Entry]:
    """Yields the only row of a file that is itself an image."""
    yield Entry(1, "", {"image": Inside("")})


READERS = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "txt": _read_text,
    "tar": _read_tar,
    **dict.fromkeys(IMAGE_ENDINGS, _read_image),
}


def _lines(path: Path, name: str) -> Iterator[tuple[int, str, str | None]]:
    """Yields (line number, text with its newline, error), with one line at a time in memory.

    Lines end in LF, CR LF, or CR alone, as old Macintosh programs and some exports write them.
    Bytes that are not UTF-8 become lone surrogates, so that only their own row is rejected later.
    """
    with _open(path) as file, _damage_named(name):
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            error = None
            if number == 0:
                line = json_list.without_mark(line, name)
            if len(line) > MAX_LINE_BYTES:
                error = "the line is longer than 1 MiB"
                quotes, rest = line.count(b'"'), line
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES)
                    quotes += rest.count(b'"')
                line = line[: 4 * MAX_RAW_CHARACTERS]  # a character has 4 bytes at most
                line += b'"' * ((quotes - line.count(b'"')) % 2)  # for the CSV reader
            for part in LINE_END.split(line) if b"\r" in line and not error else [line]:
                if part or not number:
                    number += 1
                    yield number, _decode(part), error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise InputError(f"manifest {name} is not a complete gzip file ({problem})") from problem


def _header(name: str, names: list[str], prompt_column: str | None) -> dict[str, str | None]:
    """Returns the meaning of the table's columns."""
    try:
        columns.check(tuple(names))
    except BadValueError as problem:
        raise InputError(f"manifest {name} has {problem}") from None
    meaning = columns.meaning(tuple(names), prompt_column)
    if not {"prompt", "image"} & {*meaning.values()}:
        raise InputError(f"manifest {name} {columns.no_prompt(names, prompt_column)}")
    if len(meaning) < len(names):
        shown = checks.shown(", ".join(names))
        raise InputError(f"manifest {name} names a column twice: its header is {shown}")
    return meaning


def _table_entry(line: int, text: str, meaning: dict[str, str | None], fields: list[str]) -> Entry:
    if len(fields) != len(meaning):
        counts = f"{len(fields)} fields, but the header has {len(meaning)}"
        return Entry(line, text, error=f"the row has {counts}")
    # An empty cell of a column of `columns.COLUMNS` counts as missing: the job's default applies.
    values = {
        column: None if means and not field else field
        for (column, means), field in zip(meaning.items(), fields, strict=True)
    }
    return Entry(line, text, values)


def _decode(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")
