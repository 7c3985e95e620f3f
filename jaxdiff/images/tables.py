"""Finds images in Parquet files, as bytes or in the Hub's Image feature. Imports no JAX.

One column of one row group is read at a time and remembered for its other rows. Equal values are
held once, so that it takes no more memory than the file says: a few bytes of Parquet could
otherwise stand for gigabytes.
"""

import bisect
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jaxdiff.checks import BadValueError, shown

ADDRESS = re.compile(r"(.+\.parquet)#([^/]+)/([0-9]{1,18})(?:/([0-9]{1,9}))?", re.IGNORECASE)
MOST_BYTES = 2**30  # of a row group, and of what is remembered, unpacked
MOST_VALUES = 2**24  # of a column in a row group
FOOTERS = 8  # files whose footers are remembered
BUFFER_BYTES = 2**20  # of a packed column at a time


class Cell(NamedTuple):
    """The place of an image in a Parquet file; as text, what follows the file in an address.

    Attributes:
      column: its name.
      row: counted from 0 in the whole file.
      number: of the image in the row's list, from 0; None if the column has no lists.
    """

    column: str
    row: int
    number: int | None = None

    def __str__(self) -> str:
        return "/".join(str(part) for part in self if part is not None)


def split(place: str) -> tuple[str, Cell | None]:
    """Splits an address into the path of its file and the place in it, None for other addresses."""
    found = ADDRESS.fullmatch(place)
    if not found:
        return place, None
    path, column, row, number = found.groups()
    return path, Cell(column, int(row), None if number is None else int(number))


def find(file: BinaryIO, cell: Cell, name: str) -> pa.Buffer:
    """Returns the bytes of an image.

    Args:
      file: a Parquet file.
      name: of the image in messages.

    Raises:
      BadValueError: if there is none, its row group is too large, or the file is damaged.
    """
    try:
        footer = _footer(file)
        if cell.column not in footer.columns:
            has = f"it has no images in a column {shown(cell.column)}"
            raise BadValueError(f"{name} is not in the file: {has}; correct the name")
        if footer.columns[cell.column] != (cell.number is not None):
            form = "COLUMN/ROW/NUMBER" if footer.columns[cell.column] else "COLUMN/ROW"
            raise BadValueError(f"{name} is not in the file: its images have the form {form}")
        if cell.row >= footer.starts[-1]:
            has = f"it has {footer.starts[-1]} rows, counted from 0"
            raise BadValueError(f"{name} is not in the file: {has}; correct the number")
        group = bisect.bisect_right(footer.starts, cell.row) - 1
        value = column(file, group, cell.column)[cell.row - footer.starts[group]]
        values = [value] if cell.number is None else listed(value)
        number = cell.number or 0
        image = content(values[number]) if number < len(values) else None
    except BadValueError:
        raise
    except (OSError, IndexError, ValueError, pa.ArrowException) as problem:
        reason = str(problem).splitlines()[0]
        raise BadValueError(f"{name}: the file is not complete Parquet ({reason})") from None
    if image is None:
        raise BadValueError(f"{name} is not in the file: there are no bytes; correct the number")
    return image


def content(value: pa.Scalar) -> pa.Buffer | None:
    """Returns the bytes of one image of a column, None if there are none."""
    if isinstance(value, pa.StructScalar):
        return content(value["bytes"]) if value.is_valid else None
    if isinstance(value, pa.DictionaryScalar):
        return content(value.value)
    return value.as_buffer() if value.is_valid else None


def listed(value: pa.ListScalar) -> pa.Array:
    """Returns the images of a row, in a column of lists; empty if the list is missing."""
    return value.values if value.is_valid else pa.nulls(0)


def image_columns(schema: pa.Schema) -> dict[str, bool]:
    """Returns the columns that may have images as bytes, and whether they have lists of them.

    They are of type binary, structs with `bytes` of this type, or lists of either.
    """
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    binaries = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    found = {}
    for field in schema:
        kind, has_lists = field.type, any(check(field.type) for check in lists)
        if has_lists:
            kind = kind.value_type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if any(check(kind) for check in binaries):
            found[field.name] = has_lists
    return found


def leaf(schema: pq.ParquetSchema, column: str) -> int:
    """Returns the index of the bytes among the leaf columns, for a column with images."""
    paths = [schema.column(index).path for index in range(len(schema))]
    if column in paths:
        return paths.index(column)
    inside = [path for path in paths if path.startswith(f"{column}.")]
    return paths.index(next((path for path in inside if path.endswith(".bytes")), inside[0]))


def check(group: pq.RowGroupMetaData, chunk: pq.ColumnChunkMetaData) -> None:
    """Raises BadValueError if a row group's images may not fit in memory, by its own account."""
    size = max(group.total_byte_size, chunk.total_uncompressed_size)
    if size > MOST_BYTES:
        what = f"a row group of {size // 2**20} MiB; at most {MOST_BYTES // 2**20}"
    elif chunk.num_values > MOST_VALUES:
        what = f"{chunk.num_values} values in a row group; at most {MOST_VALUES}"
    elif "DELTA_BYTE_ARRAY" in chunk.encodings:  # values are parts of others, so none is bounded
        what = "the encoding DELTA_BYTE_ARRAY; use PLAIN"
    else:
        return
    raise BadValueError(
        f"column {shown(chunk.path_in_schema)} has images in {what}; write the file again, "
        "with smaller row groups"
    )


def column(file: BinaryIO, group: int, name: str) -> pa.ChunkedArray:
    """Returns a row group's column of images; of structs, only the bytes.

    Raises:
      BadValueError: if it is too large.
      OSError, IndexError, ValueError, pa.ArrowException: for a damaged file.
    """
    metadata = _footer(file).metadata
    index = leaf(metadata.schema, name)
    chunk = metadata.row_group(group).column(index)
    check(metadata.row_group(group), chunk)
    path = metadata.schema.column(index).path

    def read() -> pa.ChunkedArray:
        how = {"read_dictionary": [path], "buffer_size": BUFFER_BYTES, "pre_buffer": False}
        opened = pq.ParquetFile(file, metadata=metadata, **how)
        return opened.read_row_group(group, [path], use_threads=False)[name]

    return _columns.get((*_identity(file), group, name), chunk.total_uncompressed_size, read)


class _Footer(NamedTuple):
    """What is remembered of a file.

    Attributes:
      columns: as `image_columns` returns them.
      starts: the number of each row group's first row, and last that of all rows.
    """

    metadata: pq.FileMetaData
    columns: dict[str, bool]
    starts: list[int]


def _footer(file: BinaryIO) -> _Footer:
    def read() -> _Footer:
        opened = pq.ParquetFile(file, pre_buffer=False)
        groups = map(opened.metadata.row_group, range(opened.num_row_groups))
        starts = [*accumulate((group.num_rows for group in groups), initial=0)]
        return _Footer(opened.metadata, image_columns(opened.schema_arrow), starts)

    return _footers.get(_identity(file), 1, read)


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class _Recent:
    """Remembers the values that were used last, up to a sum of their sizes.

    Threads that want the same value wait while one of them makes it.
    """

    def __init__(self, most: int):
        self._most, self._lock = most, threading.Lock()
        self._held: OrderedDict[tuple, tuple[int, Any]] = OrderedDict()

    def get(self, key: tuple, size: int, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._held:
                while self._held and size + sum(s for s, _ in self._held.values()) > self._most:
                    self._held.popitem(last=False)
                self._held[key] = size, make()
            self._held.move_to_end(key)
            return self._held[key][1]


_footers, _columns = _Recent(FOOTERS), _Recent(MOST_BYTES)
