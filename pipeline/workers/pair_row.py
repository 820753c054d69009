"""A pair as the workers see it: one row of the tokens table, maybe behind a contrastive prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypedDict

import polars as pl

from pipeline.chat.tokenizer import ChatTokenizer, Condition
from pipeline.engine.score_once import ScoredSequence
from weights_store.schemas import Reason


class QuarantineRow(TypedDict):
    """A row of the quarantine table."""

    source_row: int
    pair_id: str
    reason: str
    detail: str
    raw: str


@dataclass(frozen=True, slots=True)
class PairRow:
    """What the workers read of a pair."""

    pair_id: str
    source_row: int
    prompt: str
    """JSON of the chat."""
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    problem: str | None = None
    """Why no model can take the pair, if that is known already."""

    def sequences(self, top_k: int = 0) -> list[ScoredSequence]:
        """Return the chosen and the rejected response behind the prompt; one of them may have no tokens."""
        return [ScoredSequence(self.prompt_ids, ids, top_k=top_k) for ids in (self.chosen_ids, self.rejected_ids)]

    def unscorable(self, detail: str) -> QuarantineRow:
        """Return the pair's row of the quarantine table."""
        return {
            "source_row": self.source_row,
            "pair_id": self.pair_id,
            "reason": Reason.UNSCORABLE.value,
            "detail": detail,
            "raw": self.prompt[:2000],
        }


COLUMNS = [field.name for field in fields(PairRow) if field.name != "problem"]
"""Columns of the tokens table that a worker needs."""


def read_pairs(rows: pl.DataFrame) -> list[PairRow]:
    """Return rows of the tokens table as pairs."""
    return [PairRow(**row) for row in rows.select(COLUMNS).iter_rows(named=True)]


def under_condition(pairs: Sequence[PairRow], condition: Condition, tokenizer: ChatTokenizer) -> list[PairRow]:
    """Put a contrastive prompt into the prompts of pairs."""
    prompt_ids = tokenizer.conditioned_prompt_ids([pair.prompt for pair in pairs], condition)
    return [
        replace(pair, prompt_ids=[], problem="the chat has no place for the contrastive prompt")
        if ids is None
        else replace(pair, prompt_ids=ids)
        for pair, ids in zip(pairs, prompt_ids, strict=True)
    ]


def why_not(pair: PairRow, vocab_size: int, max_tokens: int | None = None) -> str | None:
    """Return why a model cannot take a pair, None if it can. Such a pair must not reach an engine: some would kill it."""
    if pair.problem is not None:
        return pair.problem
    parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    if not pair.prompt_ids or not (pair.chosen_ids or pair.rejected_ids):
        return "the prompt or both responses have no tokens"
    longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    if max_tokens is not None and longest > max_tokens:
        return f"prompt and response have {longest} tokens, the model takes {max_tokens}"
    if min(min(ids, default=0) for ids in parts) < 0 or max(max(ids, default=0) for ids in parts) >= vocab_size:
        return f"a token id is outside the model's vocabulary of {vocab_size}"
    return None
