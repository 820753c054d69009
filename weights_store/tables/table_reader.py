"""One Delta table of the store as it stands: its versions, what their commits recorded, their rows. Writes nothing.

Every commit's rows are sorted by the table's key, so that a range of keys is read from few row groups: joins go range by
range in bounded memory (`key_ranges`).

Not here: writing (`table.py`), what the rows mean (`pipeline`), names and listings (`store.py`), checks of whole tables
(`verify.py`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import polars as pl
import pyarrow as pa

from weights_store.errors import DamageError, NotFoundError, StoreError
from weights_store.location import Location, one_line
from weights_store.tables.commits import READERS, Commit, log_name, read_commit, read_commits
from weights_store.tables.key_ranges import KeyRange, cuts
from weights_store.tables.shards import ShardReader, ShardRecord, lacking, sum_checksums, with_nulls

_MEMORY_PER_BYTE = 3  # measured: about 3 Arrow bytes to one on disk
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


class TableReader:
    """One table by its path under the store's root, for example `weights/hh-harmless/tis-dpo`, to be read."""

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
        later = [field.name for field in lacking(self.schema, columns_of(opened))]
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

    def _cause(self, error: BaseException) -> BaseException | None:
        """Return what to show as the cause: of an object store's nothing, replies there quote keys and tokens."""
        return error if self.root.is_local else None


_RESTORE = "restore the file from a copy, or build the table again"
_FOREIGN = "was not written by tokenweights: its commit has no metadata of ours"


def columns_of(opened: Any) -> list[str]:
    """Return the columns that an open DeltaTable has for its readers."""
    return [field.name for field in opened.schema().fields]


def _paths(opened: Any) -> list[str]:
    """Return the names of the shards of an open DeltaTable, in the order in which they were written."""
    return sorted(pa.table(opened.get_add_actions()).column("path").to_pylist())
