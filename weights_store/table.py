"""One Delta table of the store: whole versions, exactly-once appends, metadata and checksums on every commit.

The Parquet files are ours (`shards.py`), the commit is `deltalake`'s. delta-rs rebases blind appends silently, so two
writers that both looked first could both append the same pair. Every commit here is therefore compare-and-set: it names
the version it was computed from, and on a lost race the rows already there are taken out before the next try.

Every commit's rows are sorted by the table's key, so that a range of keys is read from few row groups: joins go range by
range in bounded memory (`key_ranges`).

Not here: what the rows mean (`pipeline`), names and listings (`store.py`), checks of whole tables (`verify.py`).
"""

import errno
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from weights_store.commits import READERS, Commit, custom_metadata, delta_actions, log_name, read_commit, read_commits
from weights_store.errors import ConflictError, DamageError, NotFoundError, StoreError
from weights_store.key_ranges import KeyRange, cuts
from weights_store.location import Location, one_line
from weights_store.schemas import SCHEMA_VERSION
from weights_store.shards import ShardReader, ShardRecord, ShardWriter, lacking, sum_checksums, with_nulls

_Items = TypeVar("_Items", pa.Table, list[ShardRecord])
_MAX_TRIES = 20
_MEMORY_PER_BYTE = 3  # measured: about 3 Arrow bytes to one on disk
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_SPOILT = (OSError, UnicodeDecodeError, pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException)


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

    def __init__(self, root: Location, path: str, schema: pa.Schema, key: tuple[str, ...] = ("pair_id",)) -> None:
        self.root = root
        self.path = path
        self.schema = schema
        self.key = key
        self.location = root / path

    # --- versions ----------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Return whether the table has at least one version."""
        return self.location.has_file(log_name(0), "_delta_log/_last_checkpoint")

    def version(self) -> int | None:
        """Return the newest version, None when there is none."""
        return int(self._open().version()) if self.exists() else None

    def reference(self, version: int | None = None) -> TableVersion:
        """Return the reference to one version, the newest by default.

        Raises:
            NotFoundError: There is no such table or version.
        """
        found = self._resolve(version)
        return TableVersion(str(self.root), self.path, found, self.metadata(found)["fingerprint"])

    def metadata(self, version: int | None = None) -> dict[str, Any]:
        """Return what the commit of one version recorded: fingerprint, recipe, parents, statistics, packages.

        Raises:
            NotFoundError: There is no such table or version.
            StoreError: The commit is not ours or was written by a newer tokenweights.
        """
        found = self._resolve(version)
        metadata = read_commit(self.location, found).metadata
        if metadata is None:
            raise StoreError(f"{self.path}@{found} in {self.root} {_FOREIGN}")
        return metadata

    def history(self, limit: int | None = None) -> list[Commit]:
        """Return the commits that are ours, newest first, at most `limit`.

        Raises:
            NotFoundError: There is no such table.
        """
        newest = self._resolve(None)
        oldest = -1 if limit is None else max(-1, newest - limit)
        return [
            commit for commit in read_commits(self.location, range(newest, oldest, -1)) if commit.metadata is not None
        ]

    def log(self) -> Iterator[Commit]:
        """Yield every commit, oldest first, whoever made it.

        Raises:
            NotFoundError: There is no such table.
        """
        yield from read_commits(self.location, range(self._resolve(None) + 1))

    # --- reading -----------------------------------------------------------------------------------------------------

    def scan(self, version: int | None = None) -> pl.LazyFrame:
        """Return one version as a lazy frame, with all columns: those that came after it was written are null.

        Raises:
            NotFoundError: There is no such table or version.
        """
        opened = self._open(version)
        path = self.location.uri
        if self.location.is_local and (quote(path) != path or "~" in path):
            # scan_delta takes deltalake's percent-encoded paths as they stand (Polars 2.1.0) and finds no file.
            return self._scan_files(_paths(opened))
        frame = pl.scan_delta(opened, storage_options=self.location.scan_options or None)
        later = [field.name for field in lacking(self.schema, _columns(opened))]
        return frame.with_columns(pl.lit(None, self._kinds[name]).alias(name) for name in later) if later else frame

    def scan_shards(self, shards: Iterable[ShardRecord]) -> pl.LazyFrame:
        """Return the rows of some shards, committed or not, as a lazy frame."""
        return self._scan_files([shard.name for shard in shards])

    def _scan_files(self, names: list[str]) -> pl.LazyFrame:
        if not names:
            return pl.LazyFrame(pl.from_arrow(self.schema.empty_table()))
        return pl.scan_parquet(
            [f"{self.location}/{name}" for name in names],
            glob=False,
            schema=self._kinds,
            missing_columns="insert",  # files may be older than a column
            storage_options=self.location.scan_options or None,
        )

    def records(self, version: int | None = None) -> list[ShardRecord]:
        """Return what the commits recorded of the shards of one version, in the order in which they were written.

        Raises:
            NotFoundError: There is no such table or version.
            StoreError: A shard was added by somebody else.
        """
        opened = self._open(version)
        missing = set(_paths(opened))
        found: dict[str, ShardRecord] = {}
        newest = opened.version()
        for start in range(newest, -1, -READERS):  # backwards: mostly the last commits are all that is needed
            if not missing:
                break
            for commit in read_commits(self.location, range(start, max(-1, start - READERS), -1)):
                found |= {shard.name: shard for shard in commit.shards if shard.name in missing}
            missing -= found.keys()
        if missing:
            raise StoreError(f"{self.path}@{newest} in {self.root}: shard {min(missing)} {_FOREIGN}")
        return [found[name] for name in sorted(found)]

    def shards(self, version: int | None = None) -> list[str]:
        """Return the names of the shards of one version, in the order in which they were written.

        Raises:
            NotFoundError: There is no such table or version.
        """
        return _paths(self._open(version))

    def open_shard(self, record: ShardRecord) -> ShardReader:
        """Open one shard by its record from `records`; what is read from it is checked.

        Raises:
            DamageError: It is not the file that was committed.
        """
        return ShardReader(self.location, record, self.key, self.path)

    def batches(self, version: int | None = None, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the row groups of one version in stored order, checked: the whole table in the memory of one row group.

        Columns that came after a shard was written are null.

        Raises:
            NotFoundError: There is no such table or version.
            DamageError: A shard is not what was committed.
        """
        names = self.schema.names if columns is None else columns
        for record in self.records(version):
            later = [field for field in lacking(self.schema, record.checksums) if field.name in names]
            there = [name for name in names if name not in {field.name for field in later}]
            for rows in self.open_shard(record).groups(there):
                yield with_nulls(rows, later).select(names)

    def num_rows(self, version: int | None = None) -> int:
        """Return the number of rows of one version."""
        return int(self._collect(self.scan(version).select(pl.len())).item())

    def checksums(self, version: int | None = None) -> dict[str, int]:
        """Return the recorded checksum of every column of one version, see `checksums.py`."""
        return sum_checksums(record.sums for record in self.records(version))

    def pair_ids(self, version: int | None = None) -> pl.Series:
        """Return the `pair_id`s of one version, empty when the table does not exist yet."""
        if version is None and not self.exists():
            return pl.Series("pair_id", [], pl.String)
        return self._collect(self.scan(version).select("pair_id")).to_series()

    def key_ranges(self, max_bytes: int, version: int | None = None, num_bytes: int | None = None) -> list[KeyRange]:
        """Cut one version into ranges of its first key column, each about `max_bytes` in memory, together everything.

        Args:
            max_bytes: Arrow bytes that one range may take.
            version: Which version; the newest by default.
            num_bytes: Bytes on disk of all that is to be read of these keys; the table's own by default.
        """
        records = self.records(version)
        total = _MEMORY_PER_BYTE * (sum(record.num_bytes for record in records) if num_bytes is None else num_bytes)
        num_ranges = -(-total // max_bytes)
        if num_ranges <= 1:
            return [KeyRange(None, None)]
        found = cuts(self, records, num_ranges)
        return [KeyRange(low, high) for low, high in zip([None, *found], [*found, None], strict=True)]

    # --- writing -----------------------------------------------------------------------------------------------------

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
        from weights_store.compaction import compact

        with self.reading():
            self._check_sizes()
            try:
                return compact(self, max_bytes)
            except OSError as error:
                if error.errno in _NO_WRITING:
                    raise self._cannot_write(error) from error
                raise

    # --- inside ------------------------------------------------------------------------------------------------------

    @cached_property
    def _kinds(self) -> pl.Schema:
        """The columns as Polars types."""
        return pl.DataFrame(pl.from_arrow(self.schema.empty_table())).schema

    def _open(self, version: int | None = None) -> Any:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        if not self.exists():
            raise NotFoundError(
                f"no table {self.path} in {self.root}; `tokenweights ls --store {self.root}` lists what is there"
            )
        options = self.location.storage_options
        try:
            return DeltaTable(str(self.location), version=version, storage_options=options)
        except (DeltaError, TableNotFoundError, ValueError, OSError, OverflowError) as error:
            cause = self._cause(error)
            try:
                newest = DeltaTable(str(self.location), storage_options=options).version()
            except (DeltaError, TableNotFoundError, ValueError, OSError):
                raise StoreError(f"cannot open {self.path} in {self.root}: {one_line(error)}") from cause
            if version is not None and not 0 <= version <= newest:
                raise NotFoundError(f"{self.path} has no version {version}; it has 0..{newest}") from cause
            raise StoreError(f"cannot open {self.path}@{version} in {self.root}: {one_line(error)}") from cause

    def _resolve(self, version: int | None) -> int:
        return int(self._open(version).version())

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

    def _collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        with self.reading():
            return frame.collect()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say in one line that a shard cannot be read: pyarrow and Polars raise many things, and Polars panics."""
        try:
            yield
        except _SPOILT as error:
            if not self.root.is_local and not isinstance(error, FileNotFoundError):
                raise StoreError(f"cannot read {self.path} in {self.root}: {one_line(error)}") from None
            raise DamageError(
                f"{self.path} in {self.root}: a shard cannot be read: {one_line(error)}; `tokenweights verify` names it. "
                f"{_RESTORE.capitalize()}"
            ) from self._cause(error)

    def _check_sizes(self) -> None:
        """Look for shards that are missing or cut off: Polars panics on them, loudly."""
        files = self.location.files()
        for record in self.records():
            found = files[record.name].size if record.name in files else "none"
            if found != record.num_bytes:
                raise DamageError(
                    f"{self.path} in {self.root}: shard {record.name} has {record.num_bytes} bytes in its commit, found "
                    f"{found}; {_RESTORE}"
                )

    def _checked_version(self) -> int | None:
        """Return the newest version, None when there is none, and refuse to write on top of what is not ours."""
        version = self.version()
        if version is not None:
            self.metadata(version)
        return version

    def _cause(self, error: BaseException) -> BaseException | None:
        """Return what to show as the cause: of an object store's nothing, replies there quote keys and tokens."""
        return error if self.root.is_local else None

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

        there, written = _columns(opened), {name for shard in shards for name in shard.checksums}
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


_RESTORE = "restore the file from a copy, or build the table again"
_FOREIGN = "was not written by tokenweights: its commit has no metadata of ours"


def _overlap(one: ShardRecord, other: ShardRecord) -> bool:
    return one.first_key <= other.last_key and other.first_key <= one.last_key  # type: ignore[operator]


def _columns(opened: Any) -> list[str]:
    """Return the columns that an open DeltaTable has for its readers."""
    return [field.name for field in opened.schema().fields]


def _paths(opened: Any) -> list[str]:
    """Return the names of the shards of an open DeltaTable, in the order in which they were written."""
    return sorted(pa.table(opened.get_add_actions()).column("path").to_pylist())
