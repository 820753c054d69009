"""Where to cut a table's keys, so that one range of them fits in memory, without reading the table.

Called by `TableReader.key_ranges`. Row groups are sorted by key. As long as their spans lie apart, the first key of each
stands for all its bytes and only footers are read. Where spans overlap, as after appends in any order, first keys all lie
at the low end: there some keys of the row group itself are read.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from weights_store.tables.shards import ShardRecord
    from weights_store.tables.table_reader import TableReader

_SAMPLES = 16
"""Keys that stand for one row group whose span overlaps others."""


class KeyRange(NamedTuple):
    """Rows whose first key column is at least `low` and below `high`; None is open."""

    low: str | int | None
    high: str | int | None

    def of(self, frame: pl.LazyFrame, key: str = "pair_id") -> pl.LazyFrame:
        """Return the rows of `frame` in this range; the condition reaches the files."""
        if self.low is not None:
            frame = frame.filter(pl.col(key) >= self.low)
        return frame if self.high is None else frame.filter(pl.col(key) < self.high)


class _RowGroup(NamedTuple):
    first: Any
    last: Any
    shard: str
    position: int
    num_bytes: int


def cuts(table: "TableReader", records: "list[ShardRecord]", num_ranges: int) -> list[Any]:
    """Return at most `num_ranges` - 1 keys, rising, between which lie about equally many bytes.

    Raises:
        DamageError: A shard cannot be read.
    """
    samples = sorted(_samples(table, records))
    step = sum(num_bytes for _, num_bytes in samples) / num_ranges
    found: list[Any] = []
    last, cut_at = samples[0][0], 0.0
    for below, (key, _) in zip(accumulate(num_bytes for _, num_bytes in samples), samples[1:], strict=False):
        if below - cut_at >= step and key > last:
            found.append(key)
            last, cut_at = key, below
    return found


def _samples(table: "TableReader", records: "list[ShardRecord]") -> Iterator[tuple[Any, float]]:
    """Yield keys, each with the bytes of the rows from it to the next key of its row group."""
    groups = sorted(group for record in records for group in _row_groups(table, record))
    ends = list(accumulate((group.last for group in groups), max))
    for index, group in enumerate(groups):
        reached = index > 0 and ends[index - 1] >= group.first
        reaches = index + 1 < len(groups) and group.last >= groups[index + 1].first
        keys = _own_keys(table, group) if reached or reaches or len(groups) == 1 else [group.first]
        yield from ((key, group.num_bytes / len(keys)) for key in keys)


def _row_groups(table: "TableReader", record: "ShardRecord") -> Iterator[_RowGroup]:
    with table.reading(), table.location.filesystem.open_input_file(record.name) as file:
        footer = pq.read_metadata(file)
        column = footer.schema.to_arrow_schema().names.index(table.key[0])
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            span = group.column(column).statistics
            yield _RowGroup(span.min, span.max, record.name, index, group.total_byte_size)


def _own_keys(table: "TableReader", group: _RowGroup) -> list[Any]:
    with table.reading(), table.location.filesystem.open_input_file(group.shard) as file:
        column = pq.ParquetFile(file).read_row_group(group.position, columns=[table.key[0]])[table.key[0]]
        keys = column.to_pylist()
    return keys[:: -(-len(keys) // _SAMPLES)]
