"""Reads a Parquet file's rows in bounded memory, whatever the file claims to contain.

A few bytes of Parquet can stand for gigabytes: a dictionary holds a text once that many rows refer
to, run lengths repeat numbers, pages are compressed. So the file's own account of its columns
decides how many rows are read at once, and the bytes of each row are counted before it becomes
Python objects.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxdiff.errors import InputError

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


class ParquetRows:
    """A Parquet file: the names of its columns, and its rows.

    Attributes:
      names: of its columns.
    """

    def __init__(self, source: BinaryIO, name: str):
        """Opens a file.

        Args:
          name: of the file in messages.

        Raises:
          InputError: if a column would not fit in memory.
          OSError, ValueError, pa.ArrowException: for a damaged file.
        """
        file = pq.ParquetFile(source)
        self._rows_at_once = BATCH_ROWS
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            _check(group, file.schema, name)
            mean = group.total_byte_size // max(1, group.num_rows)
            chunks = map(group.column, range(group.num_columns))
            worst = sum(_dictionary_bytes(source, chunk) for chunk in chunks)
            most = min(BATCH_BYTES // max(1, mean), BATCH_WORST_BYTES // max(1, worst))
            self._rows_at_once = max(1, min(self._rows_at_once, most))
        columns = map(file.schema.column, range(len(file.schema)))
        # Of lists, one row may refer to a text any number of times: there, texts stay references.
        texts = [
            column.path
            for column in columns
            if column.physical_type == "BYTE_ARRAY" and column.max_repetition_level
        ]
        self._file = pq.ParquetFile(
            source, buffer_size=BUFFER_BYTES, pre_buffer=False, read_dictionary=texts
        )
        self.names: list[str] = file.schema_arrow.names

    def __iter__(self) -> Iterator[tuple[dict | None, str | None]]:
        """Yields each row as its values by column, or as an error."""
        for batch in self._file.iter_batches(self._rows_at_once, use_threads=False):
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


def _check(group: pq.RowGroupMetaData, schema: pq.ParquetSchema, name: str) -> None:
    """Raises InputError for a row group that may not fit in memory, by its own account."""
    for index in range(group.num_columns):
        chunk, column = group.column(index), schema.column(index)
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
            continue
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
