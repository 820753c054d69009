"""Compaction: the same rows in fewer shards, sorted by key throughout.

Many small appends leave many small shards whose key ranges overlap. Merging them makes opening, range reads and training
faster. Nobody's identity changes: the checksums of the columns are sums over rows, and must come out the same.
"""

from itertools import pairwise
from typing import Any

import polars as pl

from weights_store import shards
from weights_store.errors import DamageError
from weights_store.shards import ShardRecord, sum_checksums
from weights_store.table import Table, TableVersion


def compact(table: Table, max_bytes: int) -> TableVersion | None:
    """Rewrite the newest version, see `Table.optimize`."""
    base = table.reference()
    old = table.records(base.version)
    if not _is_worth_it(old):
        return None
    scan = table.scan(base.version)
    writer = table.writer()
    for piece in table.key_ranges(max_bytes, base.version):
        frame: pl.DataFrame = piece.of(scan, table.key[0]).collect()
        writer.write(frame.sort(table.key).to_arrow().select(table.schema.names).cast(table.schema))
    new = writer.finish()
    if sum_checksums(r.sums for r in new) != sum_checksums(r.sums for r in old):
        raise DamageError(
            f"{base}: the rows read are not those that were committed; nothing was changed. "
            "`tokenweights verify` names the damaged shard"
        )
    metadata = table.metadata(base.version) | {"changes": [f"optimized: {len(old)} shards -> {len(new)}"]}
    return table._commit_actions(new, metadata, base.version, "append", removed=tuple(old))


def _is_worth_it(records: list[ShardRecord]) -> bool:
    """Return whether the shards are more than the bytes need, or their key ranges overlap."""
    spans: list[tuple[Any, Any]] = sorted((record.first_key, record.last_key) for record in records)
    overlap = any(left[1] >= right[0] for left, right in pairwise(spans))
    return overlap or len(records) > 1 + sum(record.num_bytes for record in records) // (shards.SHARD_BYTES // 2)
