"""Reads the log of a table even if parts of it are damaged, for `verify` and `vacuum`.

`Table.history` stops at the first commit that it cannot read. Here every commit is either read or named with its problem.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import unquote

from weights_store.errors import StoreError
from weights_store.location import one_line
from weights_store.tables.commits import READERS, Commit, log_name, read_commit
from weights_store.tables.metadata import CommitMetadata
from weights_store.tables.shards import ShardRecord
from weights_store.tables.table import Table

_COMMIT = re.compile(r"(\d{20})\.json")
_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(\.[\w-]+)*\.(parquet|json)")
_HEX = re.compile(r"[0-9a-f]+")
_ACTIONS = {"add", "remove", "commitInfo", "metaData", "protocol", "txn", "cdc", "domainMetadata"}
# Whatever a commit can turn into when its bytes change: no JSON, other JSON, keys gone, texts for numbers.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError)


@dataclass(frozen=True)
class TableLog:
    """The commits of one table, by version."""

    table: Table
    commits: dict[int, Commit]
    """Those that can be read, also those of other programs."""
    problems: dict[int, str]
    """What is wrong with the others."""

    @property
    def newest(self) -> int | None:
        """The newest version, None if there is no commit."""
        return max([*self.commits, *self.problems], default=None)

    @property
    def is_whole(self) -> bool:
        """Whether every commit could be read."""
        return not self.problems

    def metadata(self, version: int | None) -> CommitMetadata | None:
        """Return what one commit recorded; None if it is not ours, cannot be read or does not exist."""
        commit = None if version is None else self.commits.get(version)
        return commit.metadata if commit else None

    def active(self, version: int | None) -> set[str]:
        """Return the files of one version, as far as the commits can be read."""
        names: set[str] = set()
        for at in sorted(self.commits):
            if version is not None and at <= version:
                names.difference_update(self.commits[at].removed)
                names.update(self.commits[at].added)
        return names

    def records(self) -> Iterator[tuple[int, ShardRecord]]:
        """Yield every shard that a commit recorded, with the version that added it."""
        for version, commit in sorted(self.commits.items()):
            yield from ((version, record) for record in commit.shards)

    def num_rows(self, version: int | None) -> int | None:
        """Return the rows of one version as recorded; None if part of it was not recorded or cannot be read."""
        recorded = {record.name: record.num_rows for _, record in self.records()}
        names = self.active(version)
        return sum(recorded[name] for name in names) if self.is_whole and names <= recorded.keys() else None

    def named(self) -> set[str]:
        """Return every file that a commit adds or removes: old versions need the removed ones."""
        paths = {path for commit in self.commits.values() for path in (*commit.added, *commit.removed)}
        return paths | {unquote(path) for path in paths}  # the protocol lets writers escape paths


def read_log(table: Table) -> TableLog:
    """Read every commit of a table; it may have none."""
    names = (table.location / "_delta_log").files()
    versions = sorted({int(match[1]) for name in names if (match := _COMMIT.fullmatch(name))})
    with ThreadPoolExecutor(READERS) as pool:
        read = dict(zip(versions, pool.map(lambda version: _read(table, version), versions), strict=True))
    commits = {version: commit for version, commit in read.items() if isinstance(commit, Commit)}
    problems = {version: problem for version, problem in read.items() if isinstance(problem, str)}
    checkpoints = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return TableLog(table, commits, problems | _gaps(versions, max([*versions, *checkpoints], default=-1)))


def _gaps(versions: list[int], newest: int) -> dict[int, str]:
    """Return one problem for each run of commits that are missing among 0..newest."""
    gaps = {}
    expected = 0
    for version in [*versions, newest + 1]:
        if version > expected:
            span = f"commit {expected} is" if version == expected + 1 else f"commits {expected}..{version - 1} are"
            gaps[expected] = f"{span} missing from _delta_log; restore the log from a copy"
        expected = version + 1
    return gaps


def _read(table: Table, version: int) -> Commit | str:
    try:
        commit = read_commit(table.location, version)
        _check(commit)
        if commit.metadata is None:
            _check_actions(table.location.read(log_name(version)))
    except StoreError as error:
        return f"its commit cannot be read: {one_line(error)}"
    except _UNREADABLE as error:
        problem = f"{type(error).__name__}, {one_line(error)}; restore {log_name(version)} from a copy"
        return f"its commit cannot be read: {problem}"
    return commit


def _check(commit: Commit) -> None:
    """Raise ValueError, TypeError or KeyError if a commit's record is malformed or contradicts itself."""
    for record in commit.shards:
        numbers, digests = (record.num_rows, record.num_bytes), (record.sha256, *record.checksums.values())
        if not isinstance(record.name, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError(f"its record of shard {record.name!r} is malformed")
        if not all(isinstance(digest, str) and _HEX.fullmatch(digest) for digest in digests):
            raise ValueError(f"its checksums of shard {record.name} are malformed")
    for path in (*commit.added, *commit.removed):
        if not isinstance(path, str):
            raise TypeError(f"{path!r} is not a path")
    if commit.metadata is None:
        return
    recorded = {record.name for record in commit.shards}
    if set(commit.added) != recorded:
        raise ValueError(f"it adds {len(commit.added)} files and records {len(recorded)} shards, which differ")
    written, total = commit.metadata["num_rows_written"], sum(record.num_rows for record in commit.shards)
    if written != total:
        raise ValueError(f"it says {written} rows were written, its shards have {total}")
    if not isinstance(commit.metadata["fingerprint"], str):
        raise TypeError("its fingerprint is not a text")


def _check_actions(data: bytes) -> None:
    """Check that a commit of another program is a commit at all: if not, the files that it named would look like leftovers."""
    actions = [json.loads(line) for line in data.splitlines() if line.strip()]
    if not actions:
        raise ValueError("it is empty")
    for action in actions:
        unknown = action.keys() - _ACTIONS
        if unknown or not action:
            raise ValueError(f"it holds {sorted(unknown) or 'nothing'} where an action of Delta is expected")
