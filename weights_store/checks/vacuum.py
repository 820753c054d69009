"""Finds and removes files that no version of any table needs: what killed writers left behind.

A writer writes its shards first and commits them afterwards, so a young file may be about to become visible. Files that any
commit names are never touched, even if their rows have been replaced: old versions stay readable.
"""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import pyarrow.fs as pafs

from weights_store.catalog import check_store, open_table
from weights_store.checks.log import TableLog, read_log
from weights_store.errors import DamageError, NotFoundError, SettingsError
from weights_store.location import Location
from weights_store.names import is_name
from weights_store.schemas import SCHEMAS
from weights_store.store import WeightStore
from weights_store.tables.locks import without_writers
from weights_store.tables.notes import NOT_A_VERSION

# Commits, checkpoints, checksums and compacted commits, as the Delta protocol names them.
_LOG_FILE = re.compile(r"_last_checkpoint|\d{20}\.(json|crc|checkpoint\..+)|\d{20}\.\d{20}\.compacted\.json")
_SHARD = re.compile(r"\.?\d{20}-[0-9a-f]{12}-\d{5}\.parquet(\.\d+\.partial)?")
# Names that the protocol or the system gives: change data, deletion vectors, hidden files.
_RESERVED = re.compile(r"_.*|deletion_vector_.*\.bin|\.(?!.*\.partial$).*")


MIN_RETENTION_HOURS = 24
"""Shorter ones must be asked for: a build may run that long between two commits."""


@dataclass(frozen=True)
class Orphan:
    """A file that no commit of any version names."""

    table: str
    name: str
    num_bytes: int
    age_hours: float


def find_orphans(store: WeightStore, tables: Iterable[str] | None = None) -> Iterator[Orphan]:
    """Yield the files in the tables' folders that no version needs, whatever their age.

    Tables with an unreadable commit are left out, because nobody knows which files it named; `verify` reports them. `tables`
    are paths such as `weights/hh/tis-dpo`; by default all, and also folders with shards but without any commit.

    Raises:
        NotFoundError: There is no such store or table.
        SettingsError: A path is malformed.
    """
    for log, files in _folders(store, tables):
        if log.is_whole:
            yield from _orphans(log, files)


def vacuum(
    store: WeightStore,
    retention_hours: float = 168.0,
    dry_run: bool = True,
    tables: Iterable[str] | None = None,
    risk_running_builds: bool = False,
) -> list[Orphan]:
    """Remove the orphans that are older than a retention; return what was, or with `dry_run` would be, removed.

    Younger files stay, because a running writer may be about to commit them: `retention_hours` must be longer than any build.
    A writer whose shards are gone makes no commit, so its build fails and no table is harmed. In a local store a commit that is
    being made is waited for. For `tables` see `find_orphans`.

    Raises:
        NotFoundError: There is no such store or table.
        SettingsError: `retention_hours` is negative or not a number, or below `MIN_RETENTION_HOURS` without
            `risk_running_builds`, or a path is malformed.
        DamageError: A commit of one of the tables cannot be read, so the files that it names are unknown; nothing was removed.
        OSError: A file cannot be removed; those before it are gone.
    """
    if not retention_hours >= 0:
        raise SettingsError(f"retention must be at least 0 hours, got {retention_hours}")
    if retention_hours < MIN_RETENTION_HOURS and not (dry_run or risk_running_builds):
        raise SettingsError(
            f"a retention of {retention_hours:g} h is below {MIN_RETENTION_HOURS} h: shards that a running build has written "
            "and will commit later may be deleted, and that build fails; if none runs, add --risk-running-builds"
        )
    folders = list(_folders(store, tables))
    _check_known(log for log, _ in folders)
    found = [(log, orphan) for log, files in folders for orphan in _orphans(log, files)]
    old = [(log, orphan) for log, orphan in found if orphan.age_hours > retention_hours]
    if dry_run:
        return [orphan for _, orphan in old]
    return [orphan for path in dict.fromkeys(o.table for _, o in old) for orphan in _delete(path, old)]


def _check_known(logs: Iterable[TableLog]) -> None:
    for log in logs:
        for version, problem in log.problems.items():
            raise DamageError(
                f"{log.table.path}@{version}: {problem}. Which files it needs is unknown, so nothing was removed; "
                "`tokenweights repair` says what can be done, or name other tables to vacuum"
            )


def _delete(path: str, old: list[tuple[TableLog, Orphan]]) -> Iterator[Orphan]:
    """Delete the orphans of one table and yield them, except what has been committed since they were found."""
    table = next(log.table for log, orphan in old if orphan.table == path)
    with without_writers(table.location):
        log = read_log(table)
        _check_known([log])
        named = log.named()
        for orphan in (orphan for _, orphan in old if orphan.table == path and orphan.name not in named):
            with suppress(FileNotFoundError):  # another process removed it
                table.location.delete(orphan.name)
            yield orphan


def _folders(store: WeightStore, tables: Iterable[str] | None) -> Iterator[tuple[TableLog, dict[str, pafs.FileInfo]]]:
    """Yield the log and the files of every folder that is a table, or holds shards that were never committed.

    The files are listed before the log is read, so the log names whatever is committed in between.
    """
    check_store(store.root)
    for path in _paths(store.root) if tables is None else tables:
        table = open_table(store.root, path)
        files = table.location.files()
        in_log = (table.location / "_delta_log").files()
        if not files and not in_log:
            raise NotFoundError(f"no table {path} in {store.root}; `tokenweights ls --store {store.root}` lists them")
        yield read_log(table), files | {f"_delta_log/{name}": info for name, info in in_log.items()}


def _paths(root: Location) -> Iterator[str]:
    waiting = list(SCHEMAS)
    while waiting:
        path = waiting.pop(0)
        folder = root / path
        waiting += [f"{path}/{name}" for name in folder.folders() if is_name(name)]
        if folder.exists("_delta_log") or any(_SHARD.fullmatch(name) for name in folder.files()):
            yield path


def _orphans(log: TableLog, files: dict[str, pafs.FileInfo]) -> Iterator[Orphan]:
    named, now_s = log.named(), time.time()
    for name, info in sorted(files.items()):
        if name.startswith("_delta_log/"):
            is_leftover = not _LOG_FILE.fullmatch(name.removeprefix("_delta_log/"))
        elif log.newest is None:  # not a table: its other files may be those of another program
            is_leftover = bool(_SHARD.fullmatch(name))
        else:
            is_leftover = name != NOT_A_VERSION and not _RESERVED.fullmatch(name)
        if is_leftover and name not in named:
            age_s = now_s - info.mtime_ns / 1e9 if info.mtime_ns else 0.0  # of unknown age: young
            yield Orphan(log.table.path, name, info.size, age_s / 3600)
