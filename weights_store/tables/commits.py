"""One entry of a table's Delta log: what our commits record beside Delta's own actions, written and read.

A commit carries our metadata and the record of every shard it adds, both as JSON text, and a digest of the two texts. The
metadata say which version the commit makes, of which one, which files it removes and what the version then consists of
(`LogRecord`). So a commit is checked against Delta's actions in the same entry, and one commit is enough to check what Delta
makes of the entries and checkpoints before it. Commits of stores from before that record are read too; they are of a weaker
kind, because nothing tells whether their removals and their place in the log are what was written.

Not here: logs that may be damaged (`checks/log.py`).
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa

from weights_store.errors import DamageError, StoreError
from weights_store.location import Location
from weights_store.schemas import SCHEMA_VERSION
from weights_store.tables.metadata import CommitMetadata, LogRecord
from weights_store.tables.shards import ShardRecord

if TYPE_CHECKING:
    from deltalake import DeltaTable

READERS = 16
"""How many commits are read at once from an object store."""

LAST_CHECKPOINT = "_last_checkpoint"
"""Delta's hint at its newest summary of the log, in the same folder."""

ENTRY = re.compile(r"(\d{20})\.json")
"""The name of an entry in `_delta_log`, with its version."""

_METADATA, _SHARDS, _DIGEST = "tokenweights", "tokenweightsShards", "tokenweightsSha256"
_ACTIONS = {"add", "remove", "commitInfo", "metaData", "protocol", "txn", "cdc", "domainMetadata"}
# Whatever an entry can turn into when its bytes change: other JSON, keys gone, texts for numbers.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Commit:
    """One entry of a table's log."""

    version: int
    timestamp_ms: int | None
    metadata: CommitMetadata | None  # None: the commit is not ours
    shards: list[ShardRecord]  # those it added
    added: list[str]
    removed: list[str]
    digest: str | None  # of our part

    @property
    def log(self) -> LogRecord | None:
        """What it says of the log; None if it is not ours, or of a store from before."""
        return None if self.metadata is None else self.metadata.get("log")


def log_name(version: int) -> str:
    """Return the file of one version's commit in the table's folder."""
    return f"_delta_log/{version:020d}.json"


def custom_metadata(metadata: Mapping[str, object], shards: Sequence[ShardRecord]) -> dict[str, str]:
    """Return our part of a commit.

    Raises:
        ValueError: `metadata` holds NaN or an infinity.
    """
    texts = json.dumps(metadata, allow_nan=False), json.dumps([asdict(shard) for shard in shards])
    return {_METADATA: texts[0], _SHARDS: texts[1], _DIGEST: digest(*texts)}


def delta_actions(key: str, shards: Sequence[ShardRecord], removed: Sequence[ShardRecord]) -> list[object]:
    """Return Delta's actions that add `shards`, with the statistics of the `key` column, and remove `removed`."""
    from deltalake.transaction import AddAction, RemoveAction

    now_ms = int(time.time() * 1000)
    is_new = not removed  # a compaction adds no rows: change feeds must not see them again
    actions: list[object] = [
        RemoveAction(
            path=shard.name, data_change=False, deletion_timestamp=now_ms, size=shard.num_bytes, partition_values={}
        )
        for shard in removed
    ]
    for shard in shards:
        stats = json.dumps(statistics_of(shard, key))
        actions.append(AddAction(shard.name, shard.num_bytes, {}, now_ms, is_new, stats))
    return actions


def statistics_of(shard: ShardRecord, key: str) -> dict[str, object]:
    """Return the statistics that Delta readers get of a shard: they skip files by them."""
    return {
        "numRecords": shard.num_rows,
        "minValues": {key: shard.first_key},
        "maxValues": {key: shard.last_key},
        "nullCount": {key: 0},
    }


def names_of_files(opened: "DeltaTable") -> list[str]:
    """Return the names of the shards of an open table, sorted."""
    return sorted(pa.table(opened.get_add_actions()).column("path").to_pylist())


def digest_names(names: Iterable[str]) -> str:
    """Return the SHA-256 of the names of a version's files, in whatever order they come."""
    return hashlib.sha256("\n".join(sorted(names)).encode("utf-8", "surrogatepass")).hexdigest()


def read_commit(folder: Location, table: str, version: int, key: str) -> Commit:
    """Read one entry of the log of a table, by its path; `key` is its first key column.

    A missing entry reads as a commit of another program.

    Raises:
        DamageError: It is not JSON, it is not what was written, or it is the entry of another version or table.
        StoreError: It was written by a newer tokenweights.
    """
    try:
        data = folder.read(log_name(version))
    except FileNotFoundError:  # another program has cleaned up the log of its table; our tables switch that off
        return Commit(version, None, None, [], [], [], None)
    try:
        return _parse(data.decode(), table, version, key)
    except _MALFORMED as error:
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}, {error}"
        raise DamageError(
            f"{folder}: {log_name(version)} is damaged: {problem}; restore it from a copy, or run `tokenweights repair`"
        ) from error


def wrong_base(later: Commit, earlier: Commit) -> str | None:
    """Return what is wrong if the commit of one version is not the one that the next version was made from, else None."""
    if later.log is None or later.log["base"] == earlier.digest:
        return None
    return f"its entry of the log is not the one that version {later.version} was made from"


def digest(metadata: str, shards: str) -> str:
    """Return the SHA-256 of the two texts that a commit of ours carries."""
    return hashlib.sha256(f"{metadata}\n{shards}".encode("utf-8", "surrogatepass")).hexdigest()


def _parse(text: str, table: str, version: int, key: str) -> Commit:
    actions = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not actions:
        raise ValueError("it is empty")
    for action in actions:
        if len(action) != 1 or not action.keys() <= _ACTIONS:
            raise ValueError(f"it holds {sorted(action) or 'nothing'} where an action of Delta is expected")
    added = [action["add"] for action in actions if "add" in action]
    removed = [_text(action["remove"]["path"]) for action in actions if "remove" in action]
    paths = [_text(action["path"]) for action in added]
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    if not info.keys() & {_METADATA, _SHARDS, _DIGEST}:
        return Commit(version, info.get("timestamp"), None, [], paths, removed, None)
    if digest(info[_METADATA], info[_SHARDS]) != info[_DIGEST]:
        raise ValueError("its digest differs")
    metadata: CommitMetadata = json.loads(info[_METADATA])
    if metadata["schema_version"] > SCHEMA_VERSION:
        raise StoreError(
            f"{table}@{version} has schema version {metadata['schema_version']}, this tokenweights reads up to "
            f"{SCHEMA_VERSION}; upgrade tokenweights"
        )
    shards = [ShardRecord(**record) for record in json.loads(info[_SHARDS])]
    _check_added(added, shards, key)
    log = metadata.get("log")
    if log is not None:
        _check_log(log, table, version, removed)
    timestamp_ms = info.get("timestamp") if log is None else log["written_ms"]
    return Commit(version, timestamp_ms, metadata, shards, paths, removed, info[_DIGEST])


def _check_added(added: Sequence[Mapping[str, Any]], shards: Sequence[ShardRecord], key: str) -> None:
    """Compare the files that Delta readers see with our records of them."""
    records = {shard.name: shard for shard in shards}
    if sorted(action["path"] for action in added) != sorted(records):
        raise ValueError(f"it adds {len(added)} files and records {len(shards)} shards, which differ")
    for action in added:
        record = records[action["path"]]
        seen = (action["size"], action["partitionValues"], action.get("deletionVector"), json.loads(action["stats"]))
        if seen != (record.num_bytes, {}, None, statistics_of(record, key)):
            raise ValueError(
                f"size, partition or statistics of {record.name} are not those of the shard that it records"
            )


def _check_log(log: LogRecord, table: str, version: int, removed: list[str]) -> None:
    if (log["table"], log["version"]) != (table, version):
        raise ValueError(f"it is the entry of {log['table']}@{log['version']}: entries were exchanged or copied")
    if sorted(log["removed"]) != sorted(map(unquote, removed)):
        raise ValueError(f"it removes {len(removed)} files and records {len(log['removed'])}, which differ")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a path")
    return value
