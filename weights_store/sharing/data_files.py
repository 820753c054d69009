"""Plain Parquet files of one version of a weight dataset, named as `datasets` names them: `data/train-00000-of-00003.parquet`.

Columns of `schemas.WEIGHTS`, with a tokenizer the texts `prompt`, `chosen` and `rejected`, and `row`: where the row stands in
the version. `row` brings the stored order back, and with it the batches of a training. Only encodings that every reader knows.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from weights_store.messages import Progress, show
from weights_store.schemas import WEIGHTS
from weights_store.tables.shards import ROW_GROUP_BYTES
from weights_store.tables.table import Table
from weights_store.views.token_texts import TokenTexts

FOLDER = "data"
FILE_BYTES = 256 << 20
"""Arrow bytes after which the next file begins."""
GROUP_BYTES = 4 * ROW_GROUP_BYTES
"""Arrow bytes of one row group."""
ROW = "row"
_TEXTS = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
"""Columns of texts, and those of their ids."""
_RESERVED = {"all"}
"""`datasets` has its own meaning for it."""


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split."""

    split: str
    name: str
    """The split as part of a file's name: letters, digits and `_`."""
    files: list[str]
    """Paths in the folder, in the order of the rows."""
    num_pairs: int


def columns(has_texts: bool) -> pa.Schema:
    """Return the columns of the files: the id and the texts first, for people who look at the first columns."""
    texts = [pa.field(name, pa.string(), nullable=False) for name in _TEXTS] if has_texts else []
    key, *rest = WEIGHTS
    return pa.schema([key, *texts, *rest, pa.field(ROW, pa.int64(), nullable=False)])


def count_splits(table: Table, version: int) -> dict[str, int]:
    """Return the number of pairs of each split, by its name.

    Raises:
        DamageError: A shard is not what was committed.
    """
    counts: Counter[str] = Counter()
    for rows in table.batches(version, ["split"]):
        counts.update({entry["values"]: entry["counts"] for entry in rows["split"].value_counts().to_pylist()})
    return dict(sorted(counts.items()))


def file_names(splits: Iterable[str]) -> dict[str, str]:
    """Return each split as it stands in names of files, all different: `train[:10%]` becomes `train_10`."""
    names: dict[str, str] = {}
    for split in splits:
        plain = re.sub(r"\W+", "_", split, flags=re.ASCII).strip("_") or "split"
        taken, name, number = {*names.values(), *_RESERVED}, plain, 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        names[split] = name
    return names


def write_data(
    table: Table, version: int, folder: Path, texts: TokenTexts | None, footer: bytes, splits: Mapping[str, int]
) -> list[SplitFiles]:
    """Write one version into `folder`, in the memory of a row group for each split.

    `splits` are those of `count_splits`. `footer` stands under the key `tokenweights` in the metadata of every file.

    Raises:
        MismatchError: An id is not in the tokenizer.
        DamageError: A shard is not what was committed.
    """
    (folder / FOLDER).mkdir()
    schema = columns(texts is not None).with_metadata({"tokenweights": footer})
    writers = {
        split: _SplitWriter(folder / FOLDER, split, name, schema, texts) for split, name in file_names(splits).items()
    }
    num_rows, total, started = 0, sum(splits.values()), time.monotonic()
    for rows in table.batches(version):
        rows = rows.append_column(ROW, pa.array(range(num_rows, num_rows + rows.num_rows), pa.int64()))
        num_rows += rows.num_rows
        for split in rows["split"].unique().to_pylist():
            writers[split].write(rows.filter(pc.equal(rows["split"], split)))
        show(Progress("write", num_rows, total, time.monotonic() - started, "pairs"))
    return [writer.finish() for writer in writers.values()]


@dataclass
class _SplitWriter:
    """Writes the rows of one split as files of bounded size."""

    folder: Path
    split: str
    name: str
    schema: pa.Schema
    texts: TokenTexts | None
    num_rows: int = 0
    _waiting: list[pa.Table] = field(default_factory=list)
    _paths: list[Path] = field(default_factory=list)
    _writer: pq.ParquetWriter | None = None
    _num_bytes: int = 0  # in the open file

    def write(self, rows: pa.Table) -> None:
        self.num_rows += rows.num_rows
        self._waiting.append(rows)
        if sum(table.nbytes for table in self._waiting) >= GROUP_BYTES:
            self._write_group()

    def finish(self) -> SplitFiles:
        """Write what is left and name the files, now that their number is known."""
        self._write_group()
        self._close()
        files = []
        for index, path in enumerate(self._paths):
            final = path.with_name(f"{self.name}-{index:05d}-of-{len(self._paths):05d}.parquet")
            files.append(f"{FOLDER}/{path.rename(final).name}")
        return SplitFiles(self.split, self.name, files, self.num_rows)

    def _write_group(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting = pa.concat_tables(self._waiting), []
        if self.texts is not None:
            for name, ids in _TEXTS.items():
                rows = rows.append_column(name, _texts_of(self.texts, rows[ids]))
        if self._writer is None:
            self._paths.append(self.folder / f"{self.name}-{len(self._paths):05d}.parquet")
            self._writer = pq.ParquetWriter(self._paths[-1], self.schema, compression="zstd", use_dictionary=["split"])
        self._writer.write_table(rows.select(self.schema.names).cast(self.schema), row_group_size=rows.num_rows)
        self._num_bytes += rows.nbytes
        if self._num_bytes >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._num_bytes = None, 0


def _texts_of(texts: TokenTexts, ids: pa.ChunkedArray) -> pa.Array:
    return pa.array([texts.join(one) for one in pl.Series(pl.from_arrow(ids)).to_list()], pa.string())
