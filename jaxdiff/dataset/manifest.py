"""Reading a manifest's rows, one at a time, from JSONL, CSV, TSV, Parquet or plain text.

A row that cannot be read is an entry with an error, never an exception: one bad row must not stop
the good ones. Only a file that cannot be read at all raises. What the values mean is `rows`'s part.
"""

import contextlib
import csv
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.errors import InputError

# The columns that mean something; any other is carried through to the image's metadata.
COLUMNS = (
    *("prompt", "id", "negative_prompt", "seed", "seeds", "num_images"),
    *("width", "height", "steps", "guidance_scale", "sampler"),
)
MAX_LINE_BYTES = 2**20
MAX_RAW_CHARACTERS = 500
PARQUET_ROWS = 1024  # read at a time


@dataclass(frozen=True)
class Entry:
    """One row of a manifest as it stands there.

    Attributes:
      line: its first line, counted from 1; in a Parquet file its row, counted from 1.
      raw: its text, cut to 500 characters.
      values: by column; None where there is no readable row.
      error: why it could not be read. An entry with neither values nor error is a blank line.
    """

    line: int
    raw: str
    values: dict | None = None
    error: str | None = None


def read(path: Path) -> Iterator[Entry]:
    """Yields the rows of the manifest at `path`, blank lines too, in constant memory.

    Raises:
      InputError: for a missing or damaged file, an unknown type of file, or a table that has no
        `prompt` column.
    """
    if not path.is_file():
        raise InputError(f"manifest {path} does not exist (or is no file)")
    return READERS[kind(path)](path)


def kind(path: Path) -> str:
    """The file type that the name's ending says, such as "csv" for `prompts.csv.gz`."""
    suffixes = path.name.lower().removesuffix(".gz").rsplit(".", 1)
    if len(suffixes) == 2 and suffixes[1] in READERS:
        return suffixes[1]
    endings = ", ".join(f".{ending}" for ending in READERS)
    raise InputError(f"manifest {path}: the name must end in one of {endings} (or that and .gz)")


def _read_text(path: Path) -> Iterator[Entry]:
    for number, line, error in _lines(path):
        text = _without_newline(line)
        blank = error is None and not text.strip()
        values = None if blank or error else {"prompt": text}
        yield Entry(number, _cut(text), values, error)


def _read_jsonl(path: Path) -> Iterator[Entry]:
    for number, line, error in _lines(path):
        values = None
        if error is None and line.strip():
            try:
                values = json.loads(line, parse_constant=_refuse_constant)
                if not isinstance(values, dict):
                    values, error = None, 'the line is not a JSON object, such as {"prompt": "..."}'
            except json.JSONDecodeError as problem:
                error = f"the line is not JSON ({problem.msg} at character {problem.pos + 1})"
            except (RecursionError, ValueError) as problem:
                error = f"the line is not JSON ({problem})"
        yield Entry(number, _cut(_without_newline(line)), values, error)


def _read_tsv(path: Path) -> Iterator[Entry]:
    """Tab-separated values in the sense of IANA: a quotation mark is a character like any other."""
    columns = None
    for number, line, error in _lines(path):
        text = _without_newline(line)
        if columns is None:
            columns = _header(path, text.split("\t"))
        elif error or not text.strip():
            yield Entry(number, _cut(text), None, error)
        else:
            yield _table_entry(number, _cut(text), columns, text.split("\t"))


def _read_csv(path: Path) -> Iterator[Entry]:
    """Comma-separated values in the sense of RFC 4180; a quoted field may hold line breaks."""
    record = _Record()
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(record.gather(_lines(path)), strict=True)
    columns = None
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
        if columns is None:
            columns = _header(path, fields)
        elif error or not fields:
            yield Entry(record.line, _cut(_without_newline(record.raw)), None, error)
        else:
            yield _table_entry(record.line, _cut(_without_newline(record.raw)), columns, fields)


class _Record:
    """What the CSV reader has consumed for its current row, which may span several lines."""

    def clear(self) -> None:
        self.line = self.last_line = 0
        self.raw, self.error = "", None

    def gather(self, lines: Iterator[tuple[int, str, str | None]]) -> Iterator[str]:
        for number, line, error in lines:
            self.line = self.line or number
            self.last_line = number
            self.error = self.error or error
            if len(self.raw) <= MAX_RAW_CHARACTERS:
                self.raw += line
            # Of a line that is cut, only whether it opens or closes a quoted field matters.
            yield '"' * (line.count('"') % 2) if error else line


def _read_parquet(path: Path) -> Iterator[Entry]:
    with contextlib.ExitStack() as stack:
        source = path
        if path.name.lower().endswith(".gz"):  # a Parquet file is read from its end
            source = stack.enter_context(tempfile.TemporaryFile())
            with _open(path) as compressed, _damage_named(path):
                shutil.copyfileobj(compressed, source)
        try:
            table = stack.enter_context(pq.ParquetFile(source))
            _header(path, table.schema_arrow.names)
            start = 1
            for batch in table.iter_batches(PARQUET_ROWS):
                for line, (values, error) in enumerate(_parquet_rows(batch), start):
                    raw = _cut(json.dumps(values, ensure_ascii=False, default=repr))
                    yield Entry(line, raw, values, error)
                start += len(batch)
        except (OSError, pa.ArrowException) as problem:
            reason = str(problem).splitlines()[0]
            raise InputError(f"manifest {path} is no whole Parquet file ({reason})") from problem


def _parquet_rows(batch: pa.RecordBatch) -> Iterator[tuple[dict | None, str | None]]:
    try:
        # A missing number is NaN where pandas has written the file.
        for values in batch.to_pylist():
            yield {name: None if v != v else v for name, v in values.items()}, None
    except ValueError as problem:
        if len(batch) == 1:
            yield None, f"the row cannot be read ({problem})"
            return
        for index in range(len(batch)):
            yield from _parquet_rows(batch.slice(index, 1))


READERS = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "txt": _read_text,
}


def _lines(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yields (line number, text with its newline, error) and keeps no more than a line in memory.

    Bytes that are not UTF-8 become lone surrogates, so that only their own row is refused later.
    """
    with _open(path) as file, _damage_named(path):
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            error = None
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InputError(f"manifest {path} is UTF-16; save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE_BYTES:
                error = "the line is longer than 1 MiB"
                quotes, rest = line.count(b'"'), line
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES)
                    quotes += rest.count(b'"')
                line = line[: 4 * MAX_RAW_CHARACTERS]  # a character has 4 bytes at most
                line += b'"' * ((quotes - line.count(b'"')) % 2)  # for the CSV reader
            yield number, line.decode("utf-8", "surrogateescape"), error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise InputError(f"manifest {path} is no whole gzip file ({problem})") from problem


def _header(path: Path, names: list[str]) -> list[str]:
    shown = checks.shown(", ".join(names))
    if not any(name.casefold() == "prompt" for name in names):
        raise InputError(f"manifest {path} has no column 'prompt'; its header says {shown}")
    if len(set(names)) < len(names):
        raise InputError(f"manifest {path} names a column twice; its header says {shown}")
    return names


def _table_entry(line: int, raw: str, columns: list[str], fields: list[str]) -> Entry:
    if len(fields) != len(columns):
        counts = f"{len(fields)} fields where the header names {len(columns)}"
        return Entry(line, raw, error=f"the row has {counts}")
    values = dict(zip(columns, fields, strict=True))
    for column, field in values.items():
        if not field and column.casefold() in COLUMNS:
            values[column] = None  # an empty cell says nothing, so the job's default stands
    return Entry(line, raw, values)


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _cut(text: str) -> str:
    """The text as it may stand in a UTF-8 report: short, and its bad bytes spelled out."""
    return text[:MAX_RAW_CHARACTERS].encode("utf-8", "backslashreplace").decode()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
