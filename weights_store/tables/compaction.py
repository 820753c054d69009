"""Compaction: the same rows in fewer shards, sorted by key throughout.

Many small appends leave many small shards whose key ranges overlap. Merging them makes opening, range reads and training
faster. The checksums of columns are sums over rows, so they must stay the same.
"""

import errno
from itertools import pairwise

import polars as pl

from weights_store.errors import DamageError
from weights_store.tables.checksums import sum_checksums
from weights_store.tables.shards import SHARD_BYTES
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion

_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


def optimize(table: Table, max_bytes: int = 1 << 30) -> TableVersion | None:
    """Compact the newest version of a table into fewer, sorted shards; return None if there is nothing to do.

    Rows, fingerprint and column checksums do not change; older versions stay readable. `max_bytes` is the memory for one range
    of keys.

    Raises:
        ConflictError: Another writer made a version meanwhile; nothing changed.
        DamageError: A shard is not what was committed, or the new shards would not hold the same rows.
        StoreError: The folder cannot be written; nothing changed.
    """
    with table.reading():
        try:
            return _compact(table, max_bytes)
        except OSError as error:
            if error.errno in _NO_WRITING:
                raise table.cannot_write(error) from error
            raise


def _compact(table: Table, max_bytes: int) -> TableVersion | None:
    base = table.reference()
    old = table.records(base.version)
    spans = sorted((record.first_key, record.last_key) for record in old)
    overlap = any(left[1] >= right[0] for left, right in pairwise(spans))
    num_needed = 1 + sum(record.num_bytes for record in old) // (SHARD_BYTES // 2)
    if not overlap and len(old) <= num_needed:
        return None
    writer = table.writer()
    for piece in table.key_ranges(max_bytes, base.version):
        frame: pl.DataFrame = table.scan(base.version, within=piece).collect()
        writer.write(frame.sort(table.key).to_arrow())
    new = writer.finish()
    if sum_checksums(record.sums for record in new) != sum_checksums(record.sums for record in old):
        raise DamageError(
            f"{base}: the rows read are not those that were committed; nothing was changed. "
            "`tokenweights verify` names the damaged shard"
        )
    metadata = {**table.metadata(base.version), "changes": [f"optimized: {len(old)} shards -> {len(new)}"]}
    return table.commit(new, metadata, base.version, removed=old)
