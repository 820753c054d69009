"""Brings a table that cannot be read or appended to back to its newest whole version.

A version is whole if its entry of the log and all before it are what was written, and every shard that it needs is there with
the bytes that were committed. Everything newer is moved, never deleted, to the folder `aside/` of the store: entries of the
log, and shards that only they need. So is every checkpoint that is no true summary of the log; readers need none.

A damaged file that can be had from a copy is better put back: `verify` names it. What was dropped is built again by the next
build.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weights_store.catalog import check_store, list_tables
from weights_store.checks.files import check_summaries
from weights_store.checks.log import TableLog, read_log
from weights_store.errors import NotFoundError, StoreError
from weights_store.location import one_line
from weights_store.store import WeightStore
from weights_store.tables.commits import LAST_CHECKPOINT, log_name
from weights_store.tables.locks import without_writers
from weights_store.tables.shards import check_bytes
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
    files: list[str] = field(default_factory=list)
    """What goes aside, in the order in which it has to be moved."""

    @property
    def is_needed(self) -> bool:
        """Whether anything has to be moved."""
        return bool(self.files)


def find_repairs(store: WeightStore, tables: Iterable[str] | None = None) -> Iterator[Repair]:
    """Yield what has to be done to each table that needs it; `tables` are paths, all by default. Reads only.

    It reads every shard of the newest whole version of each table, once.

    Raises:
        NotFoundError: There is no such store or table.
        SettingsError: A path is malformed.
    """
    check_store(store.root)
    for table in list_tables(store.root) if tables is None else map(store.table, tables):
        repair = _repair_of(table)
        if repair.is_needed:
            yield repair


def apply_repair(store: WeightStore, repair: Repair) -> str:
    """Move what goes aside and return the folder, relative to the store. No build may run on that table.

    A kill leaves a table that another repair brings to the same end.

    Raises:
        OSError, StoreError: A file cannot be moved; those before it are aside.
    """
    table = store.table(repair.table)
    aside = f"{ASIDE}/{repair.table}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    with without_writers(table.location):
        for name in repair.files:
            store.root.move(f"{repair.table}/{name}", f"{aside}/{name}")
    return aside


def _repair_of(table: Table) -> Repair:
    log = read_log(table)
    if log.newest is None:
        raise NotFoundError(
            f"no table {table.path} in {table.root}; `tokenweights ls --store {table.root}` lists what is there"
        )
    dropped: dict[int, str] = {}
    kept: int | None = None
    for version in range(log.newest, -1, -1):
        problem = _problem_of(log, version)
        if problem is None:
            kept = version
            break
        dropped[version] = problem
    return Repair(
        table.path,
        log.newest,
        kept,
        log.num_rows(log.newest),
        0 if kept is None else _num_rows(log, kept),
        dropped,
        list(_files_to_move(log, kept)),
    )


def _problem_of(log: TableLog, version: int) -> str | None:
    """Return why a version is not whole, None if it is."""
    for damaged in sorted(log.problems):
        if damaged <= version:
            return f"version {damaged}: {log.problems[damaged]}"
    records = {record.name: record for _, record in log.records()}
    for name in sorted(log.active(version)):
        if name not in records:
            return f"{name} was not written by tokenweights"
        try:
            check_bytes(log.table.location, records[name], log.table.path)
        except StoreError as error:
            return one_line(error).partition(";")[0]
    return None


def _num_rows(log: TableLog, version: int) -> int:
    active = log.active(version)
    return sum(record.num_rows for _, record in log.records() if record.name in active)


def _files_to_move(log: TableLog, kept: int | None) -> Iterator[str]:
    """Yield what goes aside: hints first, then entries from the newest back, so that what is left is a log at any time."""
    names = (log.table.location / "_delta_log").files()
    newer = {name for version, files in log.checkpoints.items() if kept is None or version > kept for name in files}
    hint = f"_delta_log/{LAST_CHECKPOINT}"
    false = {str(finding.file) for finding in check_summaries(log)}
    if LAST_CHECKPOINT in names and (newer or false):
        yield hint
    yield from sorted(({f"_delta_log/{name}" for name in newer} | false) - {hint}, reverse=True)
    last = -1 if kept is None else kept
    entries = [version for version in range(log.newest or 0, last, -1) if f"{version:020d}.json" in names]
    yield from map(log_name, entries)
    needed = {name for commit in log.commits.values() if commit.version <= last for name in commit.added}
    dropped = {name for commit in log.commits.values() if commit.version > last for name in commit.added}
    yield from sorted((dropped - needed) & log.table.location.files().keys())
