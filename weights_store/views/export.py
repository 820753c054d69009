"""Exports a weight dataset for programs that do not know this store: plain Parquet, or lines of JSON for other trainers.

Row groups are checked against the commit as they are read. The folder appears whole or not at all. `push` writes the same files
(`sharing/dataset_folder.py`).
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import polars as pl

from weights_store.errors import InputError, MismatchError
from weights_store.messages import Progress, logger, show
from weights_store.schemas import SIDES
from weights_store.sharing.data_files import SplitFiles, count_splits, file_names, write_data
from weights_store.sharing.new_folder import new_folder
from weights_store.sharing.record import (
    RECORD,
    DatasetRecord,
    describe,
    describe_shard,
    digest_files,
    footer_of,
    write_record,
)
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion
from weights_store.views.token_texts import Tokenizer, TokenTexts
from weights_store.views.trainer_rows import datum_lines, loss_scale_lines

_log = logger(__name__)

FORMATS = ("parquet", "jsonl", "tinker", "loss_scale")


def export_table(
    table: Table, weights: TableVersion, folder: Path, form: str, tokenizer: Tokenizer | None, licence: str | None
) -> list[Path]:
    """Write one version into a new folder, see `WeightStore.export`."""
    if form not in FORMATS:
        raise InputError(f"no export format {form!r}: expected one of {', '.join(FORMATS)}")
    if form == "tinker" and tokenizer is not None:
        raise InputError("lines of tinker have ids and no texts, so a tokenizer would do nothing: leave it out")
    texts = None if tokenizer is None else TokenTexts(tokenizer)
    with new_folder(folder) as partial:
        if form == "parquet":
            record, _ = write_parquet(table, weights, partial, texts, licence)
        else:
            record = _write_lines(table, weights, partial, form, texts, licence)
        write_record(partial, record)
    return [folder.absolute() / name for name in (*record["files"], RECORD)]


def write_parquet(
    table: Table, weights: TableVersion, folder: Path, texts: TokenTexts | None, licence: str | None
) -> tuple[DatasetRecord, list[SplitFiles]]:
    """Write the data files of one version into an empty folder, and return what is to be their record.

    Raises:
        MismatchError: An id is not in the tokenizer.
        DamageError: A shard is not what was committed.
    """
    splits = count_splits(table, weights.version)
    record = describe(table, weights, licence, splits)
    written = write_data(table, weights.version, folder, texts, footer_of(record), splits)
    files = [name for split in written for name in split.files]
    record["format"] = "parquet"
    record["splits"] = {split.split: {"num_pairs": split.num_pairs, "files": split.files} for split in written}
    record["shards"] = [describe_shard(shard) for shard in table.records(weights.version)]
    record["files"] = digest_files(folder, files)
    return record, written


def _write_lines(
    table: Table, weights: TableVersion, folder: Path, form: str, texts: TokenTexts | None, licence: str | None
) -> DatasetRecord:
    """Write one file per split: a line has no field for it."""
    version = weights.version
    metadata = table.metadata(version)
    if num_unpaired := metadata.get("statistics", {}).get("num_unpaired_rows"):
        raise MismatchError(
            f"{table.path}@{version} has {num_unpaired:,} rows with one response, and lines of {form} have two; export it as "
            "parquet"
        )
    eos = metadata.get("tokenizer", {}).get("eos_token_id")
    if eos is None and form == "jsonl":
        raise MismatchError(
            f"{table.path}@{version} records no EOS id, and the release's weights stop before EOS; export it as parquet"
        )
    splits = count_splits(table, version)
    names = {split: f"{name}.jsonl" for split, name in file_names(splits).items()}
    num_rows, num_weighted, total, started = 0, 0, sum(splits.values()), time.monotonic()
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            split: stack.enter_context((folder / name).open("wb")) for split, name in names.items()
        }
        for rows in map(pl.DataFrame, map(pl.from_arrow, table.batches(version))):
            num_weighted += int((rows["pair_weight"] != 1).sum())
            for (split,), part in rows.partition_by("split", as_dict=True).items():
                _write_part(part, files[str(split)], form, eos, texts)
            num_rows += rows.height
            show(Progress("write", num_rows, total, time.monotonic() - started, "pairs"))
    if num_weighted and form != "tinker":
        _log.warning(
            f"lines of {form} have no pair weights, and {num_weighted:,} pairs have another one than 1: they will count as "
            "all others do; parquet and tinker keep them"
        )
    record = describe(table, weights, licence, splits)
    record["format"] = form
    record["splits"] = {split: {"num_pairs": splits[split], "files": [name]} for split, name in names.items()}
    record["files"] = digest_files(folder, names.values())
    return record


def _write_part(rows: pl.DataFrame, file: IO[bytes], form: str, eos: Any, texts: TokenTexts | None) -> None:
    if form == "jsonl":
        _release_lines(rows, int(eos), texts).write_ndjson(file)
        return
    lines = datum_lines(rows) if form == "tinker" else loss_scale_lines(rows, texts)
    file.writelines(f"{line}\n".encode() for line in lines)


def _release_lines(rows: pl.DataFrame, eos: int, texts: TokenTexts | None) -> pl.DataFrame:
    """Return the fields of the release, in its order, with `chosen_weight` negated, because its loader negates it."""
    ids, weights = {"prompt": pl.col("prompt_ids")}, {}
    for side in SIDES:
        ends_with_eos = pl.col(f"{side}_ids").list.last().eq_missing(eos)
        length = pl.col(f"{side}_ids").list.len() - ends_with_eos.cast(pl.UInt32)
        sign = pl.lit(-1 if side == "chosen" else 1, pl.Float32)
        ids[side] = pl.col(f"{side}_ids").list.head(length)
        weights[f"{side}_weight"] = pl.col(f"{side}_token_weights").list.head(length) * sign
    lines = rows.select(**ids, **weights)
    if texts is None:
        return lines.rename({name: f"{name}_ids" for name in ids})
    decoded = {name: [texts.join(one) for one in lines[name].to_list()] for name in ids}
    return lines.with_columns(pl.Series(name, column, pl.String) for name, column in decoded.items())
