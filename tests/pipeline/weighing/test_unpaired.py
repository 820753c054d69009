"""Rows with a response on one side: it is weighed as in a pair, and what compares two responses leaves it out."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from pipeline.marks.characters import Vocabulary
from pipeline.weighing.estimators import ESTIMATORS
from pipeline.weighing.fits import with_fits
from pipeline.weighing.margins import Margins, SeenLabels
from pipeline.weighing.section import AnyWeights
from pipeline.weighing.statistics import count_up, merge_statistics
from pipeline.weighing.transforms import sums
from pipeline.weighing.weigh import Weigher
from weights_store.schemas import SIDES

LENGTHS = {"chosen": [3, 1, 5, 2], "rejected": [2, 4, 1, 6]}
PER_TOKEN = ("positive_logps", "negative_logps", "ref_logps", "attributions", "activations")
TOP_K = 2
OF_PAIRS = ("head", "column", "spans", "diff")
"""Not for unpaired rows."""
LETTERS = Vocabulary(np.frombuffer(b"abcde" * 18, np.uint8), np.arange(1, 91), np.zeros(90, np.bool_))
"""Tokens of one letter each."""


def _section(**settings):
    return TypeAdapter(AnyWeights).validate_python({"name": "toy/weights", "estimator": "tis", **settings})


def _lists(kept=None):
    """Columns of four pairs, or of rows that each have one of the two responses, by name of the side."""
    draw, lists = np.random.default_rng(0), {}
    num_rows = len(LENGTHS["chosen"])
    lists["pair_id"] = [f"{row + 1:032x}" for row in range(num_rows)]
    lists["prompt_ids"] = pa.array([[1] * (row + 1) for row in range(num_rows)], pa.list_(pa.int32()))
    for side in SIDES:
        lengths = LENGTHS[side]
        parts = {name: [np.abs(draw.normal(size=n)).astype(np.float32) for n in lengths] for name in PER_TOKEN}
        parts["ref_top_logps"] = [np.log(draw.uniform(0.01, 0.4, n * TOP_K)).astype(np.float32) for n in lengths]
        ids = [draw.integers(3, 90, n).astype(np.int32) for n in lengths]
        attributed = draw.uniform(1, 2, num_rows).astype(np.float32)
        for row in range(num_rows):
            if kept is not None and kept[row] != side:
                ids[row], attributed[row] = ids[row][:0], 0.0
                for values in parts.values():
                    values[row] = values[row][:0]
        for name, values in parts.items():
            negative = -1 if "logps" in name and "top" not in name else 1
            lists[f"{side}_{name}"] = pa.array([negative * each for each in values], pa.list_(pa.float32()))
        lists[f"{side}_ids"] = pa.array(ids, pa.list_(pa.int32()))
        lists[f"{side}_prompt_attribution"] = pa.array(attributed)
    return pa.table(lists)


KEPT = [
    ["chosen", "rejected", "chosen", "rejected"],
    ["rejected", "rejected", "chosen", "rejected"],
    ["chosen"] * 4,
    ["rejected"] * 4,
]
CASES = [{"estimator": name} for name in ESTIMATORS if name not in (*OF_PAIRS, "pattern")] + [
    {"estimator": "pattern", "patterns": [("a", 3.0)]},
    {"estimator": "ti", "span": "sequence"},
    {"estimator": "ensemble", "members": ["tis", "surprise", "rank_based"]},
    *({"transforms": [name]} for name in ("smooth", "shrink", "decay", "mean_one")),
]


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: "".join(side[0] for side in kept))
@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_response_is_weighed_alone_as_in_a_pair(settings, kept):
    weigher = Weigher(_section(**settings), vocabulary=LETTERS)
    pairs, alone = weigher.sides(_lists()), weigher.sides(_lists(kept))
    for side in SIDES:
        in_pairs = np.split(pairs[side].weights.token_weights, np.cumsum(LENGTHS[side])[:-1])
        wanted = [part for part, there in zip(in_pairs, kept, strict=True) if there == side]
        np.testing.assert_array_equal(alone[side].weights.token_weights, np.concatenate([*wanted, np.zeros(0)]))


@pytest.mark.parametrize("kept", KEPT)
def test_position_and_spread_are_fitted_to_the_responses_that_there_are(kept):
    section = _section(transforms=["position"], position_bins=2, spread=0.5, lower=-9.0, upper=9.0)
    fitted = with_fits(Weigher(section), lambda collect: [collect([_lists(kept)])])
    sides = fitted.sides(_lists(kept))
    logratios = np.concatenate([sides[side].scores.logratios() for side in SIDES])
    assert fitted.spreads["tis"]["std"] == pytest.approx(logratios.std(), rel=1e-5)
    for side in set(kept):
        weights, lengths = sides[side].weights.token_weights, sides[side].scores.lengths
        bins = (2 * np.concatenate([np.arange(n) for n in lengths]) + 1) * 2 // (2 * np.repeat(lengths, lengths))
        assert [weights[bins == each].mean() for each in set(bins)] == pytest.approx([1] * len(set(bins)), rel=1e-5)


def test_sums_of_rows_without_tokens_are_0():
    values = np.array([1.0, 2.0, 4.0])
    assert sums(values, np.array([0, 2, 0, 1, 0])).tolist() == [0, 3, 0, 4, 0]
    assert sums(values[:0], np.array([0, 0])).tolist() == [0, 0]


def test_margins_are_those_of_the_rows_with_two_responses():
    weigher = Weigher(_section())
    both = Margins(weigher.section.estimators, SeenLabels())
    pairs = _lists()
    both.add(pairs, weigher.scores(pairs))
    unpaired = _lists(KEPT[0])
    both.add(unpaired, weigher.scores(unpaired))
    only_pairs = Margins(weigher.section.estimators, SeenLabels())
    only_pairs.add(pairs, weigher.scores(pairs))
    assert both.collected.num_pairs == only_pairs.collected.num_pairs == 4
    for found in zip(both._unseen("tis"), only_pairs._unseen("tis"), strict=True):
        np.testing.assert_array_equal(*found)
    scores = weigher.scores(pairs)
    by_hand = [
        sum(scores["chosen"].logratios()[:3].astype(float)) - sum(scores["rejected"].logratios()[:2].astype(float))
    ]
    assert both._unseen("tis")[0][0] == pytest.approx(by_hand[0])


def test_statistics_of_a_side_without_tokens_are_those_of_the_others():
    weigher = Weigher(_section())

    def counted(kept):
        lists = _lists(kept)
        empty = {"split": "train", "chosen_score": None, "rejected_score": None}
        joined = pl.DataFrame(pl.from_arrow(lists)).with_columns(**{name: pl.lit(v) for name, v in empty.items()})
        return count_up(joined, weigher.sides(lists), None)

    first, second = counted(["chosen"] * 4), counted(KEPT[0])
    assert first["rejected"] == {"num_responses": 0, "num_tokens": 0}
    assert (first["num_unpaired_rows"], first["ref_top_k"], first["constant_weights"]) == (4, TOP_K, False)
    merged = merge_statistics(first, second)
    assert merged["rejected"] == second["rejected"]
    assert merged["num_unpaired_rows"] == 8
    assert merged["chosen"]["num_tokens"] == sum(LENGTHS["chosen"]) + 3 + 5
    assert [merged[side]["num_responses"] for side in ("chosen", "rejected")] == [4 + 2, 2]
