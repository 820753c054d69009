"""Compaction: the same rows in fewer shards, sorted by key throughout.

Many small appends leave many small shards whose key ranges overlap. Merging them makes opening, range reads and training
faster. Nobody's identity changes: the checksums of the columns are sums over rows, and must come out the same. A column that
some of the shards are too old for counts as null there.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa

from weights_store.errors import DamageError
from weights_store.tables import shards
from weights_store.tables.checksums import column_checksums
from weights_store.tables.shards import ShardRecord, ShardWriter, lacking, sum_checksums, with_nulls
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion


def compact(table: Table, max_bytes: int) -> TableVersion | None:
    """Rewrite the newest version, see `Table.optimize`."""
    base = table.reference()
    old = table.records(base.version)
    if not _is_worth_it(old):
        return None
    scan = table.scan(base.version)
    # Columns that came after all of these shards were written do not come in by compaction: the rows stay what they are.
    schema = pa.schema([field for field in table.schema if any(field.name in record.checksums for record in old)])
    writer = ShardWriter(table.location, schema, table.key)
    for piece in table.key_ranges(max_bytes, base.version):
        frame: pl.DataFrame = piece.of(scan, table.key[0]).collect()
        writer.write(frame.sort(table.key).to_arrow().select(schema.names).cast(schema))
    new = writer.finish()
    recorded = [*(record.sums for record in old), *_sums_of_nulls(table, old, schema)]
    if sum_checksums(record.sums for record in new) != sum_checksums(recorded):
        raise DamageError(
            f"{base}: the rows read are not those that were committed; nothing was changed. "
            "`tokenweights verify` names the damaged shard"
        )
    metadata = table.metadata(base.version) | {"changes": [f"optimized: {len(old)} shards -> {len(new)}"]}
    return table._commit_actions(new, metadata, base.version, "append", removed=tuple(old))


def _sums_of_nulls(table: Table, records: list[ShardRecord], schema: pa.Schema) -> Iterator[dict[str, int]]:
    """Yield what the columns that a shard lacks add to the checksums: nulls, once they are written."""
    for record in records:
        later = lacking(schema, record.checksums)
        for keys in table.open_shard(record).groups(table.key) if later else ():
            sums = column_checksums(with_nulls(keys, later), table.key)
            yield {field.name: sums[field.name] for field in later}


def _is_worth_it(records: list[ShardRecord]) -> bool:
    """Return whether the shards are more than the bytes need, or their key ranges overlap."""
    spans: list[tuple[Any, Any]] = sorted((record.first_key, record.last_key) for record in records)
    overlap = any(left[1] >= right[0] for left, right in pairwise(spans))
    return overlap or len(records) > 1 + sum(record.num_bytes for record in records) // (shards.SHARD_BYTES // 2)
