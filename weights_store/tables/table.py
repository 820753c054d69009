"""Writes to one Delta table of the store: whole versions, exactly-once appends, metadata and checksums on every commit.

The Parquet files are ours (`shards.py`), the commit is `deltalake`'s. delta-rs silently rebases blind appends, so two writers
that both looked first could both append the same pair. Every commit here is therefore compare-and-set: it names the version it
was computed from, and after a lost race the rows that are there by now are removed before the next try.

Not here: reading (`table_reader.py`), what the rows mean (`pipeline`), finding tables (`catalog.py`).
"""

import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from weights_store.errors import ConflictError, StoreError
from weights_store.location import one_line
from weights_store.messages import remedy_of
from weights_store.schemas import SCHEMA_VERSION
from weights_store.tables.commits import custom_metadata, delta_actions, digest_names, log_name
from weights_store.tables.locks import shared_with_writers
from weights_store.tables.metadata import LogRecord
from weights_store.tables.notes import put_notes
from weights_store.tables.shards import ShardRecord, ShardWriter
from weights_store.tables.table_reader import TableReader, TableVersion

if TYPE_CHECKING:
    from deltalake import DeltaTable

_MAX_TRIES = 20


class Table(TableReader):
    """One table, by its path under the store's root, for reading and writing.

    `metadata` is what a commit records, at least a `fingerprint`. `known` is a version that holds none of the new rows, so only
    later shards are searched. Every method that writes raises StoreError if the rows do not fit, the table is not ours or is
    newer, or the folder cannot be written; then nothing became visible.
    """

    def write_shards(self, rows: pa.Table) -> list[ShardRecord]:
        """Write rows, in any order, as shards for `append_shards`. Readers see nothing before those are committed."""
        return self._write(self._conform(rows))

    def writer(self) -> ShardWriter:
        """Return a writer of shards for `commit`, which raises StoreError; its rows must come sorted by the key."""
        return ShardWriter(self.location, self.schema, self.key, self.cannot_write)

    def append(self, rows: pa.Table, metadata: Mapping[str, object], known: int | None = None) -> TableVersion:
        """Add the rows whose key is not there yet, each exactly once, as one new version.

        If all are there, nothing is written and the newest version is returned.

        Raises:
            ConflictError: Other writers won the race for the next version every time.
        """
        rows = self._conform(rows)
        is_first = pl.DataFrame(pl.from_arrow(rows.select(self.key))).select(pl.struct(self.key).is_first_distinct())
        rows = rows.filter(is_first.to_series().to_arrow())

        def write_new(version: int | None, since: int | None) -> list[ShardRecord]:
            fresh = self._without_present(rows, version, since)
            return self._write(fresh) if fresh.num_rows else []

        return self._append(write_new, metadata, known)

    def append_shards(
        self, shards: list[ShardRecord], metadata: Mapping[str, object], known: int | None = None
    ) -> TableVersion:
        """Add the rows of shards that are already written, each key exactly once, as one new version.

        A shard with rows that are already there is rewritten without them; the old file is never committed. If all rows are
        there, the newest version is returned. The shards are from `write_shards`, possibly of other processes; no key is in
        two of them.

        Raises:
            ConflictError: Other writers won the race for the next version every time.
            StoreError: Also if a shard is not in the table's folder, or no longer when it is to become visible.
            DamageError: A shard that must be rewritten is not what was written.
        """
        self._check_there(shards)
        return self._append(
            lambda version, since: self._shards_without_present(shards, version, since), metadata, known
        )

    def _append(
        self,
        write_new: Callable[[int | None, int | None], list[ShardRecord]],
        metadata: Mapping[str, object],
        known: int | None,
    ) -> TableVersion:
        """Commit the new rows, and look again whenever another writer was faster.

        `write_new` returns shards with the rows whose key is in no shard of one version that another had not already.
        """
        base = self._checked_version()
        fresh = write_new(base, known)
        for attempt in range(_MAX_TRIES):
            if base is not None and not fresh:
                return self.reference(base)
            try:
                return self.commit(fresh, metadata, base)
            except ConflictError:
                time.sleep(random.uniform(0.002, 0.01) * 2 ** min(attempt, 6))
            newest = self._checked_version()
            if base is not None and not set(self.shards(base)) <= set(self.shards(newest)):
                fresh = write_new(newest, known)  # the table was replaced: older rows may be gone
            else:
                fresh = self._shards_without_present(fresh, newest, base)
            base = newest
        raise ConflictError(
            f"{self.path}: lost the race for the next version {_MAX_TRIES} times; run again when fewer processes write"
        )

    def replace(self, rows: pa.Table, metadata: Mapping[str, object]) -> TableVersion:
        """Write `rows` as the whole content of one new version; older versions stay readable.

        Raises:
            ConflictError: Another writer made a version in between; nothing became visible.
        """
        base = self._checked_version()
        return self.commit(self._write(self._conform(rows)), metadata, base, mode="overwrite")

    def commit(
        self,
        shards: Sequence[ShardRecord],
        metadata: Mapping[str, object],
        base: int | None,
        mode: Literal["append", "overwrite"] = "append",
        removed: Sequence[ShardRecord] = (),
    ) -> TableVersion:
        """Make shards of a `writer` visible as version `base` + 1, or fail.

        `base` is the version that the rows were computed from, None for the first. With `overwrite` the shards are the whole
        content of the new version. `removed` are shards whose rows are in `shards` too, which it no longer needs.

        Raises:
            ConflictError: Another writer made that version first; nothing became visible.
        """
        from deltalake import CommitProperties, Schema
        from deltalake.exceptions import DeltaError

        commit_id = uuid.uuid4().hex
        num_rows = sum(shard.num_rows for shard in shards)
        record = {"schema_version": SCHEMA_VERSION, **metadata, "num_rows_written": num_rows, "commit_id": commit_id}
        opened = None if base is None else self.open_delta(base)
        record["log"] = log = self._log_record(shards, opened, mode, removed)
        properties = CommitProperties(custom_metadata=custom_metadata(record, shards), max_commit_retries=0)
        schema, actions = Schema.from_arrow(self.schema), delta_actions(self.key[0], shards, removed)
        version = log["version"]
        self._commits.pop(version, None)  # of before a repair
        try:
            with shared_with_writers(self.location):
                self._check_there(shards)
                if opened is not None and not self.location.exists(log_name(opened.version())):
                    problem = f"{self.path}: `tokenweights repair` moved version {base} away while this was written"
                    raise StoreError(f"{problem}; nothing became visible, run again")
                if opened is None:
                    self._create(schema, actions, properties)
                else:
                    opened.create_write_transaction(actions, mode, schema, commit_properties=properties)
        except (DeltaError, OSError) as error:
            # The error does not say whether the commit was made: its reply may be lost, or another writer made the version.
            if not self.location.exists(log_name(version)):
                raise self.cannot_write(error) from self.cause(error)
            made = self.read_commit(version).metadata
            if made is None or made["commit_id"] != commit_id:
                problem = f"{self.path}: another writer made version {version} first; run again"
                raise ConflictError(problem) from self.cause(error)
        return TableVersion(str(self.root), self.path, version, str(metadata["fingerprint"]))

    def _log_record(
        self, shards: Sequence[ShardRecord], opened: "DeltaTable | None", mode: str, removed: Sequence[ShardRecord]
    ) -> LogRecord:
        """Return what the commit of the version after the opened one says of the log.

        Raises:
            DamageError: The log so far is not what was committed: nothing may be built on it.
        """
        base = None if opened is None else self.read_commit(opened.version())
        files = set() if base is None else set(self.names_in(opened, base))
        gone = files if mode == "overwrite" else {shard.name for shard in removed}
        num_rows = sum(shard.num_rows for shard in shards)
        if base is not None and mode == "append":
            num_rows += self.num_rows(base.version) - sum(shard.num_rows for shard in removed)
        return {
            "table": self.path,
            "version": 0 if base is None else base.version + 1,
            "base": None if base is None else base.digest,
            "removed": sorted(gone),
            "files": digest_names(files - gone | {shard.name for shard in shards}),
            "num_rows": num_rows,
            "written_ms": time.time_ns() // 1_000_000,
        }

    def _check_there(self, shards: Sequence[ShardRecord]) -> None:
        """Check that the files of shards exist: a commit that names missing ones would make the table unreadable."""
        for info in self.location.info([shard.name for shard in shards]):
            if not info.is_file:
                raise StoreError(
                    f"{self.path}: shard {info.path} was written, but is no longer in {self.location}: `tokenweights vacuum` "
                    "with a short retention deleted it, or several machines write a store that is not in storage that all of "
                    "them share; nothing became visible, run again"
                )

    def cannot_write(self, error: BaseException) -> StoreError:
        """Return the error to raise if a shard or a commit cannot be written."""
        # The name of a partial file says nothing to anybody.
        reason = error.strerror if isinstance(error, OSError) and error.filename else one_line(error)
        return StoreError(
            f"cannot write {self.path} in {self.root}: {reason}; nothing became visible{remedy_of(error)}"
        )

    def check_place(self) -> None:
        """Check that this table is neither inside another one's folder nor around one: listings and `vacuum` see whole folders.

        Raises:
            StoreError: It is.
        """
        kind, *parts = self.path.split("/")
        above = ["/".join([kind, *parts[:count]]) for count in range(1, len(parts))]
        inside = [f"{self.path}/{name}" for name in self.location.folders()]
        for path in (*above, *inside):
            if (self.root / path).exists("_delta_log"):
                raise StoreError(
                    f"{self.path} and the table {path} in {self.root} would be nested; choose another name"
                )

    def _create(self, schema: object, actions: list[object], properties: object) -> None:
        from deltalake.transaction import create_table_with_add_actions

        self.check_place()
        if self.location.is_local:
            self.location.path.mkdir(parents=True, exist_ok=True)
        put_notes(self.root, self.location)
        create_table_with_add_actions(
            str(self.location),
            schema,
            actions,
            mode="error",
            configuration=self.configuration,
            commit_properties=properties,
            storage_options=self.location.storage_options,
        )

    def _conform(self, rows: pa.Table) -> pa.Table:
        missing = [name for name in self.schema.names if name not in rows.column_names]
        if missing:
            raise StoreError(f"{self.path}: rows lack the columns {missing}; expected {self.schema.names}")
        try:
            rows = rows.select(self.schema.names).cast(self.schema)
        except (pa.ArrowException, ValueError) as error:
            raise StoreError(f"{self.path}: rows do not fit the columns of the table: {one_line(error)}") from error
        for name in self.schema.names:
            if pa.types.is_list(rows[name].type) and pc.list_flatten(rows[name]).null_count:
                raise StoreError(f"{self.path}: rows have no value inside a list of column {name}; expected a number")
        return rows

    def _without_present(self, rows: pa.Table, version: int | None, since: int | None) -> pa.Table:
        """Return the rows whose key is in no shard of `version` that `since` did not have already."""
        if version is None or version == since or not rows.num_rows:
            return rows
        span = pc.min_max(rows[self.key[0]]).as_py()
        added = self._records_since(version, since)
        near = [record for record in added if record.first_key <= span["max"] and span["min"] <= record.last_key]
        return self._without(rows, self.scan_shards(near))

    def _records_since(self, version: int, since: int | None) -> list[ShardRecord]:
        """Return the records of the shards of `version` that `since` did not have already."""
        known = set() if since is None else set(self.shards(since))
        return [record for record in self.records(version) if record.name not in known]

    def _without(self, rows: pa.Table, present: pl.LazyFrame) -> pa.Table:
        name = self.key[0]
        span = pc.min_max(rows[name]).as_py()
        present = present.filter(pl.col(name).is_between(pl.lit(span["min"]), pl.lit(span["max"]))).select(self.key)
        keys = pl.DataFrame(pl.from_arrow(rows.select(self.key))).with_row_index("_row")
        with self.reading():
            taken = keys.lazy().join(present, on=list(self.key), how="semi").collect()["_row"]
        keep = ~pl.int_range(rows.num_rows, eager=True).is_in(taken.to_list())
        return rows if keep.all() else rows.filter(keep.to_arrow())

    def _shards_without_present(
        self, shards: list[ShardRecord], version: int | None, since: int | None
    ) -> list[ShardRecord]:
        """Return shards with the rows whose key is in no shard of `version` that `since` did not have already."""
        if version is None or version == since:
            return shards
        added = self._records_since(version, since)
        left: list[ShardRecord] = []
        for shard in shards:
            near = [o for o in added if shard.first_key <= o.last_key and o.first_key <= shard.last_key]
            self._check_there([shard] if near else [])
            keys = pa.concat_tables(self.open_shard(shard).groups(list(self.key))) if near else None
            if keys is None or len(self._without(keys, self.scan_shards(near))) == len(keys):
                left.append(shard)
                continue
            rows = self._without(pa.concat_tables(self.open_shard(shard).groups()), self.scan_shards(near))
            left += self._write(rows) if rows.num_rows else []
        return left

    def _checked_version(self) -> int | None:
        """Return the newest version, None when there is none, and refuse to write to a table that is not ours."""
        version = self.version()
        if version is not None:
            self.metadata(version)
        return version

    def _write(self, rows: pa.Table) -> list[ShardRecord]:
        writer = self.writer()
        writer.write(rows.sort_by([(name, "ascending") for name in self.key]))
        return writer.finish()
