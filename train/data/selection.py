"""Which rows of a weight dataset are in view: a split, the held-out prompts, or all others."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from train.config import DataConfig, EvalSection
from weights_store.schemas import Side

PROMPT_DIGITS = 12
"""A pair_id begins with so many hex digits of a hash of its prompt, so all pairs of a prompt are on the same side."""


@dataclass(frozen=True)
class Selection:
    """What of a dataset is read: the first `max_pairs` rows of a split (empty for all of them).

    `share` of the prompts, 0 to 1, is held out: `held_out` reads these, otherwise all others are read. With `side`, only rows
    with a response on it are read.
    """

    split: str = ""
    share: float = 0.0
    held_out: bool = False
    max_pairs: int | None = None
    side: Side | None = None

    @classmethod
    def for_training(cls, data: DataConfig, evaluation: EvalSection) -> "Selection":
        """Return the rows that are trained on."""
        return cls(data.split, evaluation.share, held_out=False, max_pairs=data.max_pairs)

    @classmethod
    def for_evaluation(cls, data: DataConfig, evaluation: EvalSection) -> "Selection":
        """Return the rows that are held out."""
        return cls(evaluation.split or data.split, evaluation.share, held_out=True)

    @property
    def columns(self) -> list[str]:
        """Columns that `keeps` reads; empty if every row is in view."""
        ids = [] if self.side is None else [f"{self.side}_ids"]
        return ["split"] * bool(self.split) + ["pair_id"] * bool(self.share) + ids

    def keeps(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Return which rows are in view, `[N]`."""
        kept = np.ones(len(rows), np.bool_)
        if self.split:
            kept &= pc.equal(rows["split"], self.split).to_numpy()
        if self.share:
            held_out = [is_held_out(pair_id, self.share) for pair_id in rows["pair_id"].to_pylist()]
            kept &= np.array(held_out) == self.held_out
        if self.side is not None:
            kept &= pc.list_value_length(rows[f"{self.side}_ids"]).to_numpy() > 0
        return kept

    def __str__(self) -> str:
        part = f"split {self.split!r}" if self.split else "any split"
        part += f", {'held out' if self.held_out else 'not held out'} (share {self.share})" if self.share else ""
        return f"{part}, with a {self.side} response" if self.side else part


def is_held_out(pair_id: str, share: float) -> bool:
    """Return whether a pair's prompt is among the held-out `share`: by a hash, the same in every version and run."""
    digest = blake2b(pair_id[:PROMPT_DIGITS].encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2.0**64


def prompt_hashes(pair_ids: Iterable[str]) -> NDArray[np.uint64]:
    """Return a hash of each pair's prompt, `[N]`, which is the beginning of its pair_id: the same in every dataset."""
    return np.array([int(pair_id[:PROMPT_DIGITS], 16) for pair_id in pair_ids], np.uint64)
