"""Loads the pairs that are shown: every token with its text and all its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from weights_store.errors import StoreError
from weights_store.inspection.clamps import clamped
from weights_store.inspection.comparison import Comparison
from weights_store.inspection.pair_tables import PairTables
from weights_store.inspection.pairs import ShownPair, ShownSide
from weights_store.schemas import SIDES, WEIGHTS, Side
from weights_store.views.token_texts import TokenTexts

_STORED = {"weight": "token_weights", "ref_logp": "ref_logps"}
"""Measures that the weights table has under another name."""


def load_pairs(
    here: PairTables, other: PairTables | None, pair_ids: Sequence[str], texts: TokenTexts | None
) -> list[ShownPair]:
    """Return pairs in the order of their ids.

    Raises:
        StoreError: A pair has no row, or one of another length, in a table that the weights were made from.
        MismatchError: An id is not in the tokenizer.
    """
    lists = [f"{side}_{measure}" for side in SIDES for measure in ("logp_pos", "logp_neg", "attribution")]
    found = {name.partition("_")[2] for name in lists} & {*here.measures}
    names = [*WEIGHTS.names, *(name for name in lists if name.partition("_")[2] in found)]
    names += [name for name in ("source_row", "pair_logratio", "effective_share") if name in here.columns]
    rows: dict[str, Mapping[str, Any]] = {}
    for piece in here.ranges(names, *([other.weights] if other else [])):
        inside = [pair_id for pair_id in pair_ids if piece.overlaps(pair_id, pair_id)]
        if not inside:
            continue
        is_inside = pl.col("pair_id").is_in(inside)
        frame = here.scan(piece, names).filter(is_inside).collect()
        if other is not None:
            theirs = other.weights.scan(piece).select(sorted(Comparison.COLUMNS)).filter(is_inside).collect()
            frame = Comparison().join(frame, theirs)
        rows |= {row["pair_id"]: row for row in frame.iter_rows(named=True)}
    shower = _Shower(here, texts)
    return [shower.pair(rows[pair_id]) for pair_id in pair_ids]


class _Shower:
    """Makes pairs from rows."""

    def __init__(self, tables: PairTables, texts: TokenTexts | None) -> None:
        self._tables = tables
        self._texts = texts
        eos = (tables.metadata.get("tokenizer") or {}).get("eos_token_id")
        self._special = (texts.special_ids if texts else frozenset()) | ({eos} if eos is not None else set())

    def pair(self, row: Mapping[str, Any]) -> ShownPair:
        chosen, rejected = (self._side(row, side) for side in SIDES)
        prompt = row["prompt_ids"]
        return ShownPair(
            pair_id=row["pair_id"],
            split=row["split"],
            source_row=row.get("source_row"),
            prompt=" ".join(map(_id_text, prompt)) if self._texts is None else self._texts.join(prompt),
            chosen=chosen,
            rejected=rejected,
            pair_weight=row["pair_weight"],
            pair_logratio=row.get("pair_logratio"),
            effective_share=row["effective_share"],
            disagreement=row.get("disagreement"),
        )

    def _side(self, row: Mapping[str, Any], side: Side) -> ShownSide:
        ids: list[int] = row[f"{side}_ids"]
        measures = {name: self._measure(row, side, name) for name in self._tables.measures}
        weights = np.asarray(measures["weight"], np.float32)
        logratios = np.asarray(measures["logratio"], np.float32) if "logratio" in measures else None
        ends = clamped(self._tables.metadata, side, weights, logratios)
        return ShownSide(
            ids=ids,
            texts=[_id_text(token_id) for token_id in ids] if self._texts is None else self._texts.split(ids),
            is_special=[token_id in self._special for token_id in ids],
            measures=measures,
            clamped=[0] * len(ids) if ends is None else ends.tolist(),
            other_weights=None if row.get("disagreement") is None else row[f"{side}_token_weights_other"],
        )

    def _measure(self, row: Mapping[str, Any], side: Side, name: str) -> list[float]:
        if name == "logratio":
            positive, negative = (self._measure(row, side, part) for part in ("logp_pos", "logp_neg"))
            return [a - b for a, b in zip(positive, negative, strict=True)]
        if name == "surprise":
            return [-logp for logp in self._measure(row, side, "ref_logp")]
        values: list[float] | None = row[f"{side}_{_STORED.get(name, name)}"]
        num_tokens = len(row[f"{side}_ids"])
        if values is None or len(values) != num_tokens:
            where = f"{self._tables.weights.table.path}@{self._tables.weights.version}"
            found = "no values" if values is None else f"{len(values)} values"
            raise StoreError(
                f"pair {row['pair_id']}, {side}, of {where}: {found} of {name} for {num_tokens} tokens; "
                "`tokenweights verify --rows` finds damaged rows"
            )
        return values


def _id_text(token_id: int) -> str:
    return f"#{token_id}"
