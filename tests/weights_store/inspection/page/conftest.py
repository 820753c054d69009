"""A view made by hand: three pairs, one with text that a page must not trust."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest

from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.pairs import ShownPair, ShownSide
from weights_store.inspection.survey import SideSurvey, Survey
from weights_store.inspection.view import View

TEXTS = {
    1: "I",
    2: " am",
    3: " sorry",
    4: "\n",
    5: "</script><img src=x onerror=alert(1)>",
    6: "\u202eabc",
    7: "\ud800",
    8: "é",
    9: "",
    10: "<eos>",
}
EDGES = np.concatenate([[0.0], 2.0 ** np.arange(-2, 2.5, 0.5), [np.inf]])


def make_side(ids: Sequence[int], weights: Sequence[float], other: Sequence[float] | None = None) -> ShownSide:
    positive = [-0.5 * (1 + t) for t in range(len(ids))]
    negative = [-1.0 - t for t in range(len(ids))]
    measures = {
        "weight": weights,
        "logratio": [a - b for a, b in zip(positive, negative, strict=True)],
        "logp_pos": positive,
        "logp_neg": negative,
        "ref_logp": [-2.0] * len(ids),
        "surprise": [2.0] * len(ids),
    }
    clamped = [-1 if weight < 0.3 else 1 if weight > 4 else 0 for weight in weights]
    return ShownSide(ids, [TEXTS[i] for i in ids], [i == 10 for i in ids], measures, clamped, other)


def make_pair(
    name: str, chosen: ShownSide, rejected: ShownSide, logratio: float, effective: float, split: str = "train"
) -> ShownPair:
    disagreement = None if chosen.other_weights is None else 1.5
    return ShownPair(
        name, split, 0, f"<|user|>\nprompt of {name}", chosen, rejected, 1.0, logratio, effective, disagreement
    )


def make_view(pairs: Sequence[ShownPair], other: str | None = None) -> View:
    side = SideSurvey(
        num_responses=3,
        num_tokens=12,
        mean_weight=1.25,
        min_weight=0.25,
        max_weight=4.5,
        std_weight=0.9,
        edges=EDGES,
        counts=np.array([0, 0, 1, 2, 3, 3, 2, 1, 0, 0]),
        weight_by_position=np.full(20, 1.25),
        position_share=0.1,
        share_at_lower=0.25,
        share_at_upper=0.125,
        effective_share=0.8,
        share_carried=0.0,
        share_carried_by_last=0.0,
        last_weight=1.0,
        last_id=10,
        last_id_share=0.7,
    )
    rows = [
        {"token_id": i, "side": s, "count": 9, "mean_weight": 0.1 * i, "share_of_weight": 0.1}
        for i in TEXTS
        for s in ("chosen", "rejected")
    ]
    finding = Diagnosis(
        "sides_apart", "warning", "1.84 against 1.07 <b>", "The loss falls if both go up.", "Narrow the clamp."
    )
    return View(
        title="hh/tis@3",
        other=other,
        pairs=pairs,
        num_pairs=1768,
        selection="3 of 1,768 pairs",
        measures=["weight", "logratio", "logp_pos", "logp_neg", "ref_logp", "surprise"],
        facts=[("rows in", "1,768")],
        survey=Survey(len(pairs), side, side, pl.DataFrame(rows), None),
        other_survey=None,
        token_texts=TEXTS,
        diagnoses=[finding],
        lineage=[{"depth": 0, "role": "weights", "name": "hh/tis", "version": 3, "fingerprint": "abc"}],
        recipe={"weights": {"estimator": "tis"}},
        comparison=None if other is None else {"num_common": 1768, "correlation": 0.831},
    )


@pytest.fixture
def view() -> View:
    return make_view(
        [
            make_pair(
                "first", make_side([1, 2, 3, 10], [1, 0.25, 4.5, 1]), make_side([1, 2, 5, 10], [1, 1, 2, 1]), 1.5, 0.9
            ),
            make_pair("second", make_side([8, 9, 4, 6], [2, 2, 0.5, 1]), make_side([3, 7], [0.7, 1.4]), -2.5, 0.5),
            make_pair(
                "third",
                make_side([3, 3, 3, 3, 1], [1, 2, 3, 2, 1]),
                make_side([3, 3, 3, 3, 2], [1, 1, 1, 1, 4]),
                0.5,
                0.7,
                "test",
            ),
        ]
    )


@pytest.fixture
def compared(view: View) -> View:
    pairs = [
        make_pair(
            pair.pair_id,
            *(
                make_side(side.ids, side.measures["weight"], [2 * w for w in side.measures["weight"]])
                for side in (pair.chosen, pair.rejected)
            ),
            pair.pair_logratio or 0.0,
            pair.effective_share,
        )
        for pair in view.pairs
    ]
    return make_view(pairs, "hh/ti@1")
