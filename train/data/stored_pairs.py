"""Pairs as they are stored: the columns of one row group decoded, checked, and handed out row by row.

Called by `dataset.py`, which knows where row groups lie. Nothing here reads a file; nothing is tokenised.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from weights_store.errors import MismatchError

_SIDES = ("chosen", "rejected")
_ALWAYS = [
    "pair_id",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    *(f"{side}_{name}" for side in _SIDES for name in ("token_weights", "ref_logps")),
    "pair_weight",
]
_REF_TOP = [f"{side}_{name}" for side in _SIDES for name in ("ref_top_ids", "ref_top_logps")]
_SCORES = [f"{side}_score" for side in _SIDES]
_ANCHORS = ["anchor_ids", "anchor_ref_logps"]

_ROUNDING_NATS = 1e-3
"""Log-probs above 0 by less than this are rounding of a log-softmax."""

REBUILD = "rebuild the dataset with `tokenweights build`"
_ADD_REF_TOP = "build the dataset again with score.top_k above 0, or choose a loss that needs no reference top-k"
_ADD_SCORES = "build the dataset again from pairs that carry both annotator scores, or choose a loss that needs none"
_ADD_ANCHORS = (
    "build the dataset again with an [anchors] section in the recipe (`tokenweights build RECIPE --set anchors.seed=0`), or "
    "train with loss.anchor='online' or loss.triplet_gamma=0"
)
_REMEDIES = {
    **dict.fromkeys(_REF_TOP, _ADD_REF_TOP),
    **dict.fromkeys(_SCORES, _ADD_SCORES),
    **dict.fromkeys(_ANCHORS, _ADD_ANCHORS),
}


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response as stored, one entry per token, end-of-text included: shapes `[T]`, and `[T, K]` of the top k.

    `ref_top_ids` and `ref_top_logps` (nats) are the reference's K likeliest tokens in the place of each token, the likeliest
    first; None unless the dataset was opened `with_ref_top`.
    """

    ids: NDArray[np.int32]
    token_weights: NDArray[np.float32]
    ref_logps: NDArray[np.float32]
    ref_top_ids: NDArray[np.int32] | None = None
    ref_top_logps: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair; chosen and rejected are exchanged already where the config says `swap`.

    `pair_weight` (unitless, >= 0) is the pair's share in the loss; the scores are the annotators', None unless the dataset was
    opened `with_scores`. The anchor is a response that was sampled for the prompt, None unless the dataset was opened
    `with_anchors`; its token weights are 1, and no loss reads them. A filler stands where a rank has no pair left: whoever
    trains on it counts it 0 times.
    """

    pair_id: str
    prompt_ids: NDArray[np.int32]
    chosen: StoredResponse
    rejected: StoredResponse
    pair_weight: float = 1.0
    chosen_score: float | None = None
    rejected_score: float | None = None
    anchor: StoredResponse | None = None
    is_filler: bool = False

    @property
    def num_tokens(self) -> int:
        """Length of the longer of its two sequences, prompt + response."""
        return len(self.prompt_ids) + max(len(self.chosen.ids), len(self.rejected.ids))

    def swapped(self) -> "Pair":
        """Return the pair with everything of chosen and rejected exchanged."""
        return Pair(
            self.pair_id,
            self.prompt_ids,
            chosen=self.rejected,
            rejected=self.chosen,
            pair_weight=self.pair_weight,
            chosen_score=self.rejected_score,
            rejected_score=self.chosen_score,
            anchor=self.anchor,
            is_filler=self.is_filler,
        )


def column_names(*, with_ref_top: bool = False, with_scores: bool = False, with_anchors: bool = False) -> list[str]:
    """Return the columns of `schemas.WEIGHTS` that pairs are made from."""
    wanted = ((_REF_TOP, with_ref_top), (_SCORES, with_scores), (_ANCHORS, with_anchors))
    return [*_ALWAYS, *(name for names, asked in wanted if asked for name in names)]


def remedy(column: str) -> str:
    """Return what to do about a dataset that has no values in `column`."""
    return _REMEDIES.get(column, REBUILD)


class _Ragged:
    """A list column as flat values and offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunk = column.combine_chunks()
        array = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
        self.offsets: NDArray[np.int64] = np.asarray(array.offsets).astype(np.int64)
        self.values: NDArray[Any] = array.values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def row_of_first(self, bad: NDArray[np.bool_]) -> int | None:
        """Return the row of the first True among values within the rows, None where there is none."""
        first, last = self.offsets[0], self.offsets[-1]
        hits = np.flatnonzero(bad[first:last])
        return int(np.searchsorted(self.offsets, first + hits[0], side="right")) - 1 if len(hits) else None


class PairColumns:
    """The decoded and checked columns of one row group.

    Args:
        rows: The columns of `column_names`, of at least one row.
        vocab_size: Ids must be below it.
        where: The place, for messages.

    Raises:
        MismatchError: A row does not belong together. A value is null; a prompt or response is empty; an id is outside the
            vocabulary; there is not exactly one weight and one reference log-prob per response token, or not the same
            number of top ids and log-probs for each; a number is not finite, a log-prob above 0 or a pair's weight below.
            Names pair, column and place.
    """

    def __init__(self, rows: pa.Table, *, vocab_size: int, where: str) -> None:
        self._where = where
        self._pair_ids = rows["pair_id"].combine_chunks()
        self._check_nulls(rows)
        is_list = {field.name: pa.types.is_list(field.type) for field in rows.schema}
        self._ragged = {name: _Ragged(rows[name]) for name, ragged in is_list.items() if ragged}
        self._numbers = {name: rows[name].to_numpy() for name in ("pair_weight", *_SCORES) if name in is_list}
        self._check_ids("prompt_ids", vocab_size)
        for side in (*_SIDES, *(["anchor"] if "anchor_ids" in is_list else [])):
            self._check_ids(f"{side}_ids", vocab_size)
            self._check_side(side, vocab_size)
        self._check_numbers()

    def pair(self, row: int) -> Pair:
        """Return one row."""
        scores: dict[str, Any] = {name: float(self._numbers[name][row]) for name in _SCORES if name in self._numbers}
        return Pair(
            str(self._pair_ids[row]),
            self._ragged["prompt_ids"][row],
            self._response("chosen", row),
            self._response("rejected", row),
            float(self._numbers["pair_weight"][row]),
            anchor=self._anchor(row),
            **scores,
        )

    def _anchor(self, row: int) -> StoredResponse | None:
        if "anchor_ids" not in self._ragged:
            return None
        ids = self._ragged["anchor_ids"][row]
        return StoredResponse(ids, np.ones(len(ids), np.float32), self._ragged["anchor_ref_logps"][row])

    def _response(self, side: str, row: int) -> StoredResponse:
        ragged = self._ragged
        ids = ragged[f"{side}_ids"][row]
        required = (ids, ragged[f"{side}_token_weights"][row], ragged[f"{side}_ref_logps"][row])
        if f"{side}_ref_top_ids" not in ragged:
            return StoredResponse(*required)
        top = (ragged[f"{side}_{name}"][row].reshape(len(ids), -1) for name in ("ref_top_ids", "ref_top_logps"))
        return StoredResponse(*required, *top)

    def _check_nulls(self, rows: pa.Table) -> None:
        for name in rows.column_names:
            if rows[name].null_count:
                row = int(np.flatnonzero(rows[name].is_null())[0])
                raise self._error(row, f"has no {name}", remedy(name))

    def _check_ids(self, name: str, vocab_size: int) -> None:
        column = self._ragged[name]
        empty = np.flatnonzero(column.lengths == 0)
        if len(empty):
            raise self._error(int(empty[0]), f"{name} is empty")
        self._check_vocabulary(name, vocab_size)

    def _check_vocabulary(self, name: str, vocab_size: int) -> None:
        column = self._ragged[name]
        row = column.row_of_first((column.values < 0) | (column.values >= vocab_size))
        if row is not None:
            raise self._error(
                row,
                f"{name} goes from {column[row].min()} to {column[row].max()}, the model's vocabulary has {vocab_size} ids",
                "train the model that the dataset was tokenised for",
            )

    def _check_side(self, side: str, vocab_size: int) -> None:
        num_tokens = self._ragged[f"{side}_ids"].lengths
        for name in (f"{side}_token_weights", f"{side}_ref_logps"):
            if name in self._ragged:  # an anchor has no token weights
                self._check_lengths(name, num_tokens)
                self._check_finite(name)
        self._check_logps(f"{side}_ref_logps")
        if f"{side}_ref_top_ids" in self._ragged:
            self._check_vocabulary(f"{side}_ref_top_ids", vocab_size)
            self._check_top_k(side, num_tokens)
            self._check_finite(f"{side}_ref_top_logps")
            self._check_logps(f"{side}_ref_top_logps")

    def _check_top_k(self, side: str, num_tokens: NDArray[np.int64]) -> None:
        """Check that each response token has the same number of top ids and of top log-probs: that of the first token."""
        first = "chosen_ref_top_ids"
        num_top = int(self._ragged[first].lengths[0] // self._ragged["chosen_ids"].lengths[0])
        if num_top == 0:
            raise self._error(0, f"has no {first}", remedy(first))
        for name in (f"{side}_ref_top_ids", f"{side}_ref_top_logps"):
            self._check_lengths(name, num_tokens, per_token=num_top)

    def _check_lengths(self, name: str, num_tokens: NDArray[np.int64], per_token: int = 1) -> None:
        lengths = self._ragged[name].lengths
        unequal = np.flatnonzero(lengths != num_tokens * per_token)
        if len(unequal):
            row = int(unequal[0])
            times = f" with {per_token} each" if per_token > 1 else ""
            raise self._error(row, f"{lengths[row]} {name} for {num_tokens[row]} response tokens{times}")

    def _check_finite(self, name: str) -> None:
        row = self._ragged[name].row_of_first(~np.isfinite(self._ragged[name].values))
        if row is not None:
            raise self._error(row, f"{name} holds NaN or infinity")

    def _check_logps(self, name: str) -> None:
        column = self._ragged[name]
        row = column.row_of_first(column.values > _ROUNDING_NATS)
        if row is not None:
            raise self._error(row, f"{name} goes up to {column[row].max():.4g}, a log-prob is at most 0")

    def _check_numbers(self) -> None:
        for name, values in self._numbers.items():
            is_bad = ~np.isfinite(values) | (values < 0 if name == "pair_weight" else False)
            if is_bad.any():
                row = int(np.flatnonzero(is_bad)[0])
                expected = "a finite number >= 0" if name == "pair_weight" else "a finite number"
                raise self._error(row, f"{name} is {values[row]}, expected {expected}")

    def _error(self, row: int, problem: str, what_to_do: str = REBUILD) -> MismatchError:
        return MismatchError(f"pair {self._pair_ids[row]}: {problem} ({self._where}); {what_to_do}")
