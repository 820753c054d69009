"""Writing to one Delta table of the store: whole versions, exactly-once appends, metadata and checksums on every commit.

The Parquet files are ours (`shards.py`), the commit is `deltalake`'s. delta-rs rebases blind appends silently, so two
writers that both looked first could both append the same pair. Every commit here is therefore compare-and-set: it names
the version it was computed from, and on a lost race the rows already there are taken out before the next try.

Not here: reading (`table_reader.py`), what the rows mean (`pipeline`), names and listings (`store.py`).
"""

import errno
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from weights_store.errors import ConflictError, StoreError
from weights_store.location import one_line
from weights_store.schemas import SCHEMA_VERSION
from weights_store.tables.commits import custom_metadata, delta_actions, log_name, read_commit
from weights_store.tables.shards import ShardRecord, ShardWriter, lacking
from weights_store.tables.table_reader import TableReader, TableVersion, columns_of

_Items = TypeVar("_Items", pa.Table, list[ShardRecord])
_MAX_TRIES = 20
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Table(TableReader):
    """One table by its path under the store's root, to be read and written."""

    def write_shards(self, rows: pa.Table) -> list[ShardRecord]:
        """Write rows, in any order, as shards for `append_shards`. Nothing is visible before they are committed.

        Raises:
            StoreError: The rows do not fit the table, or the folder cannot be written.
        """
        return self._write(self._conform(rows))

    def writer(self) -> ShardWriter:
        """Return a writer of shards for `commit`; rows come sorted by the key. Nothing is visible before the commit."""
        return ShardWriter(self.location, self.schema, self.key)

    def append(self, rows: pa.Table, metadata: Mapping[str, Any], known: int | None = None) -> TableVersion:
        """Add the rows whose key is not there yet, each exactly once, as one new version.

        Rows already there are left out; when nothing is left, the newest version is returned and nothing is written.

        Args:
            rows: What to add, in any order.
            metadata: What the commit records; `fingerprint` is needed.
            known: A version that is known to hold none of the rows: only what came after it is looked at.

        Raises:
            ConflictError: Other writers won the race for the next version every time.
            StoreError: The rows do not fit the table, the table is not ours or newer, or the folder cannot be written;
                nothing became visible.
        """
        rows = self._distinct(self._conform(rows))
        return self._append(rows, self._without_present, self._write, metadata, known)

    def append_shards(
        self, shards: list[ShardRecord], metadata: Mapping[str, Any], known: int | None = None
    ) -> TableVersion:
        """Add the rows of shards that are written already, each key exactly once, as one new version.

        A shard with rows that are there already is written anew without them; the old file is never committed. When nothing is
        left, the newest version is returned.

        Args:
            shards: From `write_shards`, maybe of other processes; no key stands in two of them.
            metadata: What the commit records; `fingerprint` is needed.
            known: A version that is known to hold none of the rows: only what came after it is looked at.

        Raises:
            ConflictError: Other writers won the race for the next version every time.
            StoreError: A shard is not in the table's folder, the table is not ours or newer, or the folder cannot be written;
                nothing became visible.
            DamageError: A shard that must be written anew is not what was written.
        """
        self._check_shards_are_here(shards)
        return self._append(shards, self._shards_without_present, list, metadata, known)

    def _append(
        self,
        items: _Items,
        without_present: Callable[[_Items, int | None, int | None], _Items],
        write: Callable[[_Items], list[ShardRecord]],
        metadata: Mapping[str, Any],
        known: int | None,
    ) -> TableVersion:
        """Commit what of `items` is new, and look again whenever another writer was faster."""
        base = self._checked_version()
        fresh = without_present(items, base, known)
        records: list[ShardRecord] | None = None
        for attempt in range(_MAX_TRIES):
            if base is not None and not len(fresh):
                return self.reference(base)
            if records is None:
                records = write(fresh)
            try:
                return self.commit(records, metadata, base)
            except ConflictError:
                time.sleep(random.uniform(0.002, 0.01) * 2 ** min(attempt, 6))
            newest = self._checked_version()
            if base is not None and not set(self.shards(base)) <= set(self.shards(newest)):
                left = without_present(items, newest, known)  # replaced: what was there may be gone
            else:
                left = without_present(fresh, newest, base)
            records = records if left == fresh else None
            base, fresh = newest, left
        raise ConflictError(
            f"{self.path}: lost the race for the next version {_MAX_TRIES} times; run again when fewer write"
        )

    def replace(self, rows: pa.Table, metadata: Mapping[str, Any]) -> TableVersion:
        """Write `rows` as the whole content of one new version; older versions stay readable.

        Raises:
            ConflictError: Another writer made a version in between.
            StoreError: The rows do not fit the table, the table is not ours or newer, or the folder cannot be written;
                nothing became visible.
        """
        base = self._checked_version()
        return self.commit(self._write(self._conform(rows)), metadata, base, mode="overwrite")

    def commit(
        self,
        shards: list[ShardRecord],
        metadata: Mapping[str, Any],
        base: int | None,
        mode: Literal["append", "overwrite"] = "append",
    ) -> TableVersion:
        """Make shards visible as version `base` + 1, or fail.

        Args:
            shards: From a `writer`.
            metadata: What the commit records; `fingerprint` is needed.
            base: The version that the rows were computed from; None for the first.
            mode: `overwrite`: the shards are the whole content of the new version.

        Raises:
            ConflictError: Another writer made that version first; nothing became visible.
            StoreError: The table cannot be written; nothing became visible.
        """
        return self._commit_actions(shards, metadata, base, mode, removed=())

    def optimize(self, max_bytes: int = 1 << 30) -> TableVersion | None:
        """Write the newest version's rows anew, sorted by key, in as few shards as they need; None if they are.

        Rows, fingerprint and column checksums stay as they are; older versions stay readable.

        Args:
            max_bytes: Memory for one range of keys.

        Raises:
            ConflictError: Another writer made a version meanwhile; nothing changed.
            DamageError: A shard is not what was committed, or the new shards would not hold the same rows.
        """
        from weights_store.tables.compaction import compact

        with self.reading():
            self._check_sizes()
            try:
                return compact(self, max_bytes)
            except OSError as error:
                if error.errno in _NO_WRITING:
                    raise self._cannot_write(error) from error
                raise

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _configuration(self) -> dict[str, str | None]:
        return {
            "delta.enableExpiredLogCleanup": "false",  # else old versions vanish with their log
            # Our commits have statistics of this column alone. pyarrow's datasets take missing ones for nulls, and a filter on
            # another column would find no row.
            "delta.dataSkippingStatsColumns": self.key[0],
        }

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

    def _distinct(self, rows: pa.Table) -> pa.Table:
        """Keep the first row of every key."""
        first = pl.DataFrame(pl.from_arrow(rows.select(self.key))).select(pl.struct(self.key).is_first_distinct())
        keep = first.to_series()
        return rows if keep.all() else rows.filter(pa.array(keep.to_list()))

    def _without_present(self, rows: pa.Table, version: int | None, since: int | None) -> pa.Table:
        """Return the rows whose key is in no shard of `version` that `since` did not have already."""
        if version is None or version == since or not rows.num_rows:
            return rows
        if since is None:
            present = self.scan(version)
        else:
            present = self._scan_files(sorted(set(self.shards(version)) - set(self.shards(since))))
        return self._without(rows, present)

    def _without(self, rows: pa.Table, present: pl.LazyFrame) -> pa.Table:
        """Return the rows whose key is not in `present`."""
        first = rows[self.key[0]]
        span = pc.min_max(first).as_py()
        present = present.filter(pl.col(self.key[0]).is_between(pl.lit(span["min"]), pl.lit(span["max"]))).select(
            self.key
        )
        keys = pl.DataFrame(pl.from_arrow(rows.select(self.key))).with_row_index("_row")
        taken = self._collect(keys.lazy().join(present, on=list(self.key), how="semi"))["_row"]
        if taken.is_empty():
            return rows
        keep = ~pl.int_range(rows.num_rows, eager=True).is_in(taken.to_list())
        return rows.filter(pa.array(keep.to_list()))

    def _shards_without_present(
        self, shards: list[ShardRecord], version: int | None, since: int | None
    ) -> list[ShardRecord]:
        """Return shards with the rows whose key is in no shard of `version` that `since` did not have already."""
        if version is None or version == since:
            return shards
        known = set() if since is None else set(self.shards(since))
        added = [record for record in self.records(version) if record.name not in known]
        left: list[ShardRecord] = []
        for shard in shards:
            near = [other for other in added if _overlap(shard, other)]
            keys = pa.concat_tables(self.open_shard(shard).groups(list(self.key))) if near else None
            if keys is None or len(self._without(keys, self.scan_shards(near))) == len(keys):
                left.append(shard)
                continue
            rows = self._without(pa.concat_tables(self.open_shard(shard).groups()), self.scan_shards(near))
            left += self._write(rows) if rows.num_rows else []
        return left

    def _check_shards_are_here(self, shards: list[ShardRecord]) -> None:
        """Refuse shards in somebody else's folder of the same name: on another machine, where no storage is shared."""
        if not self.location.is_local:
            return
        for shard in shards:
            if not self.location.has_file(shard.name):
                raise StoreError(
                    f"{self.path}: shard {shard.name} was written, but is not in {self.location}; a store that several "
                    "machines write lies in storage that all of them share"
                )

    def _checked_version(self) -> int | None:
        """Return the newest version, None when there is none, and refuse to write on top of what is not ours."""
        version = self.version()
        if version is not None:
            self.metadata(version)
        return version

    def _write(self, rows: pa.Table) -> list[ShardRecord]:
        try:
            writer = self.writer()
            writer.write(rows.sort_by([(name, "ascending") for name in self.key]))
            return writer.finish()
        except OSError as error:
            raise self._cannot_write(error) from self._cause(error)

    def _cannot_write(self, error: BaseException) -> StoreError:
        return StoreError(f"cannot write {self.path} in {self.root}: {one_line(error)}; nothing became visible")

    def _commit_actions(
        self,
        shards: list[ShardRecord],
        metadata: Mapping[str, Any],
        base: int | None,
        mode: str,
        removed: tuple[ShardRecord, ...],
    ) -> TableVersion:
        from deltalake import Schema
        from deltalake.transaction import create_table_with_add_actions

        opened = None if base is None else self._open(base)
        if opened is not None and mode == "append":  # an overwrite brings its columns along
            opened = self._widened(opened, shards)
        schema, base = Schema.from_arrow(self.schema), None if opened is None else int(opened.version())
        actions = delta_actions(self.key[0], shards, removed)
        with self._committing(base, metadata, shards) as properties:
            if opened is not None:
                opened.create_write_transaction(actions, mode, schema, commit_properties=properties)
            else:
                self._check_stands_alone()
                if self.location.is_local:
                    self.location.path.mkdir(parents=True, exist_ok=True)
                create_table_with_add_actions(
                    str(self.location),
                    schema,
                    actions,
                    mode="error",
                    configuration=self._configuration,
                    commit_properties=properties,
                    storage_options=self.location.storage_options,
                )
        version = 0 if base is None else base + 1
        return TableVersion(str(self.root), self.path, version, metadata["fingerprint"])

    def _widened(self, opened: Any, shards: list[ShardRecord]) -> Any:
        """Return an open version with every column of `shards`: the given one, or the next, which adds columns and no rows.

        Delta takes files with more columns than a table has, and no reader would ever see what stands in them.
        """
        from deltalake import Schema

        there, written = columns_of(opened), {name for shard in shards for name in shard.checksums}
        later = [field for field in lacking(self.schema, there) if field.name in written]
        if not later:
            return opened
        base = int(opened.version())
        changes = [f"columns: new are {', '.join(field.name for field in later)}"]
        with self._committing(base, self.metadata(base) | {"changes": changes}, []) as properties:
            opened.alter.add_columns(Schema.from_arrow(pa.schema(later)).fields, commit_properties=properties)
        return self._open(base + 1)

    @contextmanager
    def _committing(self, base: int | None, metadata: Mapping[str, Any], shards: list[ShardRecord]) -> Iterator[Any]:
        """Yield the properties of a commit of version `base` + 1, and say what has become of it where committing it fails.

        Raises:
            ConflictError: Another writer made that version first.
            StoreError: It was not made.
        """
        from deltalake import CommitProperties
        from deltalake.exceptions import DeltaError

        record = {"schema_version": SCHEMA_VERSION, **metadata, "num_rows_written": sum(s.num_rows for s in shards)}
        record["commit_id"] = uuid.uuid4().hex
        try:
            yield CommitProperties(custom_metadata=custom_metadata(record, shards), max_commit_retries=0)
        except (DeltaError, OSError) as error:
            # An error does not say what happened: the commit may be there and only its reply lost, or another writer's is.
            made = self._made(0 if base is None else base + 1)
            if made is None:
                raise self._cannot_write(error) from self._cause(error)
            if made != record["commit_id"]:
                raise ConflictError(
                    f"{self.path}: another writer made a version after {base}; run again"
                ) from self._cause(error)

    def _check_stands_alone(self) -> None:
        """Refuse a table inside another one's folder, or around one: listings and `vacuum` look at whole folders."""
        kind, *parts = self.path.split("/")
        above = ["/".join([kind, *parts[:count]]) for count in range(1, len(parts))]
        inside = [f"{self.path}/{name}" for name in self.location.folders()]
        for path in (*above, *inside):
            if (self.root / path).exists("_delta_log"):
                raise StoreError(
                    f"{self.path} and the table {path} in {self.root} would lie inside each other; choose another name"
                )

    def _made(self, version: int) -> str | None:
        """Return the `commit_id` of a version, empty when it is somebody else's, None when there is no such version."""
        if not self.location.exists(log_name(version)):
            return None
        metadata = read_commit(self.location, version).metadata
        return "" if metadata is None else str(metadata.get("commit_id", ""))


def _overlap(one: ShardRecord, other: ShardRecord) -> bool:
    return one.first_key <= other.last_key and other.first_key <= one.last_key  # type: ignore[operator]
