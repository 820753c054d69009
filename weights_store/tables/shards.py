"""Writes Parquet shards in the layout of the store, and reads them back checked.

Float lists: mantissa rounded to 12 bits, BYTE_STREAM_SPLIT, zstd, never a dictionary (pyarrow's default is the worst
choice for floats). Ids: int32 with BYTE_STREAM_SPLIT. Row groups of about a MiB of tokens, so that a trainer can seek.

The checksums of every row group are in the shard's footer, and their sums in the commit that made the shard visible. So a
single row group can be checked against the commit. A digest of all bytes covers the rest of the file.
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from weights_store.errors import DamageError
from weights_store.location import Location
from weights_store.tables.checksums import column_checksums, sum_checksums

MANTISSA_BITS = 12
"""Explicit mantissa bits kept of float32's 23: relative error at most 2**-13 = 1.2e-4."""

ROW_GROUP_BYTES = 4 << 20
"""Uncompressed Arrow bytes of one row group: about a MiB of each kind of token column."""

SHARD_BYTES = 64 << 20
"""About how large one shard may get, in compressed bytes."""

_BLOCK = 1 << 16

RESTORE = "restore the file from a copy, or build the table again"
"""What to do about a damaged shard."""

_FOOTER_KEY = b"tokenweights.checksums"


@dataclass(frozen=True)
class ShardRecord:
    """What a commit records of one shard."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str
    first_key: Any  # str or int, the same in a whole table
    last_key: Any
    checksums: Mapping[str, str]
    """16 hex digits per column, see `checksums.py`."""
    group_sizes: Sequence[int]
    """Rows of each row group: a trainer plans its order without opening any shard."""

    @property
    def sums(self) -> dict[str, int]:
        """The checksums as numbers."""
        return {name: int(text, 16) for name, text in self.checksums.items()}


def round_mantissa(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round float32 values to `MANTISSA_BITS` mantissa bits, ties to even. Signs, zeros, infinities and NaN stay."""
    drop = 23 - MANTISSA_BITS
    rounded = np.array(values, dtype=np.float32)
    for start in range(0, rounded.size, _BLOCK):  # what is made on the way stays in the processor's cache
        given = values[start : start + _BLOCK]
        raw = rounded[start : start + _BLOCK].view(np.uint32)
        # Add half a step, less one unless the kept part is odd: ties to even.
        raw += (raw >> np.uint32(drop)) & np.uint32(1)
        raw += np.uint32((1 << (drop - 1)) - 1)
        raw &= np.uint32(~((1 << drop) - 1) & 0xFFFFFFFF)
        is_finite = np.isfinite(given)
        if not is_finite.all():
            rounded[start : start + _BLOCK][~is_finite] = given[~is_finite]
    return rounded


def _round_floats(rows: pa.Table) -> pa.Table:
    for index, field in enumerate(rows.schema):
        column = rows.column(index).chunk(0)  # a row group's columns have one chunk each
        is_float = pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)
        if is_float and column.null_count < len(column):
            values = pa.array(round_mantissa(column.values.to_numpy(zero_copy_only=False)), pa.float32())
            mask = column.is_null() if column.null_count else None
            rounded = pa.ListArray.from_arrays(column.offsets, values, type=column.type, mask=mask)
            rows = rows.set_column(index, field, rounded)
    return rows


class Written(NamedTuple):
    """The rows of one range of keys in shards that nobody sees yet; `few` are those for which a shard would be too small."""

    shards: list[ShardRecord]
    few: pa.Table


class ShardWriter:
    """Writes rows in the order they come, sorted by `key`, as shards of about `SHARD_BYTES` into the table's folder.

    It needs the memory of one shard. Readers see nothing before the records that `finish` returns are committed.

    Raises:
        OSError: From `write` and `finish`: the folder cannot be written or the disk is full. With `cannot_write` the error
            that this makes of it.
    """

    def __init__(
        self,
        folder: Location,
        schema: pa.Schema,
        key: Sequence[str],
        cannot_write: Callable[[OSError], Exception] | None = None,
    ) -> None:
        self.folder = folder
        self.cannot_write = cannot_write
        self.schema = schema
        self.key = list(key)
        self.records: list[ShardRecord] = []
        # The time is for people who list the folder. Clocks differ, so the order of rows is that of the commits.
        self._stem = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        self._waiting: list[pa.Table] = []
        self._shard: _OpenShard | None = None

    def write(self, rows: pa.Table) -> None:
        """Add rows."""
        if not rows.num_rows:
            return
        self._waiting.append(rows.select(self.schema.names).cast(self.schema))
        if sum(table.nbytes for table in self._waiting) >= ROW_GROUP_BYTES:
            self._write_groups(is_last=False)

    def write_shard(self, groups: Iterable[pa.Table]) -> None:
        """Write a shard with exactly these row groups, at least one: the copy of another one."""
        self.finish()
        self._shard = _OpenShard(self.schema)
        for rows in groups:
            rows = rows.select(self.schema.names).cast(self.schema)
            self._shard.write_group(_round_floats(rows.combine_chunks()), self.key)
        self._close_shard()

    def take(self, part: Written) -> None:
        """Add what another writer has written of a later range of keys; the records stay in the order of the keys."""
        if part.shards:
            self.finish()
            self.records += part.shards
        self.write(part.few)

    def finish_part(self) -> Written:
        """Write what is left and return the records of all shards; rows fewer than a row group are returned themselves."""
        if self._shard is None and not self.records and self._waiting:
            few, self._waiting = pa.concat_tables(self._waiting), []
            return Written([], few)
        return Written(self.finish(), self.schema.empty_table())

    def finish(self) -> list[ShardRecord]:
        """Write what is left and return the records of all shards."""
        self._write_groups(is_last=True)
        self._close_shard()
        return self.records

    def _write_groups(self, is_last: bool) -> None:
        if not self._waiting:
            return
        rows = pa.concat_tables(self._waiting)
        num_groups = max(1, round(rows.nbytes / ROW_GROUP_BYTES))
        size = -(-rows.num_rows // num_groups)
        start = 0
        while start < rows.num_rows and (is_last or rows.num_rows - start >= size):
            if self._shard is None:
                self._shard = _OpenShard(self.schema)
            self._shard.write_group(_round_floats(rows.slice(start, size).combine_chunks()), self.key)
            if self._shard.num_bytes >= SHARD_BYTES:
                self._close_shard()
            start += size
        # A copy, or the remainder would keep the whole table alive.
        self._waiting = [rows.slice(start).combine_chunks()] if start < rows.num_rows else []

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        name = f"{self._stem}-{len(self.records):05d}.parquet"
        data, record = self._shard.close(name)
        self._shard = None
        try:
            self.folder.write(name, data)
        except OSError as error:
            if self.cannot_write is None:
                raise
            raise self.cannot_write(error) from (error if self.folder.is_local else None)
        self.records.append(record)


class _OpenShard:
    """One shard being built in memory."""

    def __init__(self, schema: pa.Schema) -> None:
        self._sink = pa.BufferOutputStream()
        lists = [field.name for field in schema if pa.types.is_list(field.type)]
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression="zstd",
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in lists},
            use_dictionary=[field.name for field in schema if field.name in ("split", "reason")],
            write_statistics=["pair_id", "source_row"],
        )
        self._groups: list[dict[str, int]] = []
        self._sizes: list[int] = []
        self._keys: list[Any] = []

    @property
    def num_bytes(self) -> int:
        return int(self._sink.tell())

    def write_group(self, rows: pa.Table, key: list[str]) -> None:
        self._groups.append(column_checksums(rows, key))
        self._writer.write_table(rows, row_group_size=rows.num_rows)
        self._sizes.append(rows.num_rows)
        self._keys += [rows[key[0]][0].as_py(), rows[key[0]][-1].as_py()]

    def close(self, name: str) -> tuple[pa.Buffer, ShardRecord]:
        names = list(self._groups[0])
        groups = [[f"{group[column]:016x}" for column in names] for group in self._groups]
        self._writer.add_key_value_metadata({_FOOTER_KEY: json.dumps({"columns": names, "groups": groups})})
        self._writer.close()
        data = self._sink.getvalue()
        record = ShardRecord(
            name=name,
            num_rows=sum(self._sizes),
            num_bytes=data.size,
            sha256=hashlib.sha256(data).hexdigest(),
            first_key=min(self._keys),
            last_key=max(self._keys),
            checksums={column: f"{value:016x}" for column, value in sum_checksums(self._groups).items()},
            group_sizes=self._sizes,
        )
        return data, record


_checked: set[tuple[object, ...]] = set()
"""Shards of which this process has seen the right bytes."""


def check_bytes(folder: Location, record: ShardRecord, where: str) -> None:
    """Compare the bytes of a shard with its record, once per process unless the file has changed since.

    Raises:
        DamageError: The file is missing or is not what was written.
        StoreError: It cannot be read now, because of its permissions, the disk or the network.
    """
    place = f"{where}: shard {record.name}"
    try:
        seen = (folder.uri, record.name, record.sha256, folder.state(record.name))
        if seen in _checked:
            return
        sha256 = hashlib.sha256()
        for data in folder.stream(record.name):
            sha256.update(data)
    except FileNotFoundError as error:
        raise DamageError(f"{place} is missing; restore it or pin a version that does not need it") from error
    if sha256.hexdigest() != record.sha256:
        raise DamageError(f"{place} is not the file that was committed (SHA-256 differs); {RESTORE}")
    _checked.add(seen)


class ShardReader:
    """One open shard; every row group that it returns has been checked against the commit.

    Raises:
        DamageError: The file is missing, or its footer does not agree with the commit.
    """

    def __init__(self, folder: Location, record: ShardRecord, key: Sequence[str], where: str) -> None:
        self.record = record
        self.where = where
        self._key = list(key)
        try:
            self._file = pq.ParquetFile(folder.filesystem.open_input_file(record.name))
        except FileNotFoundError as error:
            raise DamageError(
                f"{where}: shard {record.name} is missing; restore it or pin a version that does not need it"
            ) from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DamageError(f"{where}: shard {record.name} cannot be opened: {error}; {RESTORE}") from error
        self._groups = self._recorded_groups()

    @property
    def group_sizes(self) -> list[int]:
        """Rows of every row group."""
        return [self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups)]

    def read_group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the columns (all by default) of one row group, checked.

        Raises:
            DamageError: The values are not those that were committed. Names the row group, the column and its keys.
        """
        names = list(columns) if columns is not None else list(self._groups[index])
        wanted = list(dict.fromkeys([*names, *self._key]))
        where = f"{self.where}, shard {self.record.name}, row group {index}"
        try:
            rows = self._file.read_row_group(index, columns=wanted).select(wanted)  # pyarrow passes over missing ones
            found = column_checksums(rows, self._key)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # also bad UTF-8 and missing columns
            raise DamageError(f"{where}: cannot be decoded: {error}; {RESTORE}") from error
        for name, checksum in found.items():
            if checksum != self._groups[index][name]:
                span = f"{rows[self._key[0]][0]} … {rows[self._key[0]][-1]}"
                raise DamageError(
                    f"{where}: column {name} is not what was committed (rows {self._key[0]} {span}); {RESTORE}"
                )
        return rows.select(names)

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield every row group, checked, see `read_group`."""
        for index in range(self._file.num_row_groups):
            yield self.read_group(index, columns)

    def _recorded_groups(self) -> list[dict[str, int]]:
        """Return the checksums of each row group from the footer, which must add up to those in the commit."""
        try:
            recorded = json.loads((self._file.metadata.metadata or {})[_FOOTER_KEY])
            groups = [
                {name: int(text, 16) for name, text in zip(recorded["columns"], group, strict=True)}
                for group in recorded["groups"]
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise DamageError(f"{self.where}: shard {self.record.name} has a broken footer; {RESTORE}") from error
        total = sum_checksums(groups)
        if (
            total != self.record.sums
            or len(groups) != self._file.num_row_groups
            or sum(self.group_sizes) != self.record.num_rows
            or list(self.record.group_sizes) != self.group_sizes
        ):
            raise DamageError(
                f"{self.where}: shard {self.record.name} is not the file that was committed: its footer's checksums or rows "
                f"differ; {RESTORE}"
            )
        return groups
