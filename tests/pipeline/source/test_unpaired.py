"""Unpaired rows: which columns make a source one of them, and what a row is read as."""

from decimal import Decimal

import pytest

from pipeline.recipe import DatasetSection
from pipeline.source.columns import Columns, find_columns, resolve_columns
from pipeline.source.intake import pairs_of
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from pipeline.source.rows import RawRow, Source
from weights_store.errors import InputError
from weights_store.schemas import Reason

PROMPT = [{"role": "user", "content": "Why is the sky blue?"}]
ANSWER = [{"role": "assistant", "content": "Rayleigh."}]
TEXT = "\n\nHuman: Why is the sky blue?\n\nAssistant:"
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": {}}}]}


def found(*names, **settings):
    return find_columns(DatasetSection(name="x", source="x.jsonl", **settings), names)


def read(*rows, **settings):
    dataset = DatasetSection(name="x", source="x.jsonl", **settings)
    source = Source("x.jsonl", lambda _: (RawRow(index, row) for index, row in enumerate(rows)))
    return [pair for _, pair in pairs_of(source, resolve_columns(dataset, source))]


def test_columns_of_unpaired_rows_are_found_if_there_are_none_of_pairs():
    assert found("prompt", "Completion", "label") == Columns(completion="Completion", label="label")
    assert found("completion", "label") == Columns(prompt=None, completion="completion", label="label")
    assert found("prompt", "chosen", "rejected", "completion", "label") == Columns()
    named = found("prompt", "chosen", "rejected", "label", "text", completion_column="text")
    assert (named.responses, named.label) == (("text",), "label")
    assert found("prompt", "completion", "label").record() == {
        "prompt": "prompt", "completion": "completion", "label": "label"
    }  # fmt: skip


def test_only_the_recipe_can_say_that_there_is_no_label():
    wanted = Columns(completion="completion")
    assert found("prompt", "completion", label_column="") == wanted
    assert found("prompt", "completion", "label", label_column="") == wanted  # the column is not read
    assert found("prompt", "chosen", "rejected", completion_column="chosen", label_column="").completion == "chosen"
    assert wanted.record() == {"prompt": "prompt", "completion": "completion"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "messages": ANSWER},
        {"messages": [*PROMPT, *ANSWER]},
        {"prompt": "Why is the sky blue?", "messages": [*PROMPT, *ANSWER], "label": False},
    ],
)
def test_a_row_without_a_label_has_a_chosen_response(row):
    assert read(row, completion_column="messages", label_column="") == [Pair(PROMPT, "Rayleigh.", [])]


def test_rows_without_labels_have_reasons_too():
    rows = [{"prompt": "p", "completion": value} for value in (None, " ", ["a", "b"], "a")]
    missing, empty, many, good = read(*rows, label_column="")
    reasons = [Reason.MISSING_VALUE, Reason.EMPTY_RESPONSE, Reason.MANY_ANSWERS]
    assert [missing.reason, empty.reason, many.reason] == reasons
    assert good == Pair([{"role": "user", "content": "p"}], "a", [])


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (
            ["prompt", "text"],
            {"completion_column": "text"},
            "has no column 'label', which unpaired rows need; it has prompt, text. Set dataset.label_column, or "
            'dataset.label_column = "" if each row has one response and all of them are desirable$',
        ),
        (
            ["prompt", "good"],
            {"label_column": "good"},
            "has no column 'completion', which unpaired rows need; .* Set dataset.",
        ),
        (["prompt", "completion", "label"], {"label_column": "lable"}, "has no column 'lable'; .* nearest: 'label'"),
        (
            ["prompt", "completion"],
            {},
            'has no column of the chosen response; .* Set dataset.chosen_column, or dataset.label_column = "" if each row',
        ),
        (["prompt", "text"], {}, "Set dataset.chosen_column$"),
        (["prompt", "text"], {"label_column": ""}, "has no column 'completion', .* Set dataset.completion_column$"),
        (["prompt", "chosen", "completion", "label"], {}, "has no column of the rejected response"),
    ],
)
def test_a_column_that_is_missing_is_named(names, settings, message):
    with pytest.raises(InputError, match=message):
        found(*names, **settings)


def test_scores_of_two_responses_and_names_of_both_layouts_are_refused():
    scores = {"chosen_score_column": "a", "rejected_score_column": "b"}
    with pytest.raises(InputError, match="has one response in a row .*: leave dataset.chosen_score_column and dataset"):
        found("prompt", "completion", "label", "a", "b", **scores)
    for settings in (
        {"chosen_column": "a", "label_column": "b"},
        {"completion_column": "a", **scores},
        {"chosen_column": "a", "label_column": ""},
    ):
        with pytest.raises(ValueError, match="is of pairs and dataset.(label|completion)_column of unpaired rows"):
            DatasetSection(name="x", source="x.jsonl", **settings)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why is the sky blue?", "completion": "Rayleigh."},
        {"prompt": PROMPT, "completion": ANSWER},
        {"completion": [*PROMPT, *ANSWER]},
        {"prompt": PROMPT, "completion": [*PROMPT, *ANSWER]},
        {"completion": f"{TEXT} Rayleigh."},
        {"prompt": TEXT, "completion": "Rayleigh."},
    ],
    ids=["texts", "messages", "whole chat", "repeated prompt", "transcript", "transcript as prompt"],
)
@pytest.mark.parametrize(
    ("label", "is_chosen"), [(True, True), (1, True), (1.0, True), (False, False), (Decimal(0), False)]
)
def test_every_layout_reads_as_a_pair_with_nothing_on_the_other_side(row, label, is_chosen):
    (pair,) = read({**row, "label": label})
    assert (pair.prompt, [pair.chosen, pair.rejected].count([])) == (PROMPT, 1)
    assert (pair.chosen if is_chosen else pair.rejected).strip() == "Rayleigh."
    wanted = Pair(PROMPT, "Rayleigh.", []) if is_chosen else Pair(PROMPT, [], "Rayleigh.")
    assert pair.pair_id == wanted.pair_id
    assert Pair.from_json(pair.to_json()) == pair


def test_a_response_has_its_calls_of_tools():
    """In a pair, what both responses begin with belongs to the prompt; one response has nothing to be compared with."""
    turns = [CALL, {"role": "tool", "content": "blue"}, *ANSWER]
    (pair,) = read({"prompt": PROMPT, "completion": turns, "label": True})
    assert [turn["role"] for turn in pair.chosen] == ["assistant", "tool", "assistant"]


def test_ids_tell_the_label_and_the_side_apart():
    first, second, paired = Pair(PROMPT, "a", []), Pair(PROMPT, [], "a"), Pair(PROMPT, "a", "b")
    assert len({first.pair_id, second.pair_id, paired.pair_id}) == 3
    assert {pair.pair_id[:12] for pair in (first, second, paired)} == {first.pair_id[:12]}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (
            {"completion": "a", "label": "true"},
            Reason.BAD_LABEL,
            "column 'label' is 'true', expected true or false, or 1",
        ),
        ({"completion": "a", "label": float("nan")}, Reason.BAD_LABEL, "column 'label' is 'nan'"),
        ({"completion": "a", "label": -1}, Reason.BAD_LABEL, "column 'label' is '-1'"),
        ({"completion": "a", "label": [True]}, Reason.BAD_LABEL, "column 'label' is '[True]'"),
        ({"completion": "a"}, Reason.MISSING_VALUE, "column 'label' has no value"),
        ({"label": True}, Reason.MISSING_VALUE, "column 'completion' has no value"),
        ({"completion": PROMPT, "label": True}, Reason.NO_FINAL_ASSISTANT_TURN, "column 'completion' ends with user"),
        (
            {"completion": ["a", "b"], "label": True},
            Reason.MANY_ANSWERS,
            "2 answers in a row of one response; give each a",
        ),
    ],
)
def test_what_is_no_unpaired_row_has_a_reason(row, reason, detail):
    good, problem = read({"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", **row})
    assert isinstance(good, Pair)
    assert isinstance(problem, Unusable)
    assert problem.reason is reason
    assert detail in problem.detail


def test_rows_of_the_other_layout_are_not_lost():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    first, second = read(pair, {"prompt": "p", "completion": "a", "label": True})
    assert isinstance(first, Pair)
    assert (second.reason, second.detail) == (Reason.MISSING_VALUE, "column 'chosen' has no value")
