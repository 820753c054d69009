"""Reads Parquet files, Arrow files and tables of `datasets`: only the columns that are asked for.

So a column that nobody needs cannot stop a build: no image is decoded, no date is converted.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.source.rows import RawRow, Source
from weights_store.errors import InputError
from weights_store.messages import first_line
from weights_store.schemas import Reason

_ROWS_PER_BATCH = 1000

Part = tuple[str, Callable[[list[str]], Iterable[pa.RecordBatch | pa.Table]]]
"""A piece of a file that is read at once: its name, and a function that reads columns of it."""


def parquet(path: Path) -> Source:
    """Open a Parquet file.

    Raises:
        InputError: It is none, or its end is missing.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"dataset.source {path} is not a whole Parquet file: {first_line(error)}; copy or download it again"
        ) from error
    parts: list[Part] = []
    start = 0
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        name = f"row group {group} (rows {start} to {start + num_rows - 1})"
        parts.append((name, partial(_row_group, file, group)))
        start += num_rows
    return arrow_source(str(path), file.schema_arrow, parts)


def _row_group(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    return file.iter_batches(_ROWS_PER_BATCH, row_groups=[group], columns=columns)


def arrow(path: Path) -> Source:
    """Open an Arrow IPC file, or a stream in a file, which `datasets` writes.

    Raises:
        InputError: It is neither.
    """
    try:
        mapped = pa.memory_map(str(path))
        try:
            file = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            stream = pa.ipc.open_stream(mapped)
            return arrow_source(str(path), stream.schema, [("the stream", partial(_stream, path))])
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"dataset.source {path} is not a whole Arrow file: {first_line(error)}; copy or download it again"
        ) from error
    parts: list[Part] = [(f"record batch {at}", partial(_batch, file, at)) for at in range(file.num_record_batches)]
    return arrow_source(str(path), file.schema, parts)


def _batch(file: pa.ipc.RecordBatchFileReader, at: int, columns: list[str]) -> list[pa.RecordBatch]:
    return [file.get_batch(at).select(columns)]


def _stream(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            yield batch.select(columns)


def arrow_source(name: str, schema: pa.Schema, parts: Iterable[Part]) -> Source:
    """Return the source of a table that is read in parts.

    Raises:
        InputError: When it is read: a part is damaged, or one of the asked columns stands twice.
    """
    texts = frozenset(field.name for field in schema if _is_text(field.type))

    def read(columns: Collection[str] | None = None) -> Iterator[RawRow]:
        wanted = (
            list(dict.fromkeys(schema.names)) if columns is None else [name for name in schema.names if name in columns]
        )
        twice = next((column for column in wanted if schema.names.count(column) > 1), None)
        if twice is not None:
            raise InputError(f"dataset.source {name} has the column {twice!r} twice; rename one of them")
        return _rows(name, parts, wanted)

    return Source(name, read, list(dict.fromkeys(schema.names)), texts)


def _rows(name: str, parts: Iterable[Part], columns: list[str]) -> Iterator[RawRow]:
    index = 0
    for part, batches in parts:
        try:
            for batch in batches(columns):
                for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                    piece = batch.slice(start, _ROWS_PER_BATCH)
                    yield from _values(piece, index)
                    index += piece.num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"dataset.source {name}: {part} is damaged, after row {index}: {first_line(error)}; copy or download the "
                "file again"
            ) from error


def _values(batch: pa.RecordBatch | pa.Table, index: int) -> Iterator[RawRow]:
    """Yield the rows of a batch, the first of which is row `index`; a value that has no Python form spoils its own row only."""
    try:
        values = batch.to_pylist()
        if any(_has_bytes(field.type) for field in batch.schema):
            values = [_decode(value) for value in values]
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for at in range(batch.num_rows):
                yield from _values(batch.slice(at, 1), index + at)
            return
        reason = Reason.INVALID_UTF8 if isinstance(error, UnicodeDecodeError) else Reason.NOT_TEXT
        yield RawRow(index, None, reason, f"columns {', '.join(batch.schema.names)}: {first_line(error)}")
    else:
        for at, value in enumerate(values):
            yield RawRow(index + at, value)


def _decode(value: Any) -> Any:
    """Return a value with bytes as text: some writers do not mark their columns as UTF-8."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    return {key: _decode(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _has_bytes(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        return _has_bytes(kind.value_type)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return is_bytes or any(_has_bytes(kind.field(at).type) for at in range(kind.num_fields))


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.DictionaryType):
        return _is_text(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or (_has_bytes(kind) and not kind.num_fields)
