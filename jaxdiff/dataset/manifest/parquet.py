"""Reads a Parquet file's rows in bounded memory, whatever the file claims to contain.

A few bytes of Parquet can stand for gigabytes: a dictionary holds a text once that many rows refer
to, run lengths repeat numbers, pages are compressed. So the file's own account of its columns
decides how many rows are read at once, and the bytes of each row are counted before it becomes
Python objects. Images as bytes become their places in the file.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff import checks
from jaxdiff.checks import BadValueError
from jaxdiff.dataset.manifest import columns
from jaxdiff.errors import InputError
from jaxdiff.images import tables
from jaxdiff.request import SEVERAL, SOURCES

BATCH_ROWS = 256
BATCH_BYTES = 2**26  # of a batch on average
BATCH_WORST_BYTES = 2**27  # of a batch whose rows all refer to the longest texts
BUFFER_BYTES = 2**20  # of a column chunk at a time, for row groups of any size
MAX_ROW_BYTES = 2**20
MAX_LISTED_VALUES = 2**24  # of a column of lists in a row group
MAX_LISTED_BYTES = 2**26
MAX_FIXED_BYTES = 1024  # of a value of a fixed size
MAX_PACKED_BYTES = 2**28  # of a column in a row group, if it is packed more than
MAX_PACKING = 64  # times as small as it is
DICTIONARY_PAGE = 2
HEADER_BYTES = 32  # enough for a page header's first three numbers


class Inside(NamedTuple):
    """An image inside the manifest's own file, before its address is complete.

    Attributes:
      name: of the file in an archive, or a column and row of a table.
    """

    name: str


class ParquetRows:
    """A Parquet file: the names of its columns, and its rows.

    Attributes:
      names: of its columns.
    """

    def __init__(self, source: BinaryIO, name: str, prompt_column: str | None = None):
        """Opens a file.

        Args:
          name: of the file in messages.
          prompt_column: the name of the prompt column, if the user has given it.

        Raises:
          InputError: if a column would not fit in memory.
          OSError, ValueError, pa.ArrowException: for a damaged file.
        """
        file = pq.ParquetFile(source)
        self.names: list[str] = file.schema_arrow.names
        self._source = source
        self._images = _image_columns(file.schema_arrow, name, prompt_column)
        self._rows_at_once = BATCH_ROWS
        images = {tables.leaf(file.schema, column) for column in self._images}
        others = [index for index in range(len(file.schema)) if index not in images]
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            for chunk in map(group.column, sorted(images)):
                _check_images(group, chunk, name)
            chunks = [group.column(index) for index in others]
            for index, chunk in zip(others, chunks, strict=True):
                _check(chunk, file.schema.column(index), name)
            mean = sum(c.total_uncompressed_size for c in chunks) // max(1, group.num_rows)
            worst = sum(_dictionary_bytes(source, chunk) for chunk in chunks)
            most = min(BATCH_BYTES // max(1, mean), BATCH_WORST_BYTES // max(1, worst))
            self._rows_at_once = max(1, min(self._rows_at_once, most))
        leaves = [file.schema.column(index) for index in others]
        self._others = [leaf.path for leaf in leaves]
        # Of lists, one row may refer to a text any number of times: there, texts stay references.
        texts = [
            leaf.path
            for leaf in leaves
            if leaf.physical_type == "BYTE_ARRAY" and leaf.max_repetition_level
        ]
        self._file = pq.ParquetFile(
            source, buffer_size=BUFFER_BYTES, pre_buffer=False, read_dictionary=texts
        )

    def __iter__(self) -> Iterator[tuple[dict | None, str | None]]:
        """Yields each row as its values by column, or as an error.

        The value of an image as bytes is `Inside`; if the bytes are missing, it is their path.
        """
        first = 0
        for group in range(self._file.num_row_groups):
            images = {name: tables.column(self._source, group, name) for name in self._images}
            row = -1
            for row, (values, error) in enumerate(self._rows_of(group)):
                try:
                    for name, column in images.items() if values is not None else ():
                        values[name] = _places(column[row], values.get(name), name, first + row)
                except BadValueError as problem:
                    values, error = None, str(problem)
                yield values, error
            first += row + 1

    def _rows_of(self, group: int) -> Iterator[tuple[dict | None, str | None]]:
        for batch in self._file.iter_batches(
            self._rows_at_once, row_groups=[group], columns=self._others, use_threads=False
        ):
            sizes = sum(map(_row_bytes, batch.columns))
            batch = _plain(batch)
            if sizes.sum() <= BATCH_BYTES and sizes.max() <= MAX_ROW_BYTES:
                yield from _rows(batch)
                continue
            for row, size in enumerate(sizes):
                if size <= MAX_ROW_BYTES:
                    yield from _rows(batch.slice(row, 1))
                else:
                    yield None, f"the row has {size} bytes; at most {MAX_ROW_BYTES}"


def _image_columns(schema: pa.Schema, name: str, prompt_column: str | None) -> list[str]:
    """Returns the columns of images as bytes that mean images of a request."""
    found = tables.image_columns(schema)
    meaning = columns.meaning(tuple(schema.names), prompt_column) if found else {}
    found = {column: has_lists for column, has_lists in found.items() if meaning[column] in SOURCES}
    for column, has_lists in found.items():
        if has_lists and meaning[column] not in SEVERAL:
            raise InputError(
                f"manifest {name}: column {checks.shown(column)} has lists of images; write it "
                "with one image in each row"
            )
    return [*found]


def _places(value: pa.Scalar, said, column: str, row: int) -> Inside | str | list | None:
    """Returns where the images of a row are.

    Args:
      value: of the column, with the bytes only.
      said: the rest of it: structs with paths, or None.
      row: its number in the file.

    Raises:
      BadValueError: for too many images in a list.
    """
    if not isinstance(value, pa.ListScalar):
        if tables.content(value) is not None:
            return Inside(str(tables.Cell(column, row)))
        return said.get("path") if said else None
    images = tables.listed(value)
    if len(images) > checks.MAX_CONTROLS:
        raise BadValueError(
            f"{column} has {len(images)} images; at most {checks.MAX_CONTROLS} are used"
        )
    paths = [each and each.get("path") for each in said or [None] * len(images)]
    return [
        path if tables.content(image) is None else Inside(str(tables.Cell(column, row, number)))
        for number, (image, path) in enumerate(zip(images, paths, strict=True))
    ] or None


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Converts dates, times and decimals to text for JSON: 2022-08-11 01:02:03.000Z."""
    fields = [
        field.with_type(pa.string())
        if pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type)
        else field
        for field in batch.schema
    ]
    return batch.cast(pa.schema(fields))


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[dict | None, str | None]]:
    try:
        # pandas writes missing numbers as NaN.
        for values in batch.to_pylist():
            yield {name: None if v != v else v for name, v in values.items()}, None
    except ValueError as problem:
        if len(batch) == 1:
            yield None, f"the row cannot be read ({problem})"
            return
        for index in range(len(batch)):
            yield from _rows(batch.slice(index, 1))


def _check_images(group: pq.RowGroupMetaData, chunk: pq.ColumnChunkMetaData, name: str) -> None:
    try:
        tables.check(group, chunk)
    except BadValueError as problem:
        raise InputError(f"manifest {name}: {problem}") from None


def _check(chunk: pq.ColumnChunkMetaData, column: pq.ColumnSchema, name: str) -> None:
    """Raises InputError for a part of a column that may not fit in memory, by its own account."""
    bytes_, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
    listed = column.max_repetition_level > 0
    if listed and chunk.num_values > MAX_LISTED_VALUES:
        what = f"{chunk.num_values} listed values in a row group; at most {MAX_LISTED_VALUES}"
    elif listed and bytes_ > MAX_LISTED_BYTES:
        what = f"{bytes_} bytes in the lists of a row group; at most {MAX_LISTED_BYTES}"
    elif column.length > MAX_FIXED_BYTES:
        what = f"values of {column.length} bytes; at most {MAX_FIXED_BYTES}"
    elif bytes_ > MAX_PACKED_BYTES and bytes_ > MAX_PACKING * packed:
        what = f"{bytes_} bytes packed in {packed}; at most {MAX_PACKING} times as many"
    else:
        return
    raise InputError(
        f"manifest {name}: column {column.path!a} has {what}; write the file again with "
        "smaller row groups, or without this column"
    )


def _dictionary_bytes(source: BinaryIO, chunk: pq.ColumnChunkMetaData) -> int:
    """Returns the unpacked bytes of a column chunk's dictionary, 0 if it has none.

    Its page header is in Thrift's compact protocol: the page's type and size are the first fields.
    """
    places = [chunk.data_page_offset]
    places += [chunk.dictionary_page_offset] if chunk.has_dictionary_page else []
    source.seek(min(places))
    header = iter(source.read(HEADER_BYTES))
    page, size = _thrift_number(header), _thrift_number(header)
    return size if page == DICTIONARY_PAGE else 0


def _thrift_number(header: Iterator[int]) -> int:
    """Reads the next field of a struct, a number; raises ValueError if it is something else."""
    if next(header, None) != 0x15:  # the number of the last field plus 1, of the type i32
        raise ValueError("a page header is damaged")
    value = shift = 0
    for byte in header:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value >> 1  # zigzag; never negative here


def _row_bytes(array: pa.Array) -> np.ndarray:
    """Returns the bytes of each value, int64; 8 more for each number and each text."""
    kind, sizes = array.type, np.full(len(array), 8)
    if pa.types.is_dictionary(kind) and len(array.dictionary):
        return _row_bytes(array.dictionary)[array.indices.fill_null(0).to_numpy()]
    if pa.types.is_struct(kind):
        return sum(map(_row_bytes, map(array.field, range(kind.num_fields))), sizes)
    if pa.types.is_map(kind):
        return sizes + _sums(_row_bytes(array.keys) + _row_bytes(array.items), array.offsets)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return sizes + _sums(_row_bytes(array.values), array.offsets)
    if pa.types.is_fixed_size_list(kind):
        return sizes + _row_bytes(array.values).reshape(len(array), -1).sum(axis=1)
    if kind in (pa.string(), pa.binary(), pa.large_string(), pa.large_binary()):
        return sizes + pc.binary_length(array).fill_null(0).to_numpy()
    return sizes


def _sums(sizes: np.ndarray, offsets: pa.Array) -> np.ndarray:
    """Returns the sum of each list's sizes."""
    return np.diff(np.concatenate([[0], np.cumsum(sizes)])[offsets.to_numpy()])
