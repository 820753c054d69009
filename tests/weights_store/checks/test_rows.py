"""What a row group of log-probs with likeliest tokens, of attributions and of anchors must obey.

The laws of other rows are in test_verify.py.
"""

import math

import pyarrow as pa
import pytest

from weights_store.checks.rows import violations
from weights_store.schemas import ANCHORS, ATTRIBUTIONS, LOGPS, WEIGHTS

# Two pairs of 2 + 1 and 1 + 2 response tokens, two likeliest tokens at each place.
ROWS = [
    {
        "pair_id": "a",
        "chosen_logps": [-0.5, -3.0],
        "chosen_top_ids": [7, 8, 9, 7],
        "chosen_top_logps": [-0.5, -1.5, -0.25, -2.0],
        "rejected_logps": [-1.0],
        "rejected_top_ids": [4, 5],
        "rejected_top_logps": [-0.75, -0.75],
    },
    {
        "pair_id": "b",
        "chosen_logps": [-0.125],
        "chosen_top_ids": [3, 2],
        "chosen_top_logps": [-0.125, -4.0],
        "rejected_logps": [-2.0, -0.5],
        "rejected_top_ids": [1, 2, 3, 4],
        "rejected_top_logps": [-1.0, -2.0, -0.5, -1.0],
    },
]
FALLING = "expected falling log-probs whose probabilities sum to 1 at most"
TOP = [f"{side}_top_{what}" for side in ("chosen", "rejected") for what in ("ids", "logps")]


def _found(*changes, **given):
    """Violations of both rows, the second with other columns."""
    rows = [ROWS[0], {**ROWS[1], **{name: value for change in changes for name, value in change.items()}}]
    found = violations("logps", pa.Table.from_pylist(rows, LOGPS), ("pair_id",), None, **given)
    return [(violation.row, violation.problem) for violation in found]


@pytest.mark.parametrize("scorer", [None, {"top_k": 2}])
def test_rows_that_obey_break_no_law(scorer):
    assert _found(scorer=scorer) == []


@pytest.mark.parametrize("scorer", [None, {}])
def test_a_table_without_top_k_breaks_no_law(scorer):
    rows = pa.Table.from_pylist([{**row, **dict.fromkeys(TOP)} for row in ROWS], LOGPS)
    assert list(violations("logps", rows, ("pair_id",), None, scorer)) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rejected_top_logps": [0.5, -2.0, -0.5, -1.0]}, "rejected_top_logps[0] is 0.5, expected a finite number <= 0"),
        ({"rejected_top_logps": [-1.0, -math.inf, -0.5, -1.0]}, "rejected_top_logps[1] is -inf, expected a finite number <= 0"),
        ({"rejected_top_ids": [1, 2, -3, 4]}, "rejected_top_ids[2] is -3, expected an id >= 0"),
        ({"rejected_top_ids": [1, 2, 3]}, "4 rejected_top_logps for 3 rejected_top_ids"),
        ({"rejected_top_ids": None}, "4 rejected_top_logps for 0 rejected_top_ids"),
        (
            {"rejected_top_ids": [1, 2], "rejected_top_logps": [-1.0, -2.0]},
            "2 rejected_top_logps for 2 rejected_logps, expected 2 for each",
        ),
        (dict.fromkeys(TOP[2:]), "no rejected_top_logps for 2 rejected_logps, expected 2 for each"),
        (  # e^-0.5 + e^-0.9 = 0.607 + 0.407
            {"rejected_top_logps": [-1.0, -2.0, -0.5, -0.9]},
            f"rejected_top_logps of response token 1 are -0.5, -0.9, {FALLING}",
        ),
        (
            {"rejected_top_logps": [-2.0, -1.0, -0.5, -1.0]},
            f"rejected_top_logps of response token 0 are -2, -1, {FALLING}",
        ),
    ],
)  # fmt: skip
def test_a_broken_law_names_the_row_and_what_is_wrong(change, problem):
    found = _found(change)
    assert (1, problem) in found
    assert {row for row, _ in found} == {1}


def test_probabilities_may_sum_to_a_little_more_than_one_from_rounding():
    almost = math.log(0.50045)  # twice: 1.0009
    assert _found({"chosen_top_logps": [almost, almost]}) == []
    over = math.log(0.5006)
    assert len(_found({"chosen_top_logps": [over, over]})) == 1


def test_the_number_of_likeliest_tokens_is_that_of_the_table_where_it_is_known():
    # Two for each token, as all rows have it here: the table's commit says three, or none.
    assert (0, "4 chosen_top_logps for 2 chosen_logps, expected 3 for each") in _found(scorer={"top_k": 3})
    assert (0, "4 chosen_top_logps for 2 chosen_logps, expected 0 for each") in _found(scorer={"top_k": 0})


def test_a_weight_dataset_keeps_the_same_laws_and_knows_its_vocabulary():
    ids = {name: [1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    weights = {f"{side}_token_weights": [1.0] for side in ("chosen", "rejected")}
    of_ref = {
        **{f"{side}_ref_logps": [-2.0] for side in ("chosen", "rejected")},
        **{f"{side}_ref_top_ids": [3, 10] for side in ("chosen", "rejected")},
        **{f"{side}_ref_top_logps": [-0.5, -1.0] for side in ("chosen", "rejected")},
    }
    good = {"pair_id": "a", **ids, **weights, **of_ref, "pair_weight": 1.0, "split": "train"}
    bad = {**good, "pair_id": "b", "rejected_ref_top_logps": [-0.5], "rejected_ref_top_ids": [11]}
    found = violations("weights", pa.Table.from_pylist([good, bad], WEIGHTS), ("pair_id",), vocab_size=11)
    assert [(violation.row, violation.problem) for violation in found] == [
        (1, "rejected_ref_top_ids[0] is 11, expected an id in 0..10"),
        (1, "1 rejected_ref_top_logps for 1 rejected_ref_logps, expected 2 for each"),
    ]


# Two pairs of 2 + 1 and 1 + 3 response tokens; one token without any attribution.
ATTRIBUTED = [
    {
        "pair_id": "a",
        "chosen_attributions": [0.5, 0.0],
        "rejected_attributions": [2.0],
        "chosen_prompt_attribution": 0.75,
        "rejected_prompt_attribution": 0.0,
        "chosen_activations": [0.5, 1.5],
        "rejected_activations": [1.0],
        "chosen_contexts": [0.5, -2.0, 0.0, 1.0],
        "rejected_contexts": [1.0, 3.0],
    },
    {
        "pair_id": "b",
        "chosen_attributions": [1.25],
        "rejected_attributions": [0.0, 0.0, 3.0],
        "chosen_prompt_attribution": 1.5,
        "rejected_prompt_attribution": 0.25,
        "chosen_activations": [1.0],
        "rejected_activations": [0.25, 0.75, 2.0],
        "chosen_contexts": [1.5, 0.25],
        "rejected_contexts": [1.0, 2.0, 3.0, 4.0, 5.0, -6.0],
    },
]
PROMPTS = [f"{side}_prompt_attribution" for side in ("chosen", "rejected")]
ACTIVATIONS = [f"{side}_activations" for side in ("chosen", "rejected")]
CONTEXTS = [f"{side}_contexts" for side in ("chosen", "rejected")]
ALL_OR_NONE = "a table has them for all responses or for none"


def _found_in_attributions(change, scorer=None):
    """Violations of both rows, the second with other columns."""
    rows = pa.Table.from_pylist([ATTRIBUTED[0], ATTRIBUTED[1] | change], ATTRIBUTIONS)
    found = violations("attributions", rows, ("pair_id",), None, scorer)
    return [(violation.row, violation.problem) for violation in found]


@pytest.mark.parametrize("scorer", [None, {"prompts": True, "activations": True, "contexts": 2}])
def test_attributions_that_obey_break_no_law(scorer):
    assert _found_in_attributions({}, scorer) == []


@pytest.mark.parametrize("scorer", [None, {"prompts": False}])
def test_attributions_without_what_comes_on_request_break_no_law(scorer):
    bare = [row | dict.fromkeys([*PROMPTS, *ACTIVATIONS, *CONTEXTS]) for row in ATTRIBUTED]
    assert list(violations("attributions", pa.Table.from_pylist(bare, ATTRIBUTIONS), ("pair_id",), None, scorer)) == []
    assert list(violations("attributions", ATTRIBUTIONS.empty_table(), ("pair_id",), None, scorer)) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chosen_attributions": [-0.5]}, "chosen_attributions[0] is -0.5, expected a finite number >= 0"),
        ({"chosen_contexts": [1.5, math.inf]}, "chosen_contexts[1] is inf, expected a finite number"),
        ({"chosen_contexts": [1.5]}, "1 chosen_contexts for 1 chosen_attributions, expected 2 for each"),
        ({"chosen_contexts": None}, f"chosen_contexts is null, expected a value: {ALL_OR_NONE}"),
        ({"rejected_attributions": [0.0, math.nan, 3.0]}, "rejected_attributions[1] is nan, expected a finite number >= 0"),
        ({"rejected_attributions": [0.0, 1.0, math.inf]}, "rejected_attributions[2] is inf, expected a finite number >= 0"),
        ({"chosen_prompt_attribution": -1.0}, "chosen_prompt_attribution is -1.0, expected a finite number >= 0"),
        ({"rejected_prompt_attribution": math.nan}, "rejected_prompt_attribution is nan, expected a finite number >= 0"),
        ({"rejected_prompt_attribution": None}, f"rejected_prompt_attribution is null, expected a value: {ALL_OR_NONE}"),
        (dict.fromkeys(PROMPTS), f"chosen_prompt_attribution is null, expected a value: {ALL_OR_NONE}"),
        ({"chosen_activations": [0.0]}, "chosen_activations[0] is 0.0, expected a finite number > 0"),
        ({"rejected_activations": [0.5, math.inf, 1.0]}, "rejected_activations[1] is inf, expected a finite number > 0"),
        ({"rejected_activations": [0.5, 1.5]}, "2 rejected_activations for 3 rejected_attributions"),
        ({"chosen_activations": []}, "0 chosen_activations for 1 chosen_attributions"),
        ({"chosen_activations": None}, f"chosen_activations is null, expected a value: {ALL_OR_NONE}"),
    ],
)  # fmt: skip
def test_a_broken_law_of_attributions_names_the_row_and_what_is_wrong(change, problem):
    assert _found_in_attributions(change) == [(1, problem)]


def test_what_attributions_hold_on_request_is_what_their_commit_says():
    unasked = f"is there, expected null: {ALL_OR_NONE}"
    assert _found_in_attributions({}, {"prompts": False, "activations": True, "contexts": 2}) == [
        (0, f"chosen_prompt_attribution {unasked}")
    ]
    of_two = {"prompts": True, "contexts": 2}
    assert _found_in_attributions({}, of_two) == [(0, f"chosen_activations {unasked}")]
    assert _found_in_attributions({}, {"prompts": True, "activations": True}) == [(0, f"chosen_contexts {unasked}")]
    assert _found_in_attributions({}, {"prompts": True, "activations": True, "contexts": 1}) == [
        (0, "4 chosen_contexts for 2 chosen_attributions, expected 1 for each"),
        (0, "2 rejected_contexts for 1 rejected_attributions, expected 1 for each"),
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"anchor_ids": [], "anchor_logps": []}, "anchor_ids is empty, expected at least one token"),
        ({"anchor_ids": [3, 11]}, "anchor_ids[1] is 11, expected an id in 0..10"),
        ({"anchor_ids": [-1, 3]}, "anchor_ids[0] is -1, expected an id in 0..10"),
        ({"anchor_logps": [-0.5]}, "1 anchor_logps for 2 anchor_ids"),
        ({"anchor_logps": [-0.5, 0.25]}, "anchor_logps[1] is 0.25, expected a finite number <= 0"),
        ({"anchor_logps": [-math.inf, -0.5]}, "anchor_logps[0] is -inf, expected a finite number <= 0"),
    ],
)
def test_a_broken_law_of_anchors_names_the_row_and_what_is_wrong(change, problem):
    good = {"pair_id": "a", "anchor_ids": [10, 0], "anchor_logps": [0.0, -2.5]}
    rows = pa.Table.from_pylist([good, good | {"pair_id": "b"} | change], ANCHORS)
    found = [(violation.row, violation.problem) for violation in violations("anchors", rows, ("pair_id",), 11)]
    assert found == ([] if problem is None else [(1, problem)])
