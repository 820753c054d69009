"""Exports a weight dataset for programs that do not know this store: plain Parquet, or the TIS-DPO release's JSONL.

Row groups are checked against the commit as they are read. The folder appears whole or not at all.
"""

import json
import re
import shutil
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow.parquet as pq

from weights_store.errors import InputError, MismatchError
from weights_store.names import name_of
from weights_store.processes.lock import locked, wait_for
from weights_store.schemas import SIDES
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion
from weights_store.views.token_texts import Tokenizer, TokenTexts

FORMATS = ("parquet", "jsonl")

FILE_BYTES = 256 << 20
"""Arrow bytes after which the next Parquet file begins."""

_RECORD = "tokenweights.json"


def export_table(
    table: Table, weights: TableVersion, folder: Path, form: str, tokenizer: Tokenizer | None
) -> list[Path]:
    """Write one version into a new folder, see `WeightStore.export`."""
    if form not in FORMATS:
        raise InputError(f"no export format {form!r}: expected one of {', '.join(FORMATS)}")
    _check_empty(folder)
    folder = folder.absolute()
    with locked(folder.with_name(f".{folder.name}.lock"), wait_for(f"exporting into {folder}")):
        return _export(table, weights, folder, form, tokenizer)


def _export(table: Table, weights: TableVersion, folder: Path, form: str, tokenizer: Tokenizer | None) -> list[Path]:
    _check_empty(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir()
    try:
        is_parquet, version = form == "parquet", weights.version
        names = (
            _write_parquet(table, version, partial) if is_parquet else _write_jsonl(table, version, partial, tokenizer)
        )
        record = {"name": name_of(str(weights)), "fingerprint": weights.fingerprint, "format": form, "files": names}
        (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder)  # also over an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [folder / name for name in (*names, _RECORD)]


def _check_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; export into a new one")


def _write_parquet(table: Table, version: int, folder: Path) -> list[str]:
    """Write files with pyarrow's defaults, one row group per row group of the store."""
    names: list[str] = []
    groups = table.batches(version)
    for first in groups:
        names.append(f"part-{len(names):05d}.parquet")
        num_bytes = 0
        with pq.ParquetWriter(folder / names[-1], table.schema) as writer:
            for rows in chain([first], groups):
                writer.write_table(rows)
                num_bytes += rows.nbytes
                if num_bytes >= FILE_BYTES:
                    break
    return names


def _write_jsonl(table: Table, version: int, folder: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Write one file per split: a line has no field for it."""
    metadata = table.metadata(version)
    if num_unpaired := metadata.get("statistics", {}).get("num_unpaired_rows"):
        raise MismatchError(
            f"{table.path}@{version} has {num_unpaired:,} rows with one response, and the release's lines have two; export it "
            "as parquet"
        )
    eos = metadata.get("tokenizer", {}).get("eos_token_id")
    if eos is None:
        raise MismatchError(
            f"{table.path}@{version} records no EOS id, and the release's weights stop before EOS; export it as parquet"
        )
    texts = None if tokenizer is None else TokenTexts(tokenizer)
    names: dict[str, IO[bytes]] = {}
    with ExitStack() as files:
        for rows in table.batches(version):
            for (split,), part in pl.DataFrame(pl.from_arrow(rows)).partition_by("split", as_dict=True).items():
                name = re.sub(r"[^\w.-]+", "-", str(split)).strip(".-") + ".jsonl"
                if name not in names:
                    names[name] = files.enter_context((folder / name).open("wb"))
                _release_lines(part, int(eos), texts).write_ndjson(names[name])
    return sorted(names)


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
