"""Which pairs a table lacks, cut into chunks of about `chunk_tokens`, and their rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import polars as pl

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.workers.pair_row import COLUMNS, PairRow, read_pairs, under_condition
from pipeline.workers.request import AnchorOptions, MismatchOptions, Request, Target
from weights_store import Table, TableVersion, WeightStore
from weights_store.names import quarantine_path
from weights_store.schemas import Reason
from weights_store.tables.checksums import sum_checksums
from weights_store.tables.key_ranges import KeyRange

RANGE_BYTES = 512 << 20
"""Memory for one range of pairs while the missing ones are looked up."""
_AROUND_PROMPT = 256
_tokenizer = lru_cache(maxsize=1)(ChatTokenizer)


def missing_pairs(tokens: TableVersion, table: Table) -> Iterator[pl.DataFrame]:
    """Yield the pairs that have no row yet, by pair_id, one range at a time, see `missing_within`.

    If the table has exactly the pairs of the tokens, only the commits of both are read.
    """
    pairs = WeightStore(tokens.store).table(tokens.table)
    if table.exists() and column_sum(table, "pair_id") == column_sum(pairs, "pair_id", tokens.version):
        return
    for piece in pairs.key_ranges(RANGE_BYTES, tokens.version):
        yield missing_within(piece, tokens, table)


def column_sum(table: Table, column: str, version: int | None = None) -> tuple[int, int]:
    """Return the number of rows of one version and the checksum of a column, from its commits alone.

    Two tables whose sums of `pair_id` are the same have the same pairs: others would have the same 64 bits by chance only.
    """
    records = table.records(version)
    return sum(record.num_rows for record in records), sum_checksums(r.sums for r in records).get(column, 0)


def missing_within(piece: KeyRange, tokens: TableVersion, table: Table) -> pl.DataFrame:
    """Return the pairs of one range that have no row yet, by pair_id.

    The columns are `pair_id`, `num_tokens` to compute, and the tokens of the prompt and of the longer response.
    """
    pairs = WeightStore(tokens.store).table(tokens.table).scan(tokens.version, within=piece)
    prompt, *responses = (pl.col(c).list.len() for c in ("prompt_ids", "chosen_ids", "rejected_ids"))
    lengths = {
        "num_tokens": pl.sum_horizontal(prompt, *responses),
        "prompt_tokens": prompt,
        "response_tokens": pl.max_horizontal(responses),
    }
    done = [table.scan(within=piece)] if table.exists() else []
    quarantined = WeightStore(tokens.store).table(quarantine_path(tokens.table))
    if quarantined.exists():  # pairs that this very scorer could not take: trying them again would change nothing
        by_this = (pl.col("reason") == Reason.UNSCORABLE.value) & pl.col("detail").str.starts_with(f"{table.path}: ")
        done.append(piece.of(quarantined.scan()).filter(by_this))  # its key is another one
    wanted = pairs.select("pair_id")
    for rows in done:
        wanted = wanted.join(rows.select("pair_id"), on="pair_id", how="anti")
    ids = wanted.collect()
    if ids.is_empty():  # no list has been read
        return ids.with_columns(**dict.fromkeys(lengths, pl.lit(0, pl.UInt32)))
    return pairs.join(ids.lazy(), on="pair_id", how="semi").select("pair_id", **lengths).sort("pair_id").collect()


@dataclass(frozen=True)
class Backlog:
    """What a table lacks: pairs, their tokens to compute, and the tokens of the longest prompt and of the longest sequence."""

    num_pairs: int = 0
    num_tokens: int = 0
    longest_prompt: int = 0
    longest: int = 0

    @classmethod
    def of(cls, missing: pl.DataFrame) -> "Backlog":
        """Count missing pairs, see `missing_within`."""
        if missing.is_empty():
            return cls()
        prompts, responses = missing["prompt_tokens"].cast(pl.Int64), missing["response_tokens"].cast(pl.Int64)
        num_tokens, longest = int(missing["num_tokens"].sum()), int((prompts + responses).to_numpy().max())
        return cls(missing.height, num_tokens, int(prompts.to_numpy().max()), longest)

    def __add__(self, other: "Backlog") -> "Backlog":
        """Return both together."""
        return Backlog(
            self.num_pairs + other.num_pairs,
            self.num_tokens + other.num_tokens,
            max(self.longest_prompt, other.longest_prompt),
            max(self.longest, other.longest),
        )


def count_missing(tokens: TableVersion, table: Table) -> Backlog:
    """Return what a table lacks."""
    return sum((Backlog.of(part) for part in missing_pairs(tokens, table)), Backlog())


def sized(request: Request, backlogs: Iterable[Backlog]) -> Request:
    """Return the request with an engine for the longest sequence that its targets lack, one backlog for each.

    A contrastive prompt is not put into all prompts for that. It has at most as many tokens as bytes, and what a chat template
    puts around it has fewer than `_AROUND_PROMPT`. If one has more, the worker says so, and is started again for any length.
    """
    longest = 0
    for target, backlog in zip(request.targets, backlogs, strict=True):
        if not backlog.num_pairs:
            continue
        if isinstance(request.options, AnchorOptions):
            length = backlog.longest_prompt + request.options.sampling.max_new_tokens
        elif isinstance(request.options, MismatchOptions):
            length = backlog.longest_prompt + request.options.longest
        else:
            length = backlog.longest
        added = len(target.condition.text.encode()) + _AROUND_PROMPT if target.condition else 0
        longest = max(longest, length + added)
    return replace(request, engine=replace(request.engine, longest=None if request.any_length else longest))


def cut(part: pl.DataFrame, chunk_tokens: int) -> Iterator[pl.DataFrame]:
    """Cut missing pairs, sorted by pair_id, into spans of about `chunk_tokens`."""
    numbered = part.with_columns(((pl.col("num_tokens").cum_sum() - 1) // chunk_tokens).alias("chunk"))
    for chunk in numbered.partition_by("chunk", maintain_order=True):
        yield chunk.drop("chunk")


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
