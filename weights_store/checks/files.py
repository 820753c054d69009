"""Compares the files of a table with what its commits recorded, and says where inside a file the damage is.

Every shard that any version needs is read once, as a stream: the digest of its bytes finds every flipped bit. Only damaged
shards are decoded, to name the row group, the column and the pairs.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from weights_store.checks.findings import Finding
from weights_store.checks.log import TableLog, list_log
from weights_store.errors import DamageError, StoreError
from weights_store.location import one_line
from weights_store.messages import Progress, logger, show
from weights_store.processes.spread import Spread, in_turn
from weights_store.tables.commits import LAST_CHECKPOINT
from weights_store.tables.shards import RESTORE, ShardReader, ShardRecord
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableReader

_log = logger(__name__)

BYTES_PER_PROGRESS = 64 << 20
"""How much is read before progress is shown again: small tables show none."""
_BATCH_BYTES = 512 << 20
"""How much is read as one piece of work."""
_PROTOCOL = (1, 2)
"""Reader and writer version that a table needs."""
_BYTES_DIFFER = "its bytes are not those that were committed (SHA-256 differs)"
# What decoding damaged Parquet has been seen to raise.
_UNDECODABLE = (DamageError, OSError, pa.ArrowException, ValueError, KeyError, IndexError, TypeError, MemoryError)


@dataclass(frozen=True)
class Examined:
    """One table whose files have been checked."""

    log: TableLog
    findings: list[Finding]
    unsound: frozenset[str]
    """The damaged shards."""


class SoundTable(TableReader):
    """The undamaged shards of one version of a table."""

    def __init__(self, examined: Examined, version: int | None) -> None:
        table = examined.log.table
        super().__init__(table.root, table.path, table.schema, table.key)
        active = examined.log.active(version)
        self._records = [r for _, r in examined.log.records() if r.name in active and r.name not in examined.unsound]
        self.version_number = version
        self.name = f"{table.path}@{version}"
        self.is_whole = examined.log.is_whole and len(self._records) == len(active)
        self.num_bytes = sum(record.num_bytes for record in self._records)

    def __reduce__(self) -> tuple[object, ...]:
        """Leave out the log: a piece of work reads rows alone."""
        return _sound_table, (type(self), {**vars(self), "_commits": {}})

    def records(self, version: int | None = None) -> list[ShardRecord]:  # noqa: ARG002 - it has one version
        """Return the records of the undamaged shards."""
        return list(self._records)

    def check_shards(self, shards: Sequence[ShardRecord]) -> None:
        """Do nothing: all shards have been read and compared just now."""


def _sound_table(kind: type[SoundTable], state: dict[str, object]) -> SoundTable:
    table = kind.__new__(kind)
    vars(table).update(state)
    return table


def examine(log: TableLog, spread: Spread = in_turn) -> Examined:
    """Check the log and every file that any version of a table needs; `spread` reads the files."""
    table, records = log.table, list(log.records())
    num_bytes = sum(record.num_bytes for _, record in records)
    _log.info(f"{table.path}: versions {len(log.commits)}, shards {len(records)}, {num_bytes / 1e6:,.1f} MB")
    findings = [Finding(table.path, problem, version) for version, problem in sorted(log.problems.items())]
    findings += _check_foreign(log)
    findings += check_summaries(log)
    if log.is_whole and log.newest is not None:
        # Opening a version reads the entries since the last checkpoint before it: so each entry is read by one of these.
        last = {version - 1 for version in log.checkpoints if version - 1 in log.commits}
        views = sorted({*log.checkpoints, *last, log.newest})
        findings += [finding for version in views for finding in check_view(log, version)]
        findings += _note_weaker(log)
    digests = {record.sha256: record.name for _, record in records}
    unsound, done, shown, started = set(), 0, 0, time.monotonic()
    checked = spread(_FileCheck(table, digests), _batches([record for _, record in records]))
    for (version, record), problems in zip(records, chain.from_iterable(checked), strict=True):
        findings += [replace(finding, version=version) for finding in problems]
        if problems:
            unsound.add(record.name)
        done += record.num_bytes
        if done - shown >= BYTES_PER_PROGRESS or (shown and done == num_bytes):
            shown = done
            show(Progress(f"verify {table.path}", done, num_bytes, time.monotonic() - started, "bytes"))
    return Examined(log, findings, frozenset(unsound))


@dataclass(frozen=True)
class _FileCheck:
    """Reads shards of a table and returns what is wrong with each, given the names of all its shards by digest."""

    table: Table
    digests: dict[str, str]

    def __call__(self, records: Sequence[ShardRecord]) -> list[list[Finding]]:
        """Return the problems of each shard, without the version."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashing and reading leave Python's lock
            return list(pool.map(lambda record: _check_shard(self.table, record, self.digests), records))


def _batches(records: Sequence[ShardRecord]) -> Iterator[list[ShardRecord]]:
    """Cut shards into pieces of work, in their order."""
    ends = accumulate(record.num_bytes for record in records)
    numbered = ((end // _BATCH_BYTES, record) for end, record in zip(ends, records, strict=True))
    for _, batch in groupby(numbered, key=lambda each: each[0]):
        yield [record for _, record in batch]


def _check_foreign(log: TableLog) -> Iterator[Finding]:
    """Name the commits of other programs, and their files that are gone."""
    for version, commit in sorted(log.commits.items()):
        if commit.metadata is not None:
            continue
        yield Finding(
            log.table.path,
            f"was not written by tokenweights: {len(commit.added)} files without checksums, which cannot be verified; "
            "keep other writers away from the store",
            version,
        )
        for path in commit.added:
            if not log.table.location.exists(path, unquote(path)):
                yield Finding(log.table.path, "the file is missing", version, path)


def _note_weaker(log: TableLog) -> Iterator[Finding]:
    if log.weaker:
        text = f"versions up to {log.weaker[-1]} are of an older tokenweights: exchanged entries of their log may pass"
        yield Finding(log.table.path, text, is_note=True)


def check_summaries(log: TableLog) -> Iterator[Finding]:
    """Yield the checkpoints, and Delta's hint at the last one, that are not a true summary of the log.

    Readers believe them, but need neither: with all entries of the log in place they can be deleted.
    """
    mend = "; delete it, or run `tokenweights repair`: readers need only the entries of the log"
    for version, names in sorted(log.checkpoints.items()):
        for name in names:
            if problem := _problem_of_checkpoint(log, version, name):
                yield Finding(
                    log.table.path,
                    f"it {problem}{mend}, together with {LAST_CHECKPOINT}",
                    version,
                    file=f"_delta_log/{name}",
                )
    try:
        hint = json.loads(log.table.location.read(f"_delta_log/{LAST_CHECKPOINT}"))
        found = hint["version"]
        # A writer may have made it since the log was read.
        is_there = found in log.checkpoints or found in list_log(log.table)[1]
        is_right = is_there and all(type(hint[key]) is int for key in ("version", "size"))
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        found, is_right = "no version", False
    if not is_right:
        known = ", ".join(map(str, sorted(log.checkpoints))) or "none"
        text = f"it is damaged: it names {found!r}, there are checkpoints of versions {known}{mend}"
        yield Finding(log.table.path, text, log.newest, file=f"_delta_log/{LAST_CHECKPOINT}")


def _problem_of_checkpoint(log: TableLog, version: int, name: str) -> str | None:
    """Return how the files that a checkpoint names differ from those that the entries up to its version name."""
    try:
        rows = pq.read_table(pa.BufferReader(log.table.location.read(f"_delta_log/{name}")), columns=["add"])
        named = [add["path"] for add in rows["add"].to_pylist() if add is not None]
    except (*_UNDECODABLE, StoreError) as error:
        return f"is damaged: {one_line(error)}"
    if min(log.problems, default=version + 1) > version and (
        len(named) != len(log.active(version)) or set(named) != log.active(version)
    ):
        return f"names {len(named)} files, the entries up to it {len(log.active(version))}, and they are not the same"
    return None


def check_view(log: TableLog, version: int) -> Iterator[Finding]:
    """Compare what Delta readers see of one version with what the commits recorded."""
    from deltalake import Schema
    from deltalake.exceptions import DeltaError

    table = log.table
    try:
        opened = table.open_delta(version)
        actions = pa.table(opened.get_add_actions(flatten=True)).to_pylist()
        schema, about, protocol = opened.schema(), opened.metadata(), opened.protocol()
    except (StoreError, DeltaError, OSError, ValueError) as error:
        yield Finding(table.path, f"Delta cannot open it: {one_line(error)}", version)
        return
    if schema.fields != Schema.from_arrow(table.schema).fields:
        names = [field.name for field in schema.fields]
        text = f"its log has the columns {names} or types that differ from those of this tokenweights"
        yield Finding(table.path, f"{text}, {table.schema.names}", version)
    if about.partition_columns or (protocol.min_reader_version, protocol.min_writer_version) != _PROTOCOL:
        text = f"partition columns {about.partition_columns} and protocol {tuple(protocol)[:2]}, expected none and {_PROTOCOL}"
        yield Finding(table.path, f"its log has {text}: other programs may not read it", version)
    strange = {key: value for key, value in about.configuration.items() if table.configuration.get(key) != value}
    if strange:
        yield Finding(table.path, f"its log has the properties {strange}, expected {table.configuration}", version)
    active = log.active(version)
    stats = ("size_bytes", "num_records", f"min.{table.key[0]}", f"max.{table.key[0]}")
    seen = {action["path"]: tuple(action.get(name) for name in stats) for action in actions}
    recorded = {r.name: (r.num_bytes, r.num_rows, r.first_key, r.last_key) for _, r in log.records()}
    if seen.keys() != active or len(actions) != len(active):
        yield Finding(
            table.path,
            f"Delta readers see {len(actions)} files, its commits say {len(active)}, and they are not the same: "
            "a checkpoint in _delta_log is damaged; delete it and _last_checkpoint, or run `tokenweights repair`",
            version,
        )
    for name in sorted(seen.keys() & recorded.keys()):
        if seen[name] != recorded[name]:
            text = f"Delta has (bytes, rows, first key, last key) {seen[name]}, its commit recorded {recorded[name]}"
            yield Finding(table.path, f"{text}: readers would skip or miscount rows", version, name)


def _check_shard(table: Table, record: ShardRecord, digests: dict[str, str]) -> list[Finding]:
    """Return what is wrong with one file; the caller adds the version."""
    place = Finding(table.path, "", shard=record.name)
    size, sha256 = 0, hashlib.sha256()
    try:
        for data in table.location.stream(record.name):
            sha256.update(data)
            size += len(data)
    except FileNotFoundError:
        return [replace(place, problem=f"the file is missing; {RESTORE}")]
    except StoreError as error:
        return [replace(place, problem=f"the file cannot be read: {one_line(error)}; {RESTORE}")]
    problem = _compare_bytes(record, size, sha256.hexdigest(), digests)
    try:
        reader = table.open_shard(record)
    except _UNDECODABLE as error:
        what = "its footer" if problem else "the commit's record of it"
        inside = [replace(place, problem=f"{what} is damaged: {_without_place(error, table, record)}")]
    else:
        inside = list(_look_inside(table, reader)) if problem else []
    if problem is None or (inside and problem == _BYTES_DIFFER):
        return inside  # says the same, and where
    hint = "" if inside else "; every value is as committed: the damage is in the footer or between the values"
    return [replace(place, problem=f"{problem}{hint}; {RESTORE}"), *inside]


def _compare_bytes(record: ShardRecord, size: int, digest: str, digests: dict[str, str]) -> str | None:
    """Return how the bytes of a file differ from what was committed, None if they do not."""
    if (size, digest) == (record.num_bytes, record.sha256):
        return None
    if digest != record.sha256 and digest in digests:
        return f"it holds the bytes of shard {digests[digest]}: files were exchanged or copied over each other"
    if size != record.num_bytes:
        how = "cut off" if size < record.num_bytes else "extended"
        return f"it has {size} bytes, {record.num_bytes} were committed: it was {how}"
    return _BYTES_DIFFER


def _look_inside(table: Table, reader: ShardReader) -> Iterator[Finding]:
    """Yield a finding for each column of each row group that is not as committed."""
    record, key = reader.record, list(table.key)
    for index in range(len(reader.group_sizes)):
        within, span = f", row group {index}", ""
        # The key first: all other checksums depend on it.
        for columns in (key, *([name] for name in record.checksums if name not in key)):
            try:
                rows = reader.read_group(index, columns)
            except _UNDECODABLE as error:
                text = _without_place(error, table, record, within)
                if not text.startswith("column "):
                    text = f"column {', '.join(columns)}{span} {text}"
                yield Finding(table.path, text, shard=record.name, row_group=index)
                if not span:
                    break
            else:
                span = span or f" (rows {key[0]} {rows[key[0]][0]} … {rows[key[0]][-1]})"


def _without_place(error: BaseException, table: Table, record: ShardRecord, within: str = "") -> str:
    """Return an error's text without the place, which the finding names already."""
    text = one_line(error).removeprefix(f"{table.path}, shard {record.name}{within}: ")
    return text.removeprefix(f"{table.path}: shard {record.name} ")
