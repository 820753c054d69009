"""Brings a dataset folder that `push` or `export` wrote into a store, as a version of a weight dataset that is ready to train.

The files come from strangers. Nothing in them runs, and no name in the record leads out of the folder. Every file is compared
with its SHA-256 in the record before anything is written. Then the rows go back into the shards and row groups that the version
had, and every shard is compared with the checksums of the original one: a training sees the same pairs in the same order.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weights_store.catalog import open_table
from weights_store.checks.rows import violations
from weights_store.errors import ConflictError, InputError
from weights_store.fingerprint import explain_difference, fingerprint_file
from weights_store.location import Location, one_line
from weights_store.messages import Progress, show
from weights_store.names import check_new_name, split_name, weights_path
from weights_store.schemas import SCHEMA_VERSION, WEIGHTS
from weights_store.sharing.data_files import FOLDER, ROW
from weights_store.sharing.record import (
    RECORD,
    DatasetRecord,
    commit_metadata,
    describe_shard,
    listed_files,
    read_record,
)
from weights_store.tables.checksums import sum_checksums
from weights_store.tables.metadata import CommitMetadata, OriginRecord
from weights_store.tables.shards import ShardRecord
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion

_DATA_FILE = re.compile(rf"{FOLDER}/\w+-\d{{5,}}-of-\d{{5,}}\.parquet", re.ASCII)


@dataclass(frozen=True)
class Pulled:
    """The result of a pull."""

    weights: TableVersion
    num_pairs: int
    is_new: bool
    """Whether it was not there yet."""
    left_behind: dict[str, int]
    """What the weights were made from and the folder does not hold: the number of tables, models and sources, by kind."""


def bring_in(root: Location, folder: Path, place: str, revision: str | None = None, name: str | None = None) -> Pulled:
    """Bring a dataset folder into a store, whole or not at all.

    Args:
        root: The store; it is made if there is none.
        folder: The files: `tokenweights.json` and `data/`.
        place: Where they are from: `hf://datasets/owner/name`, or the folder.
        revision: The commit of the repository.
        name: The weight dataset to make; None: as it was called where it was pushed.

    Raises:
        InputError: The folder is no weight dataset, is not as its record says, or breaks a rule of weights; or the store has
            another dataset of this name.
        SettingsError: The name is malformed.
        StoreError: The store cannot be read or written, or the dataset would be inside another one's folder.
        ConflictError: Another writer made a version of this dataset meanwhile, of other rows.
    """
    record = read_record(folder, place)
    if record["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{place} has schema version {record['schema_version']}, this tokenweights reads {SCHEMA_VERSION}; upgrade the "
            "older tokenweights and push it again"
        )
    _check_files(record, folder, place)
    table = open_table(root, weights_path(check_new_name(name or split_name(record["name"])[0])))
    num_pairs = sum(shard["num_rows"] for shard in record["shards"])
    left_behind = dict(Counter(str(row.get("kind")) for row in record["lineage"] if row["depth"]))
    base = table.version()
    if base is not None and _is_there(table, base, record):
        return Pulled(table.reference(base), num_pairs, False, left_behind)
    metadata = _metadata(record, place, revision)
    if base is None:
        table.check_place()
    else:
        metadata["changes"] = _changes(table, base, metadata, place)
    shards = _write_shards(table, record, folder, place)
    try:
        weights = table.commit(shards, metadata, base, "append" if base is None else "overwrite")
    except ConflictError:
        _delete(table, shards)
        newest = table.version()
        if newest is None or not _is_there(table, newest, record):
            raise
        return Pulled(table.reference(newest), num_pairs, False, left_behind)  # another pull of the same was faster
    return Pulled(weights, num_pairs, True, left_behind)


def _write_shards(table: Table, record: DatasetRecord, folder: Path, place: str) -> list[ShardRecord]:
    """Write the rows into shards like those of the original version; delete them after an error.

    Raises:
        InputError: The rows are not those that the record promises.
        StoreError: The store cannot be written.
    """
    num_pairs = sum(shard["num_rows"] for shard in record["shards"])
    writer, started = table.writer(), time.monotonic()
    try:
        groups = _Groups(record, folder, place)
        for index, promised in enumerate(record["shards"]):
            writer.write_shard(groups.of_shard(promised))
            if describe_shard(writer.records[-1]) != promised:
                raise InputError(
                    f"{place}: the rows of shard {index} are not those that {RECORD} promises (checksums differ); "
                    "nothing was brought in, push it again"
                )
            show(Progress("pull", groups.num_rows, num_pairs, time.monotonic() - started, "pairs"))
        groups.check_end()
    except BaseException:
        _delete(table, writer.records)
        raise
    return writer.records


def _delete(table: Table, shards: Sequence[ShardRecord]) -> None:
    for shard in shards:
        with suppress(OSError):
            table.location.delete(shard.name)


def _check_files(record: DatasetRecord, folder: Path, place: str) -> None:
    """Compare the data files with the record.

    Raises:
        InputError: A name leads elsewhere, or a file is missing or has changed.
    """
    for name in listed_files(record):
        if not _DATA_FILE.fullmatch(name):
            raise InputError(
                f"{place}: {RECORD} names the file {name!r}, expected {FOLDER}/SPLIT-00000-of-00001.parquet"
            )
        digest = record["files"].get(name)
        try:
            found = fingerprint_file(folder / name)
        except OSError as error:
            raise InputError(
                f"{place}: {name} is missing, or cannot be read: {error.strerror}; push it again"
            ) from error
        if found != digest:
            raise InputError(
                f"{place}: {name} is not the file that was pushed: its SHA-256 is {found[:12]}…, recorded is "
                f"{str(digest)[:12]}…; nothing was brought in. {_remedy(folder / name, place)}"
            )


def _remedy(file: Path, place: str) -> str:
    """Return what to do about a file that has changed: the hub's cache keeps a damaged copy until somebody deletes it."""
    if not place.startswith("hf://"):
        return "Push it again"
    return f"Delete {file.resolve()}, which may be a damaged copy, and pull again; if that does not help, push it again"


def _is_there(table: Table, version: int, record: DatasetRecord) -> bool:
    """Return whether a version holds the very rows of the record, by the checksums of both."""
    if table.metadata(version)["fingerprint"] != record["fingerprint"]:
        return False
    ours = sum_checksums(shard.sums for shard in table.records(version))
    theirs = sum_checksums({name: int(text, 16) for name, text in s["checksums"].items()} for s in record["shards"])
    return ours == theirs


def _metadata(record: DatasetRecord, place: str, revision: str | None) -> CommitMetadata:
    origin: OriginRecord = {
        "place": place,
        "revision": revision,
        "name": record["name"],
        "licence": record["licence"],
        "lineage": record["lineage"],
    }
    return {**commit_metadata(record), "parents": [], "changes": [], "origin": origin}


def _changes(table: Table, base: int, metadata: CommitMetadata, place: str) -> list[str]:
    """Return what differs from the version that is there, which must have been pulled from the same place.

    Raises:
        InputError: It is another dataset.
    """
    newest = table.metadata(base)
    origin = newest.get("origin")
    if origin is None or origin["place"] != place:
        was = "built here" if origin is None else f"pulled from {origin['place']}"
        raise InputError(
            f"{table.root} has a weight dataset {table.path}@{base} already, which was {was}; give this one another name "
            "with --as"
        )
    return explain_difference(newest["identity"], metadata["identity"])


@dataclass
class _Groups:
    """The rows of all files in the order of the version, one row group of the store at a time."""

    record: DatasetRecord
    folder: Path
    place: str
    _splits: list["_SplitRows"] = field(default_factory=list)
    num_rows: int = 0

    def __post_init__(self) -> None:
        self._vocab_size = (self.record.get("tokenizer") or {}).get("vocab_size")
        for split in self.record["splits"].values():
            self._splits.append(_SplitRows([self.folder / name for name in split["files"]], self.place))

    def of_shard(self, promised: dict[str, Any]) -> Iterator[pa.Table]:
        """Yield the row groups of one shard.

        Raises:
            InputError: Rows are missing or there twice, or a row breaks a rule of weights.
        """
        for size in promised["group_sizes"]:
            end = self.num_rows + size
            rows = pa.concat_tables([split.take(end) for split in self._splits]).sort_by(ROW)
            if rows.num_rows != size or (rows[ROW].to_numpy() != np.arange(self.num_rows, end)).any():
                raise InputError(
                    f"{self.place}: rows {self.num_rows} to {end - 1} of the version are not all there once; push it again"
                )
            self.num_rows = end
            rows = rows.drop_columns([ROW]).combine_chunks()
            for found in violations("weights", rows, ("pair_id",), self._vocab_size):
                pair_id = rows["pair_id"][found.row].as_py()
                raise InputError(
                    f"{self.place}: pair {pair_id}: {found.problem}; whoever pushed it must build it again"
                )
            yield rows

    def check_end(self) -> None:
        """Check that no row is left.

        Raises:
            InputError: A file has more rows than the version.
        """
        if any(split.has_more() for split in self._splits):
            raise InputError(f"{self.place}: its files have more rows than {RECORD} says; push it again")


class _SplitRows:
    """The rows of one split, in order, read a row group at a time."""

    def __init__(self, paths: Sequence[Path], place: str) -> None:
        self._place = place
        self._groups = self._read(paths)
        self._waiting = WEIGHTS.append(pa.field(ROW, pa.int64(), nullable=False)).empty_table()

    def take(self, end: int) -> pa.Table:
        """Return the next rows whose place in the version is below `end`."""
        parts = []
        while True:
            num_rows = int(np.searchsorted(self._waiting[ROW].to_numpy(), end))
            parts.append(self._waiting.slice(0, num_rows))
            self._waiting = self._waiting.slice(num_rows)
            if self._waiting.num_rows or not self.has_more():
                return pa.concat_tables(parts)

    def has_more(self) -> bool:
        """Return whether a row is left."""
        if not self._waiting.num_rows:
            self._waiting = next(self._groups, self._waiting)
        return self._waiting.num_rows > 0

    def _read(self, paths: Sequence[Path]) -> Iterator[pa.Table]:
        for path in paths:
            try:
                with pq.ParquetFile(path) as file:
                    for index in range(file.num_row_groups):
                        rows = file.read_row_group(index, self._waiting.schema.names)
                        yield rows.select(self._waiting.schema.names).cast(self._waiting.schema)
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                raise InputError(
                    f"{self._place}: {path.name} cannot be read: {one_line(error)}; push it again"
                ) from error
