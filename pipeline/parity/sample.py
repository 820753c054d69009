"""The pairs of a parity check: of the tokens table, of the source, or those whose log-probs are stored."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, tee

import polars as pl

from pipeline.parity.process import Column
from pipeline.source.intake import pairs_of
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from pipeline.source.rows import RawRow
from pipeline.stages.prepare import Preparation
from pipeline.workers.pair_row import COLUMNS, PairRow, read_pairs
from weights_store import TableVersion, WeightStore
from weights_store.errors import InputError
from weights_store.schemas import SIDES

MAX_STORED_TOKENS = 2048
"""Of a sequence in the sample of a build: the memory of transformers' eager attention grows with its square."""


@dataclass(frozen=True)
class Sample:
    """Some of a recipe's pairs, and where they come from."""

    origin: str
    pairs: list[PairRow]

    def num_tokens(self) -> int:
        """Return how many response tokens there are to compare."""
        return sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self.pairs)


def take_sample(start: Preparation, num_pairs: int, look_at: int | None = None) -> Sample:
    """Return pairs as prepare tokenises them: of the tokens table if it exists, else usable rows of the source.

    Of the table, they are those with the lowest pair_ids. These are hashes, so that is a random sample; and pairs of one
    prompt are adjacent, so the sample shares computations as a build does. Of the source they are the first usable rows, or
    with `look_at` those with the lowest pair_ids among so many of the first rows.

    Raises:
        InputError: The source cannot be read, or no row of it can be used.
    """
    if start.tokens.exists():
        rows = start.tokens.scan()
        last = pl.lit(rows.select("pair_id").bottom_k(num_pairs, by="pair_id").max().collect().item())
        wanted = rows.filter(pl.col("pair_id") <= last).select(COLUMNS).sort("pair_id").collect()
        return Sample(str(start.tokens.reference()), read_pairs(wanted))
    found = ((row, pair) for row, pair in pairs_of(start.opened, start.columns) if isinstance(pair, Pair))
    if look_at is not None:
        by_id = {pair.pair_id: (row, pair) for row, pair in islice(found, look_at)}
        found = (by_id[pair_id] for pair_id in sorted(by_id))
    pairs = list(islice(_tokenized(start, found), num_pairs))
    if not pairs:
        raise InputError(f"dataset.source {start.dataset.source}: no row of it can be used")
    which = "the first rows" if look_at is None else f"a sample of the first {look_at:,} rows"
    return Sample(f"{which} of {start.dataset.source}", pairs)


def _tokenized(start: Preparation, usable: Iterable[tuple[RawRow, Pair]]) -> Iterator[PairRow]:
    found, again = tee(usable)
    for (row, pair), tokens in zip(found, start.tokenize(pair for _, pair in again), strict=True):
        if isinstance(tokens, Unusable):
            continue
        prompt = tokens.chat.to_json()
        yield PairRow(pair.pair_id, row.source_row, prompt, tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)


def stored_sample(
    tokens: TableVersion, logps: TableVersion, num_pairs: int, max_tokens: int = MAX_STORED_TOKENS
) -> tuple[Sample, Column]:
    """Return the pairs with the lowest pair_ids that are scored and not too long, and their stored log-probs."""
    store = WeightStore(tokens.store)
    pairs, scores = store.table(tokens.table), store.table(logps.table)
    first = pairs.key_ranges(64 << 20, tokens.version)[0]  # the pairs that the sample is taken from fit into 64 MiB
    num_tokens = pl.col("prompt_ids").list.len() + pl.max_horizontal(pl.col(f"{side}_ids").list.len() for side in SIDES)
    logps_of_sides = scores.scan(logps.version, within=first).select("pair_id", *(f"{side}_logps" for side in SIDES))
    rows = (
        pairs.scan(tokens.version, within=first)
        .select(COLUMNS)
        .filter(num_tokens <= max_tokens)
        .join(logps_of_sides, on="pair_id")
        .sort("pair_id")
        .head(num_pairs)
        .collect()
    )
    stored = {row["pair_id"]: [row[f"{side}_logps"] for side in SIDES] for row in rows.iter_rows(named=True)}
    return Sample(str(logps), read_pairs(rows)), Column(stored)
