"""One Delta table of the store: whole versions, exactly-once appends, metadata on every commit.

The Parquet files are ours (`shards.py`), the commit is `deltalake`'s. delta-rs rebases blind appends silently, so two
writers that both looked first could both append the same pair. Every commit here is therefore compare-and-set: it names
the version it was computed from, and on a lost race the rows already there are taken out before the next try.

Not here: what the rows mean (`pipeline`), names and listings (`store.py`).
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from weights_store.errors import ConflictError, NotFoundError, StoreError
from weights_store.schemas import SCHEMA_VERSION
from weights_store.shards import write_shard

_MAX_TRIES = 20
SHARD_BYTES = 64 << 20
"""About how large one shard may get, in compressed bytes."""
_ARROW_BYTES_PER_SHARD = 3 * SHARD_BYTES  # measured: about 3 Arrow bytes to one on disk


@dataclass(frozen=True, slots=True)
class TableVersion:
    """A reference to one version of one table: what tasks pass to each other instead of data."""

    store: str
    table: str
    version: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.table}@{self.version}"

    def as_parent(self) -> dict[str, Any]:
        """Return the reference as it stands in the lineage of a child: without the store's place."""
        return {"table": self.table, "version": self.version, "fingerprint": self.fingerprint}


class Table:
    """One table by its path under the store's root, for example `weights/hh-harmless/tis-dpo`."""

    def __init__(self, root: Path, path: str, schema: pa.Schema) -> None:
        self.root = root
        self.path = path
        self.schema = schema
        self.folder = root / path

    def exists(self) -> bool:
        """Return whether the table has at least one version."""
        return any((self.folder / "_delta_log").glob("*.json"))

    def version(self) -> int | None:
        """Return the newest version, None when there is none."""
        return int(self._open().version()) if self.exists() else None

    def reference(self, version: int | None = None) -> TableVersion:
        """Return the reference to one version, the newest by default.

        Raises:
            NotFoundError: There is no such table or version.
        """
        opened = self._open(version)
        metadata = self.metadata(opened.version())
        return TableVersion(str(self.root), self.path, opened.version(), metadata["fingerprint"])

    def metadata(self, version: int | None = None) -> dict[str, Any]:
        """Return what the commit of one version recorded: fingerprint, recipe, parents, statistics, packages.

        Raises:
            NotFoundError: There is no such table or version.
            StoreError: The commit is not ours or was written by a newer tokenweights.
        """
        wanted = self._open(version).version()
        for commit in self._open().history():
            if commit["version"] == wanted and "tokenweights" in commit:
                return self._checked_metadata(commit["tokenweights"], wanted)
        raise StoreError(
            f"{self.path}@{wanted} in {self.root} was not written by tokenweights: its commit has no metadata of ours"
        )

    def _checked_metadata(self, text: str, version: int) -> dict[str, Any]:
        metadata: dict[str, Any] = json.loads(text)
        if metadata["schema_version"] > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path}@{version} has schema version {metadata['schema_version']}, this tokenweights reads up to "
                f"{SCHEMA_VERSION}; upgrade tokenweights"
            )
        return metadata

    def history(self) -> list[dict[str, Any]]:
        """Return one record per version, newest first: version, time, operation, and our metadata.

        Raises:
            NotFoundError: There is no such table.
        """
        return [
            {
                "version": commit["version"],
                "timestamp_ms": commit.get("timestamp"),
                "metadata": self._checked_metadata(commit["tokenweights"], commit["version"]),
            }
            for commit in self._open().history()
            if "tokenweights" in commit
        ]

    def scan(self, version: int | None = None) -> pl.LazyFrame:
        """Return one version as a lazy frame.

        Raises:
            NotFoundError: There is no such table or version.
        """
        return pl.scan_delta(self._open(version))

    def shards(self, version: int | None = None) -> list[str]:
        """Return the names of the shards of one version, in the order in which they were written.

        Raises:
            NotFoundError: There is no such table or version.
        """
        actions = pa.table(self._open(version).get_add_actions())
        return sorted(actions.column("path").to_pylist())

    def open_shard(self, name: str) -> pq.ParquetFile:
        """Open one shard by its name from `shards`.

        Raises:
            StoreError: The file is gone, for example vacuumed away.
        """
        try:
            return pq.ParquetFile(self.folder / name)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.path}: shard {name} is missing; restore it or pin a version that does not need it"
            ) from error

    def num_rows(self, version: int | None = None) -> int:
        """Return the number of rows of one version."""
        return int(self.scan(version).select(pl.len()).collect().item())

    def pair_ids(self, version: int | None = None) -> pl.Series:
        """Return the `pair_id`s of one version, empty when the table does not exist yet."""
        if version is None and not self.exists():
            return pl.Series("pair_id", [], pl.String)
        return self.scan(version).select("pair_id").collect().to_series()

    def append(self, rows: pa.Table, metadata: Mapping[str, Any]) -> TableVersion:
        """Add the rows whose `pair_id` is not there yet, each exactly once, as one new version.

        Rows already there are left out; when nothing is left, the newest version is returned and nothing is written.

        Raises:
            ConflictError: Other writers won the race for the next version every time.
            StoreError: The folder cannot be written; nothing became visible.
        """
        rows = _distinct(self._conform(rows))
        for attempt in range(_MAX_TRIES):
            base = self.version()
            fresh = _without(rows, self.pair_ids(base)) if base is not None else rows
            if base is not None and fresh.num_rows == 0:
                return self.reference(base)
            reference = self._try_commit(fresh, metadata, base, mode="append")
            if reference is not None:
                return reference
            time.sleep(0.01 * 2 ** min(attempt, 6))
        raise ConflictError(
            f"{self.path}: lost the race for the next version {_MAX_TRIES} times; run again when fewer write"
        )

    def replace(self, rows: pa.Table, metadata: Mapping[str, Any]) -> TableVersion:
        """Write `rows` as the whole content of one new version; older versions stay readable.

        Raises:
            ConflictError: Another writer made a version in between.
            StoreError: The folder cannot be written; nothing became visible.
        """
        base = self.version()
        reference = self._try_commit(self._conform(rows), metadata, base, mode="overwrite")
        if reference is None:
            raise ConflictError(f"{self.path}: another writer made a version after {base}; run again")
        return reference

    def _open(self, version: int | None = None) -> Any:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        if not self.exists():
            raise NotFoundError(
                f"no table {self.path} in {self.root}; `tokenweights ls --store {self.root}` lists what is there"
            )
        try:
            return DeltaTable(str(self.folder), version=version)
        except (DeltaError, TableNotFoundError, ValueError) as error:
            newest = DeltaTable(str(self.folder)).version()
            raise NotFoundError(f"{self.path} has no version {version}; it has 0..{newest}") from error

    def _conform(self, rows: pa.Table) -> pa.Table:
        missing = [name for name in self.schema.names if name not in rows.column_names]
        if missing:
            raise StoreError(f"{self.path}: rows lack the columns {missing}; expected {self.schema.names}")
        return rows.select(self.schema.names).cast(self.schema)

    def _try_commit(
        self, rows: pa.Table, metadata: Mapping[str, Any], base: int | None, mode: str
    ) -> TableVersion | None:
        """Write the shards and commit them on top of version `base`; None when another writer was first."""
        from deltalake import CommitProperties, DeltaTable, Schema
        from deltalake.exceptions import CommitFailedError, DeltaError
        from deltalake.transaction import create_table_with_add_actions

        schema = Schema.from_arrow(self.schema)
        record = {"schema_version": SCHEMA_VERSION, **metadata, "num_rows_written": rows.num_rows}
        properties = CommitProperties(
            custom_metadata={"tokenweights": json.dumps(record, allow_nan=False)}, max_commit_retries=0
        )
        try:
            actions = self._write_shards(rows)
            if base is None:
                create_table_with_add_actions(
                    str(self.folder),
                    schema,
                    actions,
                    mode="error",
                    configuration={"delta.enableExpiredLogCleanup": "false"},  # else old versions vanish with their log
                    commit_properties=properties,
                )
                version = 0
            else:
                opened = DeltaTable(str(self.folder), version=base)
                opened.create_write_transaction(actions, mode, schema, commit_properties=properties)
                version = base + 1
        except DeltaError as error:
            # Lost only if somebody else made a version meanwhile; a first version that is there already is a plain DeltaError.
            if (isinstance(error, CommitFailedError) or base is None) and self.version() != base:
                return None
            raise StoreError(f"cannot commit {self.path} in {self.root}: {error}; nothing became visible") from error
        except OSError as error:
            raise StoreError(f"cannot write {self.path} in {self.root}: {error}; nothing became visible") from error
        return TableVersion(str(self.root), self.path, version, record["fingerprint"])

    def _write_shards(self, rows: pa.Table) -> list[Any]:
        from deltalake.transaction import AddAction

        self.folder.mkdir(parents=True, exist_ok=True)
        actions = []
        rows_per_shard = max(1, int(rows.num_rows * _ARROW_BYTES_PER_SHARD / max(rows.nbytes, 1)))
        now_ms = int(time.time() * 1000)
        # Names sort in writing order, within a commit and across commits, so that readers agree on the order of rows.
        stem = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        for part, start in enumerate(range(0, rows.num_rows, rows_per_shard)):
            piece = rows.slice(start, rows_per_shard)
            name = f"{stem}-{part:05d}.parquet"
            size = write_shard(piece, self.folder / name)
            stats = json.dumps({"numRecords": piece.num_rows})
            actions.append(AddAction(name, size, {}, now_ms, True, stats))
        return actions


def _distinct(rows: pa.Table) -> pa.Table:
    """Keep the first row of every `pair_id`."""
    if pc.count_distinct(rows["pair_id"]).as_py() == rows.num_rows:
        return rows
    first = pl.Series(rows["pair_id"].to_pylist()).is_first_distinct()
    return rows.filter(pa.array(first.to_list()))


def _without(rows: pa.Table, pair_ids: pl.Series) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["pair_id"], pair_ids.to_arrow().cast(pa.string()))))
