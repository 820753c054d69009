"""Reads one Delta table of the store: its versions, what their commits recorded, and their rows.

Every commit's rows are sorted by the table's key, so a range of keys is read from few row groups: joins go range by range, in
bounded memory (`key_ranges`). Whatever is read is compared with its commit first: whole shards by their digest once per process
(`scan`), or row groups by their checksums (`batches`). What Delta says of the files of a version is compared with the commit of
that version, so damaged entries and checkpoints before it are found too.

Not here: writing (`table.py`), finding tables (`catalog.py`), checks of whole tables (`checks/`).
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from weights_store.errors import DamageError, NotFoundError, StoreError
from weights_store.location import Location, one_line
from weights_store.tables.commits import (
    ENTRY,
    LAST_CHECKPOINT,
    READERS,
    Commit,
    digest_names,
    log_name,
    names_of_files,
    read_commit,
    wrong_base,
)
from weights_store.tables.key_ranges import EVERYTHING, KeyRange, RowGroup, cut
from weights_store.tables.metadata import CommitMetadata, Parent
from weights_store.tables.shards import RESTORE, ShardReader, ShardRecord, check_bytes

if TYPE_CHECKING:
    from deltalake import DeltaTable

_MEMORY_PER_BYTE = 3  # measured: about 3 Arrow bytes per byte on disk
_FOREIGN = "was not written by tokenweights, or its entry of the log is lost"
_UNREADABLE = (OSError, UnicodeDecodeError, pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException)


@dataclass(frozen=True, slots=True)
class TableVersion:
    """A reference to one version of one table: what tasks pass to each other instead of data."""

    store: str
    table: str
    version: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.table}@{self.version}"

    def as_parent(self) -> Parent:
        """Return the reference as the lineage of another table records it."""
        return {"table": self.table, "version": self.version, "fingerprint": self.fingerprint}


class TableReader:
    """One table, by its path under the store's root, for reading.

    The methods with a `version` take the newest one by default and raise NotFoundError if the table or the version is missing.
    """

    def __init__(self, root: Location, path: str, schema: pa.Schema, key: tuple[str, ...] = ("pair_id",)) -> None:
        self.root = root
        self.path = path
        self.schema = schema
        self.key = key
        self.location = root / path
        self._commits: dict[int, tuple[object, Commit]] = {}

    def __reduce__(self) -> tuple[object, ...]:  # without the commits that it has read
        return type(self), (self.root, self.path, self.schema, self.key)

    @property
    def configuration(self) -> dict[str, str]:
        """The table's properties in Delta."""
        return {
            "delta.enableExpiredLogCleanup": "false",  # else old versions vanish with their log
            "delta.deletedFileRetentionDuration": "interval 36500 days",  # else by VACUUM, and `notes.py`'s file too
            # Commits have statistics of this column only. pyarrow takes missing ones for nulls: filters would find no row.
            "delta.dataSkippingStatsColumns": self.key[0],
        }

    def exists(self) -> bool:
        """Return whether the table has at least one version, even if its first entry of the log is lost."""
        log = self.location / "_delta_log"
        return log.exists(f"{0:020d}.json", LAST_CHECKPOINT) or any(map(ENTRY.fullmatch, log.files()))

    def version(self) -> int | None:
        """Return the newest version, None if there is none."""
        return int(self.open_delta().version()) if self.exists() else None

    def reference(self, version: int | None = None) -> TableVersion:
        """Return the reference to one version."""
        found = self._resolve(version)
        return TableVersion(str(self.root), self.path, found, self.metadata(found)["fingerprint"])

    def metadata(self, version: int | None = None) -> CommitMetadata:
        """Return what the commit of one version recorded.

        Raises:
            StoreError: The commit is not ours or was written by a newer tokenweights.
        """
        found = self._resolve(version)
        return self._metadata_of(self.read_commit(found))

    def read_commit(self, version: int) -> Commit:
        """Read one entry of the log, see `commits.read_commit`; each once, unless its file has changed since."""
        try:
            state = self.location.state(log_name(version))
        except FileNotFoundError:
            state = None
        if version not in self._commits or self._commits[version][0] != state:
            self._commits[version] = (state, read_commit(self.location, self.path, version, self.key[0]))
        return self._commits[version][1]

    def read_commits(self, versions: range) -> list[Commit | DamageError]:
        """Read entries of the log, those of an object store at the same time; an error stands for a damaged one."""

        def read(version: int) -> Commit | DamageError:
            try:
                return self.read_commit(version)
            except DamageError as error:
                return error

        if self.location.is_local or len(versions) < 2:
            return list(map(read, versions))
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(read, versions))

    def history(self, limit: int | None = None) -> list[Commit]:
        """Return our commits, newest first, at most `limit`.

        Raises:
            DamageError: One of them is not what was written, or not the one that the next was made from.
        """
        newest = self._resolve(None)
        oldest = -1 if limit is None else max(-1, newest - limit)
        commits: list[Commit] = []
        for commit in self.read_commits(range(newest, oldest, -1)):
            if isinstance(commit, DamageError):
                raise commit
            commits.append(commit)
        for later, earlier in pairwise(commits):
            if problem := wrong_base(later, earlier):
                raise DamageError(f"{self.path}@{earlier.version} in {self.root}: {problem}; {self._repair}")
        return [commit for commit in commits if commit.metadata is not None]

    def scan(self, version: int | None = None, checked: bool = True, within: KeyRange = EVERYTHING) -> pl.LazyFrame:
        """Return the rows of one version within a range of keys as a lazy frame; all shards it opens are checked first.

        Without `checked` nothing is read before it is collected, and nothing compared: Polars reads what Delta's log names.

        Raises:
            DamageError: A shard, or what the log says of the shards, is not what was committed, see `check_shards`.
        """
        if checked:
            near = [r for r in self.records(version) if within.overlaps(r.first_key, r.last_key)]
            return within.of(self.scan_shards(near), self.key[0])
        opened = self.open_delta(version)
        path = self.location.uri
        if self.location.is_local and (quote(path) != path or "~" in path):
            # scan_delta does not decode deltalake's percent-encoded paths (Polars 2.1.0) and finds no file.
            rows = self._scan_files(names_of_files(opened))
        else:
            rows = pl.scan_delta(opened, storage_options=self.location.scan_options or None)
        return within.of(rows, self.key[0])

    def scan_shards(self, shards: Sequence[ShardRecord]) -> pl.LazyFrame:
        """Return the rows of some shards, committed or not, as a lazy frame; they are checked first, see `check_shards`."""
        self.check_shards(shards)
        return self._scan_files([shard.name for shard in shards])

    def check_shards(self, shards: Sequence[ShardRecord]) -> None:
        """Compare the bytes of shards with their records: each shard once per process, unless the file has changed since.

        Raises:
            DamageError: A file is missing or is not what was written; names it.
        """
        where = f"{self.path} in {self.root}"
        num_threads = min(READERS, os.cpu_count() or 1, len(shards)) or 1
        with ThreadPoolExecutor(num_threads) as pool:  # hashing and reading leave Python's lock
            for _ in pool.map(lambda shard: check_bytes(self.location, shard, where), shards):
                pass

    def records(self, version: int | None = None) -> list[ShardRecord]:
        """Return what the commits recorded of the shards of one version: by commit, and in the order that the commit has.

        Raises:
            DamageError: They are not the files or the number of rows that the commit of this version recorded, or an entry is
                damaged that is needed: this version does not need every older one.
            StoreError: A shard was added by another program, or its entry of the log is lost.
        """
        opened = self.open_delta(version)
        newest = opened.version()
        made = self.read_commit(newest)
        missing = set(self.names_in(opened, made))
        found: list[list[ShardRecord]] = []  # by commit, newest first
        damage: DamageError | None = None

        def take(commit: Commit) -> None:
            found.append([shard for shard in commit.shards if shard.name in missing])
            missing.difference_update(shard.name for shard in found[-1])

        take(made)
        for start in range(newest - 1, -1, -READERS):  # backwards: the last commits usually hold all that is needed
            if not missing:
                break
            for commit in self.read_commits(range(start, max(-1, start - READERS), -1)):
                if isinstance(commit, DamageError):
                    damage = damage or commit
                    if made.log is None:  # nothing else says whether its removals are right
                        raise commit
                else:
                    take(commit)
        if missing:
            problem = f"{self.path}@{newest} in {self.root}: shard {min(missing)} {_FOREIGN}; {self._repair}"
            raise damage or StoreError(problem)
        records = list(chain.from_iterable(reversed(found)))
        self._check_num_rows(made, sum(record.num_rows for record in records))
        return records

    def shards(self, version: int | None = None) -> list[str]:
        """Return the names of the shards of one version, sorted.

        Raises:
            DamageError: They are not the files that the commit of this version recorded.
        """
        opened = self.open_delta(version)
        return self.names_in(opened, self.read_commit(opened.version()))

    def names_in(self, opened: "DeltaTable", commit: Commit) -> list[str]:
        """Return what Delta makes of all entries and checkpoints of the log, compared with the commit of that version.

        Raises:
            DamageError: They are not the files that it recorded.
        """
        names = names_of_files(opened)
        if commit.log is not None and digest_names(names) != commit.log["files"]:
            raise DamageError(
                f"{self.path}@{commit.version} in {self.root}: its log names {len(names)} files, which are not those that "
                f"were committed: an earlier entry or a checkpoint is damaged; {self._repair}"
            )
        return names

    def open_shard(self, record: ShardRecord) -> ShardReader:
        """Open one shard by its record from `records`; what is read from it is checked.

        Raises:
            DamageError: It is not the file that was committed.
        """
        return ShardReader(self.location, record, self.key, self.path)

    def batches(self, version: int | None = None, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the row groups of one version in stored order, checked, in the memory of one row group.

        Raises:
            DamageError: A shard is not what was committed.
        """
        for record in self.records(version):
            yield from self.open_shard(record).groups(self.schema.names if columns is None else columns)

    def num_rows(self, version: int | None = None) -> int:
        """Return the number of rows of one version, as its commit recorded it."""
        made = self.read_commit(self._resolve(version))
        return made.log["num_rows"] if made.log is not None else sum(r.num_rows for r in self.records(made.version))

    def pair_ids(self, version: int | None = None) -> pl.Series:
        """Return the `pair_id`s of one version, none if the table does not exist yet."""
        if version is None and not self.exists():
            return pl.Series("pair_id", [], pl.String)
        with self.reading():
            return self.scan(version).select("pair_id").collect().to_series()

    def key_ranges(self, max_bytes: int, version: int | None = None, num_bytes: int | None = None) -> list[KeyRange]:
        """Cut one version into ranges of its first key column, which together hold every key.

        One range takes about `max_bytes` Arrow bytes in memory. `num_bytes` are the bytes on disk of everything that is read
        of these keys; the table's own by default.

        Raises:
            DamageError: A shard is not what was committed.
        """
        records = self.records(version)
        total = _MEMORY_PER_BYTE * (sum(record.num_bytes for record in records) if num_bytes is None else num_bytes)
        num_ranges = -(-total // max_bytes)
        if num_ranges <= 1:
            return [EVERYTHING]
        self.check_shards(records)
        return cut([group for record in records for group in self._row_groups(record)], self._keys_of, num_ranges)

    def open_delta(self, version: int | None = None) -> "DeltaTable":
        """Return one version as `deltalake` has it.

        Raises:
            NotFoundError: There is no such table or version.
            StoreError: It cannot be opened.
        """
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
            cause, newest = self.cause(error), None
            with suppress(DeltaError, TableNotFoundError, ValueError, OSError):
                newest = DeltaTable(str(self.location), storage_options=options).version()
            if version is not None and newest is not None and not 0 <= version <= newest:
                raise NotFoundError(f"{self.path} has no version {version}; it has 0..{newest}") from cause
            at = "" if version is None else f"@{version}"
            problem = f"cannot open {self.path}{at} in {self.root}: {one_line(error)}"
            raise StoreError(f"{problem}; {self._repair}") from cause

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn the many errors of pyarrow and Polars about a shard, panics too, into one line.

        Raises:
            DamageError: A shard cannot be read.
            StoreError: The object store cannot be read.
        """
        try:
            yield
        except _UNREADABLE as error:
            if not self.root.is_local and not isinstance(error, FileNotFoundError):
                raise StoreError(f"cannot read {self.path} in {self.root}: {one_line(error)}") from None
            raise DamageError(
                f"{self.path} in {self.root}: a shard cannot be read: {one_line(error)}; `tokenweights verify` names it. "
                f"{RESTORE.capitalize()}"
            ) from self.cause(error)

    def cause(self, error: BaseException) -> BaseException | None:
        """Return the cause to show for an error; None for an object store, whose replies quote keys and tokens."""
        return error if self.root.is_local else None

    @cached_property
    def _polars_schema(self) -> pl.Schema:
        return pl.DataFrame(pl.from_arrow(self.schema.empty_table())).schema

    def _scan_files(self, names: Sequence[str]) -> pl.LazyFrame:
        if not names:
            return pl.LazyFrame(schema=self._polars_schema)
        paths = [f"{self.location}/{name}" for name in names]
        options = self.location.scan_options or None
        return pl.scan_parquet(paths, glob=False, schema=self._polars_schema, storage_options=options)

    @property
    def _repair(self) -> str:
        return (
            f"`tokenweights verify {self.path}` says what is wrong, `tokenweights repair {self.path}` what can be kept"
        )

    def _metadata_of(self, commit: Commit) -> CommitMetadata:
        if commit.metadata is None:
            raise StoreError(f"{self.path}@{commit.version} in {self.root} {_FOREIGN}; {self._repair}")
        return commit.metadata

    def _check_num_rows(self, commit: Commit, num_rows: int) -> None:
        if commit.log is not None:
            expected: int | None = commit.log["num_rows"]
        else:  # commits from before that record: only those of some tables count all rows
            counts_all = self.path.partition("/")[0] in ("tokens", "weights")
            expected = self._metadata_of(commit).get("statistics", {}).get("num_pairs") if counts_all else None
        if expected is not None and num_rows != expected:
            raise DamageError(
                f"{self.path}@{commit.version} in {self.root}: its shards have {num_rows} rows, {expected} were committed: "
                f"an earlier entry of the log or a checkpoint is damaged; {self._repair}"
            )

    def _resolve(self, version: int | None) -> int:
        return int(self.open_delta(version).version())

    def _row_groups(self, record: ShardRecord) -> Iterator[RowGroup]:
        with self.reading(), self.location.filesystem.open_input_file(record.name) as file:
            footer = pq.read_metadata(file)
            column = footer.schema.to_arrow_schema().names.index(self.key[0])
            for index in range(footer.num_row_groups):
                group = footer.row_group(index)
                span = group.column(column).statistics
                yield RowGroup(span.min, span.max, record.name, index, group.total_byte_size)

    def _keys_of(self, group: RowGroup) -> list[Any]:
        with self.reading(), self.location.filesystem.open_input_file(group.shard) as file:
            rows = pq.ParquetFile(file).read_row_group(group.position, columns=[self.key[0]])
            return list(rows[self.key[0]].to_pylist())
