"""Reads the log of a table even if parts of it are damaged, for `verify` and `vacuum`.

`Table.history` stops at the first commit that it cannot read. Here every commit is either read or named with its problem.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from urllib.parse import unquote

from weights_store.errors import StoreError
from weights_store.location import one_line
from weights_store.tables.commits import ENTRY, READERS, Commit, digest_names, log_name, wrong_base
from weights_store.tables.metadata import CommitMetadata
from weights_store.tables.shards import ShardRecord
from weights_store.tables.table import Table

_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint(\.[\w-]+)*\.(parquet|json)")
_HEX = re.compile(r"[0-9a-f]+")
# Whatever a commit can turn into when its bytes change: keys gone, texts for numbers.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError)


@dataclass(frozen=True)
class TableLog:
    """The commits of one table, by version."""

    table: Table
    commits: dict[int, Commit]
    """Those that can be read, also those of other programs."""
    problems: dict[int, str]
    """What is wrong with the others, or with the place in the log of some of these."""
    checkpoints: dict[int, list[str]] = field(default_factory=dict)
    """Files in `_delta_log` of Delta's own summaries, by version."""

    @property
    def newest(self) -> int | None:
        """The newest version, None if there is no commit."""
        return max([*self.commits, *self.problems], default=None)

    @property
    def is_whole(self) -> bool:
        """Whether every commit could be read and is in its place."""
        return not self.problems

    @property
    def weaker(self) -> list[int]:
        """Versions whose commits say nothing of the log: they are of stores from before `LogRecord`."""
        ours = (commit for commit in self.commits.values() if commit.metadata is not None)
        return sorted(commit.version for commit in ours if commit.log is None)

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
    versions, checkpoints = list_log(table)
    gaps = _gaps(versions, checkpoints)
    if gaps:  # a listing beside writers may lack one file that was made meanwhile, and have a later one
        versions, checkpoints = list_log(table)
        gaps = _gaps(versions, checkpoints)
    with ThreadPoolExecutor(READERS) as pool:
        read = dict(zip(versions, pool.map(lambda version: _read(table, version), versions), strict=True))
    commits = {version: commit for version, commit in read.items() if isinstance(commit, Commit)}
    problems = {version: problem for version, problem in read.items() if isinstance(problem, str)}
    problems |= gaps
    if not problems:
        problems |= _wrong_links(commits) or _out_of_place(commits)
    return TableLog(table, commits, problems, checkpoints)


def list_log(table: Table) -> tuple[list[int], dict[int, list[str]]]:
    """Return the versions that have an entry in the log, sorted, and the files of Delta's summaries by version."""
    names = (table.location / "_delta_log").files()
    versions = sorted({int(match[1]) for name in names if (match := ENTRY.fullmatch(name))})
    checkpoints: dict[int, list[str]] = {}
    for name in sorted(names):
        if match := _CHECKPOINT.fullmatch(name):
            checkpoints.setdefault(int(match[1]), []).append(name)
    return versions, checkpoints


def _wrong_links(commits: dict[int, Commit]) -> dict[int, str]:
    """Return the commits that are whole, but not those that the next ones were made from."""
    broken = [v for v in sorted(commits) if v + 1 in commits and wrong_base(commits[v + 1], commits[v])]
    problems = {}
    for version in broken:
        # One that fits neither the commit before nor the one after is the stranger.
        stranger = version + 1 if version + 1 in broken else version
        problems[stranger] = f"its entry of the log is not the one that version {stranger + 1} was made from"
    return {version: f"{problem}; restore {log_name(version)} from a copy" for version, problem in problems.items()}


def _out_of_place(commits: dict[int, Commit]) -> dict[int, str]:
    """Return the first problem of commits that name other files than those that are there in their version."""
    active: dict[str, int] = {}  # the files of a version, with their rows
    ever: dict[str, int] = {}  # the version that added a file
    for version, commit in sorted(commits.items()):
        if lost := sorted(set(commit.removed) - active.keys()):
            return {version: f"it removes {lost[0]}, which version {version - 1} does not have"}
        if doubled := sorted(set(commit.added) & ever.keys()):
            return {version: f"it adds {doubled[0]}, which version {ever[doubled[0]]} added: entries were copied"}
        ever |= dict.fromkeys(commit.added, version)
        num_rows = {record.name: record.num_rows for record in commit.shards}
        active = {name: rows for name, rows in active.items() if name not in commit.removed}
        active |= {name: num_rows.get(name, 0) for name in commit.added}
        if commit.log is None:
            continue
        if digest_names(active) != commit.log["files"] or sum(active.values()) != commit.log["num_rows"]:
            return {version: f"it was made for other files than the {len(active)} that the log has up to it"}
    return {}


def _gaps(versions: Sequence[int], checkpoints: Iterable[int]) -> dict[int, str]:
    """Return one problem for each run of commits that are missing up to the newest commit or checkpoint."""
    newest = max([*versions, *checkpoints], default=-1)
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
        commit = table.read_commit(version)
        _check(commit)
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
    if commit.metadata is None:
        return
    written, total = commit.metadata["num_rows_written"], sum(record.num_rows for record in commit.shards)
    if written != total:
        raise ValueError(f"it says {written} rows were written, its shards have {total}")
    if not isinstance(commit.metadata["fingerprint"], str):
        raise TypeError("its fingerprint is not a text")
