"""Which pairs a table lacks, cut into chunks of about `chunk_tokens`, and their rows."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import polars as pl

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.workers.pair_row import COLUMNS, PairRow, read_pairs, under_condition
from pipeline.workers.request import Request, Target
from weights_store import Table, TableVersion, WeightStore
from weights_store.names import quarantine_path
from weights_store.schemas import Reason
from weights_store.tables.key_ranges import KeyRange

RANGE_BYTES = 512 << 20
"""Memory for one range of pairs while the missing ones are looked up."""
_tokenizer = lru_cache(maxsize=1)(ChatTokenizer)


def missing_pairs(tokens: TableVersion, table: Table) -> Iterator[pl.DataFrame]:
    """Yield the pairs that have no row yet, by pair_id, one range at a time: `pair_id` and `num_tokens` to compute."""
    for piece in WeightStore(tokens.store).table(tokens.table).key_ranges(RANGE_BYTES, tokens.version):
        yield missing_within(piece, tokens, table)


def missing_within(piece: KeyRange, tokens: TableVersion, table: Table) -> pl.DataFrame:
    """Return the pairs of one range that have no row yet, by pair_id: `pair_id` and `num_tokens` to compute."""
    pairs = WeightStore(tokens.store).table(tokens.table).scan(tokens.version, within=piece)
    lengths = pl.sum_horizontal(pl.col(c).list.len() for c in ("prompt_ids", "chosen_ids", "rejected_ids"))
    done = [table.scan(within=piece)] if table.exists() else []
    quarantined = WeightStore(tokens.store).table(quarantine_path(tokens.table))
    if quarantined.exists():  # pairs that this very scorer could not take: trying them again would change nothing
        by_this = (pl.col("reason") == Reason.UNSCORABLE.value) & pl.col("detail").str.starts_with(f"{table.path}: ")
        done.append(piece.of(quarantined.scan()).filter(by_this))  # its key is another one
    wanted = pairs.select("pair_id")
    for rows in done:
        wanted = wanted.join(rows.select("pair_id"), on="pair_id", how="anti")
    ids = wanted.collect()
    if ids.is_empty():  # the usual case of a second build: no list has been read
        return ids.with_columns(num_tokens=pl.lit(0, pl.UInt32))
    return (
        pairs.join(ids.lazy(), on="pair_id", how="semi")
        .select("pair_id", lengths.alias("num_tokens"))
        .sort("pair_id")
        .collect()
    )


def count_missing(tokens: TableVersion, table: Table) -> tuple[int, int]:
    """Return how many pairs have no row yet, and their tokens."""
    parts = [(part.height, int(part["num_tokens"].sum())) for part in missing_pairs(tokens, table)]
    num_pairs, num_tokens = (sum(counts) for counts in zip(*parts, strict=True))
    return num_pairs, num_tokens


def cut(part: pl.DataFrame, chunk_tokens: int) -> Iterator[pl.DataFrame]:
    """Cut missing pairs, sorted by pair_id, into spans of about `chunk_tokens`."""
    numbered = part.with_columns(((pl.col("num_tokens").cum_sum() - 1) // chunk_tokens).alias("chunk"))
    for chunk in numbered.partition_by("chunk", maintain_order=True):
        yield chunk.select("pair_id", "num_tokens")


def first_pairs(tokens: TableVersion, num_pairs: int) -> list[PairRow]:
    """Return the pairs with the smallest pair_ids, at most so many."""
    table, first = WeightStore(tokens.store).table(tokens.table), pl.DataFrame()
    for piece in table.key_ranges(RANGE_BYTES, tokens.version):
        ids = (
            table.scan(tokens.version, within=piece)
            .select("pair_id")
            .collect()
            .get_column("pair_id")
            .bottom_k(num_pairs)
        )
        rows = table.scan(tokens.version, within=piece).filter(pl.col("pair_id").is_in(ids.to_list())).select(COLUMNS)
        first = pl.concat([first, rows.collect().sort("pair_id")], how="diagonal").head(num_pairs)
        if first.height == num_pairs:  # ranges come in the order of their keys
            break
    return read_pairs(first)


def pairs_of(request: Request, target: Target, chunk: pl.DataFrame) -> list[PairRow]:
    """Read the pairs of a chunk, with the target's contrastive prompt if it has one."""
    table = WeightStore(request.tokens.store).table(request.tokens.table)
    span = KeyRange.between(*chunk.select(first=pl.min("pair_id"), last=pl.max("pair_id")).row(0))
    wanted = table.scan(request.tokens.version, within=span).join(
        chunk.lazy().select("pair_id"), on="pair_id", how="semi"
    )
    rows = read_pairs(wanted.select(COLUMNS).collect())
    if target.condition is None:
        return rows
    date = table.metadata(request.tokens.version).get("cut", {}).get("template_date")  # the day of all other prompts
    tokenizer = _tokenizer(Path(request.tokenizer), request.chat_template, date)
    return under_condition(rows, target.condition, tokenizer)
