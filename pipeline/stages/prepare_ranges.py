"""What prepare does with one range of pair_ids: compare the pairs with the stored ones, tokenise what is new, write shards.

`prepare.py` does this with one range after the other, or with many at once on Ray, and makes the result visible with one
commit. Nothing here reads the source or commits.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import polars as pl
import pyarrow as pa

from pipeline.chat.pair_ids import Limits, TokenizedPair
from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.source.compare import ComparedPair, compared_range
from pipeline.source.intake import ROWS_PER_BATCH, quarantine_row
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from weights_store import Table
from weights_store.schemas import SIDES, TOKENS, Reason
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.shards import ShardRecord, Written

CURRENT = ["source_row", "split", *(f"{side}_score" for side in SIDES)]
"""Columns of a pair that the source may change although its text is the same."""


class Example(NamedTuple):
    """A pair that cannot be used, and where it stood."""

    problem: Unusable
    source_row: int
    raw: str


@dataclass
class TokenizedRange:
    """What became of the pairs of one range."""

    num_rows: int
    """Pairs of the source, the repeated ones too."""
    unusable: list[dict[str, object]] = field(default_factory=list)
    """Quarantine rows."""
    examples: dict[str, Example] = field(default_factory=dict)
    """The first unusable pair of each reason."""
    reasons: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    """Of pairs: all that are usable, the new ones, and those of them that were cut."""
    splits: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    digested: bytearray = field(default_factory=bytearray)
    """Of each usable pair what the fingerprint of the dataset is made of, in the order of pair_ids; about 35 bytes."""
    old_rows_stay: bool = True
    """Whether every stored pair of the range is still in the source, and unchanged."""
    written: Written = field(default_factory=lambda: Written([], TOKENS.empty_table()))


@dataclass(frozen=True)
class RangeTokenizer:
    """Tokenises the new pairs of one range.

    Args:
        tokens: The table, of whose version `kept` rows stay; None: none do.
        tokenizer: Makes ids of chats, within `limits`.
        has_splits: Whether the split of a pair is part of the dataset's fingerprint.
    """

    tokens: Table
    kept: int | None
    tokenizer: ChatTokenizer
    limits: Limits
    has_splits: bool

    def __call__(self, part: tuple[KeyRange, pa.Table]) -> TokenizedRange:
        """Return what became of the pairs of a source in a range, sorted by pair_id and row."""
        compared = compared_range(*part, self.tokens, self.kept)
        found = TokenizedRange(compared.rows.height)
        found.old_rows_stay = compared.gone.is_empty() and "moved" not in compared.rows["standing"]
        writer = self.tokens.writer()
        for batch in compared.rows.iter_slices(ROWS_PER_BATCH):
            rows = self._tokenize([ComparedPair._make(row) for row in batch.iter_rows()], found)
            writer.write(pa.Table.from_pylist(rows, TOKENS))
        found.written = writer.finish_part()
        return found

    def _tokenize(self, rows: Sequence[ComparedPair], found: TokenizedRange) -> list[dict[str, object]]:
        """Return the tokens rows of the new pairs; count all, and note what cannot be used."""
        tokenised = []
        new = self.tokenizer.tokenize_pairs(
            (Pair.from_json(row.pair) for row in rows if row.standing == "new"), self.limits
        )
        for row in rows:
            try:
                if row.standing == "duplicate":
                    raise Unusable(Reason.DUPLICATE_PAIR, "the same pair stood in an earlier row")
                if row.standing == "new":
                    tokenised.append(_tokens_row(row, next(new), found))
            except Unusable as problem:
                reason = problem.reason.value
                found.reasons[reason] += 1
                found.examples.setdefault(reason, Example(problem, row.source_row, row.pair))
                found.unusable.append(quarantine_row(row.source_row, row.pair, problem, row.pair_id))
                continue
            found.counts["num_pairs"] += 1
            scores = [score for score in (row.chosen_score, row.rejected_score) if score is not None]
            found.counts["num_scored_pairs"] += len(scores) == len(SIDES)
            found.splits[row.split] += 1
            found.digested += f"{row.pair_id}{scores or ''}{row.split if self.has_splits else ''}".encode()
        found.counts["num_new_pairs"] += len(tokenised)
        return tokenised


def _tokens_row(row: ComparedPair, tokens: TokenizedPair | Unusable, found: TokenizedRange) -> dict[str, object]:
    if isinstance(tokens, Unusable):
        raise tokens
    found.notes.update(tokens.notes)
    found.counts["num_new_prompts_cut"] += tokens.prompt_was_cut
    found.counts["num_new_responses_cut"] += tokens.response_was_cut
    return {
        "pair_id": row.pair_id,
        "prompt": tokens.chat.to_json(),
        "prompt_ids": tokens.prompt_ids,
        "chosen_ids": tokens.chosen_ids,
        "rejected_ids": tokens.rejected_ids,
        "chosen_score": row.chosen_score,
        "rejected_score": row.rejected_score,
        "source_row": row.source_row,
        "split": row.split,
    }


@dataclass(frozen=True)
class RangeMerger:
    """Writes all rows of one range: those of version `kept` that are still in the source, as they are now, and the new ones."""

    tokens: Table
    kept: int | None
    fresh: list[ShardRecord]
    """The new rows."""

    def __call__(self, part: tuple[KeyRange, pa.Table]) -> Written:
        """Return the rows of a range, given those of the source in it, sorted by pair_id and row."""
        piece, rows = part
        first = pl.DataFrame(pl.from_arrow(rows.select(["pair_id", *CURRENT]))).unique("pair_id", keep="first")
        old = self.tokens.scan(self.kept, within=piece)
        stay = old.drop(CURRENT).join(first.lazy(), on="pair_id").select(TOKENS.names)
        near = [shard for shard in self.fresh if piece.overlaps(shard.first_key, shard.last_key)]
        new = piece.of(self.tokens.scan_shards(near)).select(TOKENS.names)
        writer = self.tokens.writer()
        writer.write(pl.concat([stay, new]).sort("pair_id").collect().to_arrow())
        return writer.finish_part()
