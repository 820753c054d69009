"""Brings a table that cannot be read or appended to back to its newest whole version.

A version is whole if its entry of the log and all others that its readers need are what was written, and every shard that it
needs is there with the bytes that were committed. Everything newer is moved, never deleted, to the folder `aside/` of the
store: entries of the log, and shards that only they need. So is every checkpoint that is no true summary of the log; readers
need none.

A damaged file that can be had from a copy is better put back: `verify` names it. What was dropped is built again by the next
build. What cannot be read now, because of permissions, the disk or the network, or because a newer tokenweights wrote it, may
be whole: then nothing is decided.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from weights_store.catalog import check_store, list_tables
from weights_store.checks.files import check_summaries, check_view
from weights_store.checks.log import TableLog, read_log
from weights_store.errors import ConflictError, DamageError, NotFoundError, StoreError
from weights_store.location import one_line
from weights_store.store import WeightStore
from weights_store.tables.commits import LAST_CHECKPOINT, log_name
from weights_store.tables.locks import without_writers
from weights_store.tables.shards import ShardRecord, check_bytes
from weights_store.tables.table import Table

ASIDE = "aside"
"""The folder of a store with what `repair` has dropped, by table and time."""


@dataclass(frozen=True)
class Repair:
    """What has to be done to one table."""

    table: str
    newest: int
    """The newest version as it is now."""
    kept: int | None
    """The newest whole version; None if there is none."""
    num_rows: int | None
    """Rows of the newest version as it was recorded; None if that cannot be read."""
    num_rows_kept: int
    dropped: dict[int, str] = field(default_factory=dict)
    """What is wrong with each newer version."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """What is wrong with older versions, which no move mends and the kept one does not need."""
    files: list[str] = field(default_factory=list)
    """What goes aside, in the order in which it has to be moved."""


def find_repairs(store: WeightStore, tables: Iterable[str] | None = None) -> Iterator[Repair]:
    """Yield what is to be known or done about each table that is not whole; `tables` are paths, all by default. Reads only.

    It reads every shard of the newest whole version of each table, once. Tables of other programs are left alone.

    Raises:
        NotFoundError: There is no such store or table.
        SettingsError: A path is malformed.
        StoreError: A file cannot be read now, or a newer tokenweights wrote it: whether it is damaged is unknown.
    """
    check_store(store.root)
    for table in list_tables(store.root) if tables is None else map(store.table, tables):
        repair = _repair_of(table)
        if repair is not None and (repair.files or repair.unreadable):
            yield repair


def apply_repair(store: WeightStore, repair: Repair) -> str:
    """Move what goes aside and return the folder, relative to the store. No build may run on that table.

    A kill leaves a table that another repair brings to the same end.

    Raises:
        ConflictError: The table is no longer as it was when `repair` was found; nothing was moved.
        OSError, StoreError: A file cannot be moved; those before it are aside.
    """
    table = store.table(repair.table)
    aside = f"{ASIDE}/{repair.table}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    with without_writers(table.location):
        if _repair_of(table) != repair:
            raise ConflictError(f"{repair.table}: another process writes or repairs it; nothing was moved, run again")
        for name in repair.files:
            store.root.move(f"{repair.table}/{name}", f"{aside}/{name}")
    return aside


def _repair_of(table: Table) -> Repair | None:
    """Return what has to be done to a table, None if no version of it is ours."""
    log = read_log(table)
    if log.newest is None:
        raise NotFoundError(
            f"no table {table.path} in {table.root}; `tokenweights ls --store {table.root}` lists what is there"
        )
    if log.commits and all(commit.metadata is None for commit in log.commits.values()):
        return None
    _check_readable(log)
    search = _Search(log)
    dropped: dict[int, str] = {}
    kept: int | None = None
    for version in range(log.newest, -1, -1):
        problem = search.problem_of(version)
        if problem is None:
            kept = version
            break
        dropped[version] = problem
    return Repair(
        table.path,
        log.newest,
        kept,
        log.num_rows(log.newest),
        0 if kept is None else sum(record.num_rows for record in search.records_of(kept)),
        dropped,
        {version: problem for version, problem in log.problems.items() if kept is not None and version < kept},
        list(_files_to_move(log, kept)),
    )


def _check_readable(log: TableLog) -> None:
    """Raise StoreError if it is unknown what a file of the log says."""
    for version in log.problems:
        with suppress(DamageError):
            log.table.read_commit(version)
    for name in (name for names in log.checkpoints.values() for name in names):
        log.table.location.read(f"_delta_log/{name}")


class _Search:
    """Looks which versions of a table are whole; each shard is compared once."""

    def __init__(self, log: TableLog) -> None:
        self._log = log
        self._records = {record.name: record for _, record in log.records()}
        self._problems: dict[str, str | None] = {}
        self._first_damaged = min(log.problems, default=None)

    def problem_of(self, version: int) -> str | None:
        """Return why a version is not whole, None if it is."""
        if version in self._log.problems:
            return self._log.problems[version].partition(";")[0]
        if version not in self._log.commits:
            return "its entry of the log is missing"
        if self._log.metadata(version) is None:
            return "it was not written by tokenweights"
        try:
            records = self.records_of(version)
        except DamageError as error:
            return one_line(error).partition(";")[0]
        except StoreError as error:
            if self._first_damaged is None:
                return one_line(error).partition(";")[0]
            return f"version {self._first_damaged}: {self._log.problems[self._first_damaged]}".partition(";")[0]
        return next(filter(None, map(self._problem_of_shard, records)), None)

    def records_of(self, version: int) -> list[ShardRecord]:
        """Return the records of the shards of a version, from the entries alone if those up to it are whole.

        If one is damaged, a checkpoint after it may replace it, or nothing of it may be left: then readers can tell.
        """
        if self._first_damaged is not None and self._first_damaged <= version:
            return self._log.table.records(version)
        names = sorted(self._log.active(version))
        if foreign := [name for name in names if name not in self._records]:
            raise StoreError(f"{foreign[0]} was not written by tokenweights")
        return [self._records[name] for name in names]

    def _problem_of_shard(self, record: ShardRecord) -> str | None:
        if record.name not in self._problems:
            self._problems[record.name] = None
            try:
                check_bytes(self._log.table.location, record, self._log.table.path)
            except DamageError as error:
                self._problems[record.name] = one_line(error).partition(";")[0]
        return self._problems[record.name]


def _files_to_move(log: TableLog, kept: int | None) -> Iterator[str]:
    """Yield what goes aside: hints first, then entries from the newest back, so that what is left is a log at any time."""
    names = (log.table.location / "_delta_log").files()
    newer = {name for version, files in log.checkpoints.items() if kept is None or version > kept for name in files}
    hint = f"_delta_log/{LAST_CHECKPOINT}"
    false = {str(finding.file) for finding in check_summaries(log)}
    if log.is_whole:  # what is wrong with the view of a checkpoint is wrong with the checkpoint
        seen_wrong = [version for version in log.checkpoints if next(check_view(log, version), None)]
        false |= {f"_delta_log/{name}" for version in seen_wrong for name in log.checkpoints[version]}
    if LAST_CHECKPOINT in names and (newer or false):
        yield hint
    yield from sorted(({f"_delta_log/{name}" for name in newer} | false) - {hint}, reverse=True)
    last = -1 if kept is None else kept
    entries = [version for version in range(log.newest or 0, last, -1) if f"{version:020d}.json" in names]
    yield from map(log_name, entries)
    needed = {name for commit in log.commits.values() if commit.version <= last for name in commit.added}
    dropped = {name for commit in log.commits.values() if commit.version > last for name in commit.added}
    yield from sorted((dropped - needed) & log.table.location.files().keys())
