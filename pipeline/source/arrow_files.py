"""Reads Parquet files, Arrow files and tables of `datasets`: only the columns that are asked for.

So a column that nobody needs cannot stop a build: no image is decoded, no date is converted. A file is open only while a
piece of it is read, for a folder may have more files than a process may open.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.source.arrow_sizes import size_of, small_pieces
from pipeline.source.parquet_pages import ColumnSize, column_sizes
from pipeline.source.rows import MAX_ROW_BYTES, ROWS_PER_BATCH, Block, Piece, RawRow, Source, too_large
from weights_store.errors import InputError
from weights_store.messages import first_line
from weights_store.schemas import Reason

_MAX_PAGE_BYTES = 256 << 20
"""Of a column in a row group, decompressed. Larger ones are not read: no row that can be used needs one."""
_BATCH_BYTES = 64 << 20
_LARGE_COLUMN_BYTES = 256 << 20
"""Of a column in a row group: less than that is never too much at once, if its values are as long as its pages."""

Part = tuple[str, Callable[[list[str]], Iterable["pa.RecordBatch | pa.Table | Unread"]]]
"""A piece of a file that is read at once: its name, and a function that reads columns of it."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Rows that are not read, because they would take too much memory."""

    num_rows: int
    what: str


def parquet(path: Path) -> Source:
    """Open a Parquet file.

    Raises:
        InputError: It is none, or its end is missing.
    """
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"dataset.source {path} is not a whole Parquet file: {first_line(error)}; copy or download it again"
        ) from error
    parts: list[Part] = []
    start = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        name = f"row group {group} (rows {start} to {start + num_rows - 1})"
        parts.append((name, partial(_row_group, path, metadata, group)))
        start += num_rows
    return arrow_source(str(path), schema, parts)


def _row_group(
    path: Path, metadata: pq.FileMetaData, group: int, columns: list[str]
) -> Iterator[pa.RecordBatch | Unread]:
    row_group = metadata.row_group(group)
    sizes = list(column_sizes(path, row_group, columns))
    largest = max(sizes, key=lambda size: size.largest_page_bytes, default=None)
    if largest is not None and largest.largest_page_bytes > _MAX_PAGE_BYTES:
        size, limit = (f"{num_bytes >> 20:,} MiB" for num_bytes in (largest.largest_page_bytes, _MAX_PAGE_BYTES))
        what = f"row group {group} has {size} in one page of column {largest.name!r}, limit {limit}"
        remedy = "take long texts out of the source, or write it again with fewer rows in a row group"
        yield Unread(row_group.num_rows, f"{what}; {remedy}")
        return
    num_rows = min([ROWS_PER_BATCH, *(_BATCH_BYTES // max(1, _longest_value(size)) for size in sizes)])
    with pq.ParquetFile(path, metadata=metadata) as file:
        yield from file.iter_batches(max(1, num_rows), row_groups=[group], columns=columns)


def _longest_value(size: ColumnSize) -> int:
    """Return how long the values of a column may be; 1 if all together are not too long."""
    is_small = size.num_bytes <= _LARGE_COLUMN_BYTES
    return max(size.longest_shared_bytes, 1 if is_small else size.largest_page_bytes)


def arrow(path: Path) -> Source:
    """Open an Arrow IPC file, or a stream in a file, which `datasets` writes.

    Raises:
        InputError: It is neither.
    """
    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                file = pa.ipc.open_file(mapped)
            except pa.ArrowInvalid:
                mapped.seek(0)
                schema = pa.ipc.open_stream(mapped).schema
                return arrow_source(str(path), schema, [("the stream", partial(_stream, path))])
            schema, num_batches = file.schema, file.num_record_batches
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"dataset.source {path} is not a whole Arrow file: {first_line(error)}; copy or download it again"
        ) from error
    parts: list[Part] = [(f"record batch {at}", partial(_batch, path, at)) for at in range(num_batches)]
    return arrow_source(str(path), schema, parts)


def _batch(path: Path, at: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped:
        yield pa.ipc.open_file(mapped).get_batch(at).select(columns)


def _stream(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            yield batch.select(columns)


def arrow_source(name: str, schema: pa.Schema, parts: Iterable[Part]) -> Source:
    """Return the source of a table that is read in parts.

    Raises:
        InputError: When it is read: a part is damaged.
    """
    texts = frozenset(field.name for field in schema if _may_be_text(field.type))

    names = schema.names
    doubled = frozenset(column for column in names if names.count(column) > 1)

    def read(columns: Collection[str] | None = None) -> Iterator[Piece]:
        return _pieces(name, parts, [column for column in names if columns is None or column in columns])

    return Source(name, read, list(dict.fromkeys(names)), texts, doubled)


def _pieces(name: str, parts: Iterable[Part], columns: list[str]) -> Iterator[Piece]:
    index = 0
    for part, batches in parts:
        where = f"dataset.source {name}: {part}"
        try:
            for batch in batches(columns):
                if isinstance(batch, Unread):
                    yield from (too_large(index + at, batch.what) for at in range(batch.num_rows))
                    index += batch.num_rows
                    continue
                for piece in small_pieces(batch):
                    yield Block(index, piece, partial(_rows, where))
                    index += piece.num_rows
        except InputError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(where, index, error) from error


def _rows(where: str, batch: pa.RecordBatch | pa.Table, index: int) -> Iterator[RawRow]:
    try:
        yield from _values(batch, index)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(where, index, error) from error


def _damaged(where: str, index: int, error: Exception) -> InputError:
    return InputError(f"{where} is damaged, after row {index}: {first_line(error)}; copy or download the file again")


def _values(batch: pa.RecordBatch | pa.Table, index: int) -> Iterator[RawRow]:
    """Yield the rows of a batch, the first of which is row `index`; a value that has no Python form spoils its own row only."""
    if batch.num_rows == 1 and (num_row_bytes := size_of(batch)) > MAX_ROW_BYTES:
        largest = max(batch.schema.names, key=lambda name: size_of(batch.select([name])))
        yield too_large(
            index, f"the row has {num_row_bytes:,} bytes, limit {MAX_ROW_BYTES:,}, most in column {largest!r}"
        )
        return
    try:
        values = _python_rows(batch)
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for at in range(batch.num_rows):
                yield from _values(batch.slice(at, 1), index + at)
            return
        reason = Reason.INVALID_UTF8 if isinstance(error, UnicodeDecodeError) else Reason.NOT_TEXT
        yield RawRow(index, None, reason, f"column {_unreadable(batch)!r}: {first_line(error)}")
    else:
        for at, value in enumerate(values):
            yield RawRow(index + at, value)


def _unreadable(row: pa.RecordBatch | pa.Table) -> str:
    """Return the first column whose value has no Python form."""
    for name in row.schema.names:
        try:
            _python_rows(row.select([name]))
        except (ValueError, OverflowError):
            return str(name)
    return "?"


def _python_rows(batch: pa.RecordBatch | pa.Table) -> list[dict[str, object]]:
    """Return rows of Python values; lists of numbers are arrays, for an object for each number takes longer than reading it."""
    arrays = [_arrays(batch.column(place)) for place in range(batch.num_columns)]
    others = [place for place, values in enumerate(arrays) if values is None]
    rows: list[dict[str, Any]] = batch.select(others).to_pylist() if others else [{} for _ in range(batch.num_rows)]
    for name, values in zip(batch.schema.names, arrays, strict=True):
        for row, value in zip(rows, values or (), strict=False):
            row[name] = value
    decoders = {field.name: decode for field in batch.schema if (decode := _decoder(field.type)) is not None}
    for row in rows if decoders else ():
        row.update({name: decode(row[name]) for name, decode in decoders.items()})
    return rows


def _arrays(column: pa.Array | pa.ChunkedArray) -> "list[np.ndarray | None] | None":
    """Return a column of lists of numbers as arrays; None if it holds something else, or a list without a number somewhere."""
    lists = lists_of_numbers(column)
    if lists is None:
        return None
    values, lengths = lists
    ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False)).tolist()
    found: list[np.ndarray | None] = [values[start:end] for start, end in pairwise([0, *ends])]
    for index in np.flatnonzero(lengths.is_null().to_numpy(zero_copy_only=False)):
        found[index] = None
    return found


def lists_of_numbers(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array] | None:
    """Return the numbers of a column of lists, one after the other, `[N]`, and how many each has, null for no list, `[B]`.

    None if it holds something else, or a list without a number somewhere.
    """
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not is_number(kind.value_type):
        return None
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    numbers = lists.flatten()
    return None if numbers.null_count else (numbers.to_numpy(), pc.list_value_length(lists))


def is_number(kind: pa.DataType) -> bool:
    """Return whether a type has numbers."""
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return what turns values of a type into text and JSON values; None if there is nothing to do.

    Some writers do not mark their texts as UTF-8, so that they are bytes. `datasets` keeps a column of mixed types as JSON.
    """
    if isinstance(kind, pa.JsonType):
        return _or_none(json.loads)
    if _is_bytes(kind):
        return _or_none(lambda value: value.decode("utf-8"))
    if isinstance(kind, pa.DictionaryType):
        return _decoder(kind.value_type)
    inner = [_decoder(kind.field(at).type) for at in range(kind.num_fields)]
    if not any(inner):
        return None
    if pa.types.is_struct(kind):
        fields = {kind.field(at).name: decode for at, decode in enumerate(inner) if decode}
        return _or_none(lambda value: value | {name: decode(value[name]) for name, decode in fields.items()})
    if pa.types.is_map(kind):
        return None
    (decode,) = inner
    return _or_none(lambda values: [decode(value) for value in values] if decode else values)


def _or_none(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else decode(value)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _may_be_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        return _may_be_text(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or _is_bytes(kind) or isinstance(kind, pa.JsonType)
