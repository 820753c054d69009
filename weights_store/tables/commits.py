"""One entry of a table's Delta log: what our commits record beside Delta's own actions, written and read.

A commit carries our metadata and the record of every shard it adds, both as JSON text, and a digest of the two texts.
Not here: logs that may be damaged (`checks/log.py`).
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from weights_store.errors import DamageError, StoreError
from weights_store.location import Location
from weights_store.schemas import SCHEMA_VERSION
from weights_store.tables.metadata import CommitMetadata
from weights_store.tables.shards import ShardRecord

READERS = 16
"""How many commits are read at once from an object store."""

_METADATA, _SHARDS, _DIGEST = "tokenweights", "tokenweightsShards", "tokenweightsSha256"


@dataclass(frozen=True)
class Commit:
    """One entry of a table's log."""

    version: int
    timestamp_ms: int | None
    metadata: CommitMetadata | None  # None: the commit is not ours
    shards: list[ShardRecord]  # those it added
    added: list[str]
    removed: list[str]


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
        stats = {
            "numRecords": shard.num_rows,
            "minValues": {key: shard.first_key},
            "maxValues": {key: shard.last_key},
            "nullCount": {key: 0},
        }
        actions.append(AddAction(shard.name, shard.num_bytes, {}, now_ms, is_new, json.dumps(stats)))
    return actions


def read_commit(table: Location, version: int) -> Commit:
    """Read one entry of a table's log. A missing entry reads as a commit of another program.

    Raises:
        DamageError: It is not JSON, or our part of it is not what was written.
        StoreError: It was written by a newer tokenweights.
    """
    try:
        text = table.read(log_name(version)).decode(errors="replace")
    except FileNotFoundError:  # another program has cleaned up the log of its table; our tables switch that off
        return Commit(version, None, None, [], [], [])
    try:
        actions = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DamageError(f"{table}: {log_name(version)} is damaged: {error}; restore it from a copy") from error
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    metadata = _metadata(info, table, version)
    return Commit(
        version,
        info.get("timestamp"),
        metadata,
        [] if metadata is None else [ShardRecord(**record) for record in json.loads(info[_SHARDS])],
        [action["add"]["path"] for action in actions if "add" in action],
        [action["remove"]["path"] for action in actions if "remove" in action],
    )


def read_commits(table: Location, versions: range) -> Iterator[Commit]:
    """Yield entries of the log in the order of `versions`, see `read_commit`."""
    if table.is_local or len(versions) < 2:
        yield from (read_commit(table, version) for version in versions)
        return
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(lambda version: read_commit(table, version), versions)


def _metadata(info: Mapping[str, Any], table: Location, version: int) -> CommitMetadata | None:
    if not info.keys() & {_METADATA, _SHARDS, _DIGEST}:
        return None
    try:
        is_whole = digest(info[_METADATA], info[_SHARDS]) == info[_DIGEST]
    except (KeyError, AttributeError):
        is_whole = False
    if not is_whole:
        raise DamageError(f"{table}: {log_name(version)} is damaged: its digest differs; restore it from a copy")
    metadata: CommitMetadata = json.loads(info[_METADATA])
    if metadata["schema_version"] > SCHEMA_VERSION:
        raise StoreError(
            f"{table}@{version} has schema version {metadata['schema_version']}, this tokenweights reads up to "
            f"{SCHEMA_VERSION}; upgrade tokenweights"
        )
    return metadata


def digest(metadata: str, shards: str) -> str:
    """Return the SHA-256 of the two texts that a commit of ours carries."""
    return hashlib.sha256(f"{metadata}\n{shards}".encode("utf-8", "surrogatepass")).hexdigest()
