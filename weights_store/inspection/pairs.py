"""Pairs as people look at them: every token with its text and all its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ShownSide:
    """One response. All sequences have one entry per token, `[T]`."""

    ids: Sequence[int]
    texts: Sequence[str]
    """Decoded over token borders: joined they are the response. A character of several tokens stands with its first one, and
    the others have an empty text. Without a tokenizer the ids as text, "#1234"."""
    is_special: Sequence[bool]
    measures: Mapping[str, Sequence[float]]
    """By name of `MEASURES`, in their order; only those that the dataset has."""
    clamped: Sequence[int]
    """-1: the score is at or below the lower end of the clamp; 1: at or above the upper one; else 0."""
    other_weights: Sequence[float] | None = None
    """Weights of the other dataset, if two are compared and it has the same tokens."""


@dataclass(frozen=True)
class ShownPair:
    """One preference pair; a side may have no tokens."""

    pair_id: str
    split: str
    source_row: int | None
    prompt: str
    """The text that the template made of the chat, special tokens included."""
    chosen: ShownSide
    rejected: ShownSide
    pair_weight: float | None
    pair_logratio: float | None
    """Σ over chosen − Σ over rejected tokens of the log-ratio, nats: above 0, the contrastive pair agrees with the label."""
    effective_share: float
    """Mean of the sides with tokens, see `SideSurvey.effective_share`."""
    disagreement: float | None = None
    """Mean |log2(other weight / weight)| over the tokens of both sides, if two datasets are compared and both have the same
    tokens. Weights below 1/64 count as 1/64, so that a weight of 0 makes it large and not infinite."""
