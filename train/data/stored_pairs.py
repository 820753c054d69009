"""Pairs as they are stored: the columns of one row group decoded, checked, and returned row by row.

Called by `dataset.py`, which knows where row groups are. Nothing here reads a file; nothing is tokenised.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from weights_store.checks.rows import (
    FINITE,
    ROUNDED_LOGP,
    WEIGHT,
    Law,
    Violation,
    bad_values,
    empty,
    id_law,
    no_response,
    null,
    wrong_lengths,
)
from weights_store.errors import MismatchError
from weights_store.schemas import SIDES, Side

_ALWAYS = [
    "pair_id",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    *(f"{side}_{name}" for side in SIDES for name in ("token_weights", "ref_logps")),
    "pair_weight",
]
_REF_TOP = [f"{side}_{name}" for side in SIDES for name in ("ref_top_ids", "ref_top_logps")]
_SCORES = [f"{side}_score" for side in SIDES]
_ANCHORS = ["anchor_ids", "anchor_ref_logps"]

_REBUILD = "rebuild the dataset with `tokenweights build`"
_OTHER_MODEL = "train the model that the dataset was tokenised for"
_REMEDIES = (
    dict.fromkeys(
        _REF_TOP, "build the dataset again with score.top_k above 0, or choose a loss that needs no reference top-k"
    )
    | dict.fromkeys(
        _SCORES, "build the dataset again from pairs that carry both annotator scores, or choose a loss that needs none"
    )
    | dict.fromkeys(
        _ANCHORS,
        "build the dataset again with an [anchors] section in the recipe (`tokenweights build RECIPE --set anchors.seed=0`), "
        "or train with loss.anchor='online' or loss.triplet_gamma=0",
    )
)
"""What to do if a column has no value."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response as stored, one entry per token, end-of-text included: shapes `[T]`, and `[T, K]` of the top k.

    `ref_top_ids` and `ref_top_logps` (nats) are the reference's K most likely tokens at each position, the most likely first;
    None unless the dataset was opened `with_ref_top`.
    """

    ids: NDArray[np.int32]
    token_weights: NDArray[np.float32]
    ref_logps: NDArray[np.float32]
    ref_top_ids: NDArray[np.int32] | None = None
    ref_top_logps: NDArray[np.float32] | None = None

    @classmethod
    def anchor(cls, ids: NDArray[np.int32], ref_logps: NDArray[np.float32]) -> "StoredResponse":
        """Return an anchor; its token weights are 1, and no loss reads them."""
        return cls(ids, np.ones(len(ids), np.float32), ref_logps)


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair; if the config says `swap`, chosen and rejected are already exchanged. Unpaired rows have one.

    `pair_weight` (unitless, >= 0) is the pair's share in the loss. The annotators' scores are None unless the dataset was
    opened `with_scores`. The anchor, a response that was sampled for the prompt or one to another prompt, is None unless the
    dataset was opened `with_anchors`. A filler takes the place of a pair if a rank has none left, and has no part in the loss.
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
        """Return the pair with chosen and rejected exchanged, their scores too."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_score=self.rejected_score,
            rejected_score=self.chosen_score,
        )

    def mismatched(self) -> "Pair":
        """Return the prompt with its anchor as the only response."""
        assert self.anchor is not None, "dataset.py gives them on request"
        none = StoredResponse.anchor(self.anchor.ids[:0], self.anchor.ref_logps[:0])
        return replace(self, chosen=self.anchor, rejected=none, anchor=None)

    def with_weights(self, chosen: NDArray[np.float32], rejected: NDArray[np.float32]) -> "Pair":
        """Return the pair with these token weights, `[T]` each."""
        sides = (replace(self.chosen, token_weights=chosen), replace(self.rejected, token_weights=rejected))
        return replace(self, chosen=sides[0], rejected=sides[1])


def column_names(*, with_ref_top: bool = False, with_scores: bool = False, with_anchors: bool = False) -> list[str]:
    """Return the columns of `schemas.WEIGHTS` that pairs are made from."""
    wanted = ((_REF_TOP, with_ref_top), (_SCORES, with_scores), (_ANCHORS, with_anchors))
    return [*_ALWAYS, *(name for names, asked in wanted if asked for name in names)]


class _Ragged:
    """A list column as flat values and offsets."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        self.offsets = np.asarray(array.offsets).astype(np.int64)
        self.values = array.values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class PairColumns:
    """The decoded and checked columns of one row group.

    Args:
        rows: The columns of `column_names`, at least one row.
        vocab_size: Ids must be below it.
        where: The place, for messages.

    Raises:
        MismatchError: A value is null; a prompt or both responses are empty; an id is outside the vocabulary; there is not
            exactly one weight and one reference log-prob per response token, or not the same number of top ids and log-probs
            for each; a number is not finite, a log-prob is above 0 or a pair's weight below. Names pair, column and place.
    """

    def __init__(self, rows: pa.Table, *, vocab_size: int, where: str) -> None:
        self._where, self._num_top = where, 0
        self._pair_ids = rows["pair_id"].combine_chunks()
        self._check(rows, vocab_size)
        self._columns = {
            name: _Ragged(rows[name]) if pa.types.is_list(rows[name].type) else rows[name].to_numpy()
            for name in rows.column_names
        }

    def pair(self, row: int) -> Pair:
        """Return one row."""
        values = {name: column[row] for name, column in self._columns.items()}
        chosen, rejected = (_response(values, side, self._num_top) for side in SIDES)
        chosen_score, rejected_score = (float(values[name]) if name in values else None for name in _SCORES)
        anchor = StoredResponse.anchor(*(values[name] for name in _ANCHORS)) if _ANCHORS[0] in values else None
        pair_id, weight, prompt_ids = str(values["pair_id"]), float(values["pair_weight"]), values["prompt_ids"]
        return Pair(pair_id, prompt_ids, chosen, rejected, weight, chosen_score, rejected_score, anchor)

    def _check(self, rows: pa.Table, vocab_size: int) -> None:
        """Check the laws of `weights_store.checks.rows` that a loss relies on.

        Not those that only `verify` needs: this runs for every row group of every epoch. Log-probs may exceed 0 by rounding.
        """
        for name in rows.column_names:
            self._refuse(null(rows, name), _REMEDIES.get(name, _REBUILD))
        self._check_ids(rows, "prompt_ids", vocab_size)
        self._refuse(no_response(rows))
        for side in SIDES:
            self._refuse(bad_values(rows, f"{side}_ids", id_law(vocab_size)), _OTHER_MODEL)
            self._check_values(rows, f"{side}_token_weights", side, FINITE)
            self._check_values(rows, f"{side}_ref_logps", side, ROUNDED_LOGP)
        if "anchor_ids" in rows.column_names:
            self._check_ids(rows, "anchor_ids", vocab_size)
            self._check_values(rows, "anchor_ref_logps", "anchor", ROUNDED_LOGP)
        if _REF_TOP[0] in rows.column_names:
            self._check_top_k(rows, vocab_size)
        self._refuse(bad_values(rows, "pair_weight", WEIGHT))
        for name in _SCORES:
            if name in rows.column_names:
                self._refuse(bad_values(rows, name, FINITE))

    def _check_ids(self, rows: pa.Table, name: str, vocab_size: int) -> None:
        self._refuse(empty(rows, name))
        self._refuse(bad_values(rows, name, id_law(vocab_size)), _OTHER_MODEL)

    def _check_values(self, rows: pa.Table, name: str, side: str, law: Law) -> None:
        self._refuse(wrong_lengths(rows, name, f"{side}_ids"))
        self._refuse(bad_values(rows, name, law))

    def _check_top_k(self, rows: pa.Table, vocab_size: int) -> None:
        """Check that each response token has as many top ids and top log-probs as the first one."""
        num_top = max(len(rows[f"{side}_ref_top_ids"][0]) // max(1, len(rows[f"{side}_ids"][0])) for side in SIDES)
        if num_top == 0:
            self._refuse([Violation(_REF_TOP[0], 0, f"has no {_REF_TOP[0]}", 1)], _REMEDIES[_REF_TOP[0]])
        for side in SIDES:
            ids, logps = f"{side}_ref_top_ids", f"{side}_ref_top_logps"
            self._refuse(bad_values(rows, ids, id_law(vocab_size)), _OTHER_MODEL)
            for name in (ids, logps):
                self._refuse(wrong_lengths(rows, name, f"{side}_ids", per_token=num_top))
            self._refuse(bad_values(rows, logps, ROUNDED_LOGP))
        self._num_top = num_top

    def _refuse(self, violations: Iterable[Violation], what_to_do: str = _REBUILD) -> None:
        for found in violations:
            raise MismatchError(f"pair {self._pair_ids[found.row]}: {found.problem} ({self._where}); {what_to_do}")


def _response(values: Mapping[str, np.ndarray], side: Side, num_top: int) -> StoredResponse:
    ids = values[f"{side}_ids"]
    required = (ids, values[f"{side}_token_weights"], values[f"{side}_ref_logps"])
    top = (values[name].reshape(len(ids), num_top) for name in _REF_TOP if name.startswith(side) and name in values)
    return StoredResponse(*required, *top)
