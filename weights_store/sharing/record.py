"""The record of exported and pushed weight datasets, `tokenweights.json`: what they are, how they were made, which files.

It is written last and covers every other file and itself with SHA-256, as the record of a model folder does. The first part
also stands in the metadata of each Parquet file. Paths of the machine are shortened in it; nothing else of a recipe is left out
but `[store]`. docs/sharing.md lists the keys.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, cast

from weights_store.checks.model_folders import open_record, sign_record
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint, fingerprint_file
from weights_store.names import name_of
from weights_store.sharing.publishable import publishable
from weights_store.tables.metadata import CommitMetadata
from weights_store.tables.shards import ShardRecord
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion
from weights_store.views.lineage import lineage

RECORD = "tokenweights.json"
UNKNOWN_LICENCE = "unknown"
COMMIT_KEYS = (
    "schema_version",
    "fingerprint",
    "identity",
    "tokenizer",
    "reference",
    "parity",
    "contrast",
    "statistics",
    "recipe",
    "packages",
    "python",
    "git_commit",
)
"""What of a commit's metadata stands in the record."""
_KINDS = {"schema_version": int, "name": str, "fingerprint": str, "licence": str, "identity": dict, "statistics": dict}
_KINDS |= {"splits": dict, "lineage": list, "files": dict, "shards": list}
_KINDS_IF_THERE: dict[str, type | UnionType] = dict.fromkeys(
    ("tokenizer", "reference", "parity", "contrast", "recipe", "packages"), dict | None
)
_KINDS_IF_THERE |= {"python": str | None, "git_commit": str | None}
_COUNTS = ("num_pairs", "num_response_tokens")
_SHARD_KINDS: dict[str, type] = {
    "num_rows": int,
    "first_key": str,
    "last_key": str,
    "checksums": dict,
    "group_sizes": list,
}
"""What of a shard does not depend on the version of the library that wrote its file."""
_SUM = re.compile(r"[0-9a-f]{1,16}")
_LINEAGE_KINDS: dict[str, type | UnionType] = {"depth": int, "role": str, "kind": str, "name": str | None}
_LINEAGE_KINDS |= {"version": int | None, "fingerprint": str | None, "num_rows": int | None, "created": str | None}
_KINDS_INSIDE: dict[str, Mapping[str, type | UnionType]] = {
    "splits": {"files": list},
    "lineage": _LINEAGE_KINDS,
    "shards": _SHARD_KINDS,
}


class DatasetRecord(CommitMetadata, total=False):
    """The content of `tokenweights.json`: the `COMMIT_KEYS`, and what only a folder has."""

    name: str
    """`name@version` in the store that it was written from."""
    created: str
    """When that version was committed, ISO 8601."""
    licence: str
    splits: dict[str, dict[str, Any]]
    """`num_pairs` by split, and in `tokenweights.json` the `files` of it."""
    lineage: list[dict[str, Any]]
    """Rows of `WeightStore.lineage`."""
    format: str
    shards: list[dict[str, Any]]
    """Checksums and row groups of the stored version; only of Parquet."""
    files: dict[str, str]
    """SHA-256 of every other file, by its path in the folder."""


def describe(table: Table, weights: TableVersion, licence: str | None, splits: Mapping[str, int]) -> DatasetRecord:
    """Return the part of the record that no file needs to be written for.

    Raises:
        InputError: The licence is empty, or no line of text.
    """
    if licence is not None and not (licence.strip() and licence.isprintable()):
        raise InputError(
            f"licence is {licence!r}, expected a name such as mit or cc-by-4.0; leave it out if it is unknown"
        )
    commit = table.read_commit(weights.version)
    metadata = table.metadata(weights.version)
    made = {key: metadata.get(key) for key in COMMIT_KEYS if key in metadata}
    recipe = {section: keys for section, keys in metadata.get("recipe", {}).items() if section != "store"}
    created = datetime.fromtimestamp((commit.timestamp_ms or 0) / 1000, UTC)
    rows = lineage(table.root, weights).to_dicts()
    record = {
        "name": f"{name_of(weights.table)}@{weights.version}",
        "created": created.isoformat(timespec="seconds"),
        "licence": licence or metadata.get("origin", {}).get("licence") or UNKNOWN_LICENCE,
        "splits": {split: {"num_pairs": num_pairs} for split, num_pairs in splits.items()},
        **made,
        "lineage": [publishable(row | {"created": _iso(row["created"])}) for row in rows],
    }
    if "recipe" in made:
        record["recipe"] = publishable(recipe)
    if "reference" in made:
        record["reference"] = publishable(made["reference"])
    return cast(DatasetRecord, record)


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds")


def footer_of(record: DatasetRecord) -> bytes:
    """Return the record as the metadata of a Parquet file has it."""
    return json.dumps(record, allow_nan=False).encode()


def describe_shard(record: ShardRecord) -> dict[str, Any]:
    """Return what a copy of a shard, written anywhere, must have in common with it."""
    return {key: value for key, value in asdict(record).items() if key in _SHARD_KINDS}


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files that are complete, by their path in the folder."""
    return {name: fingerprint_file(folder / name) for name in names}


def write_record(folder: Path, record: DatasetRecord) -> None:
    """Write the record of a folder whose other files are complete."""
    (folder / RECORD).write_bytes(sign_record(record, record["files"]) + b"\n")


def read_record(folder: Path, where: str) -> DatasetRecord:
    """Return the record of a folder that a stranger may have written.

    Raises:
        InputError: There is none, it is not as it was written, or it is not that of a weight dataset in Parquet.
    """
    try:
        record = open_record((folder / RECORD).read_bytes())
    except OSError as error:
        raise InputError(
            f"{where} has no {RECORD}: it is not a weight dataset that `tokenweights push` wrote; check the name"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: {RECORD} is not as it was written: {error}; push it again") from error
    wrong = [key for key, kind in _KINDS.items() if not isinstance(record.get(key), kind)]
    wrong += [key for key, kind in _KINDS_IF_THERE.items() if not isinstance(record.get(key), kind)]
    for key, kinds in () if wrong else _KINDS_INSIDE.items():
        inside = record[key].values() if isinstance(record[key], dict) else record[key]
        wrong += [key] * (not all(_is_like(value, kinds) for value in inside))
    sound = {} if wrong else _are_sound(record)
    wrong += [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise InputError(
            f"{where}: {RECORD} has no {' and no '.join(wrong)} as a weight dataset in Parquet has them; "
            "pull what `tokenweights push`, or `export` without --format, wrote"
        )
    _check_fingerprint(record, where)
    return cast(DatasetRecord, record)


def _are_sound(record: Mapping[str, Any]) -> dict[str, bool]:
    """Return of parts whose types are right whether everything in them is what our programs read from it."""
    lineage, settings = record["lineage"], record["identity"].get("settings", {})
    return {
        "lineage": all(_is_time(row["created"]) and 0 <= row["depth"] <= len(lineage) for row in lineage),
        "shards": all(map(_is_shard, record["shards"])),
        "tokenizer": isinstance((record.get("tokenizer") or {}).get("vocab_size"), int | None),
        "identity": _has_sections(settings, ("weights", "contrast")) and "estimator" in settings["weights"],
        "statistics": all(isinstance(record["statistics"].get(key), int) for key in _COUNTS),  # `ls` prints them
        "recipe": not record.get("recipe") or _has_sections(record["recipe"], ("dataset", "model", "contrast")),
    }


def _has_sections(settings: object, needed: Iterable[str]) -> bool:
    """Return whether settings are what a recipe has; a section that is not used may be null."""
    if not isinstance(settings, dict) or not all(isinstance(section, dict | None) for section in settings.values()):
        return False
    return all(isinstance(settings.get(section), dict) for section in needed)


def _is_time(text: str | None) -> bool:
    try:
        return text is None or datetime.fromisoformat(text) is not None
    except ValueError:
        return False


def _is_shard(shard: Mapping[str, Any]) -> bool:
    sizes, sums = shard["group_sizes"], shard["checksums"].values()
    is_even = all(isinstance(size, int) and size > 0 for size in sizes) and 0 < sum(sizes) == shard["num_rows"]
    return is_even and all(isinstance(text, str) and _SUM.fullmatch(text) for text in sums)


def _is_like(value: object, kinds: Mapping[str, type | UnionType]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def _check_fingerprint(record: Mapping[str, Any], where: str) -> None:
    expected = fingerprint(record["identity"])
    if record["fingerprint"] != expected:
        raise InputError(
            f"{where}: the fingerprint of the dataset is {record['fingerprint'][:12]}…, that of what it says it was made from "
            f"is {expected[:12]}…: {RECORD} was changed; push it again"
        )


def listed_files(record: DatasetRecord) -> list[str]:
    """Return the data files that a record names, split by split; of a stranger's record these are any texts."""
    return [str(name) for split in record["splits"].values() for name in split["files"]]


def commit_metadata(record: DatasetRecord) -> CommitMetadata:
    """Return what the commit of the original version recorded, as far as it was published."""
    return cast(CommitMetadata, {key: value for key, value in record.items() if key in COMMIT_KEYS})
