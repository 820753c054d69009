"""Which column holds what: named ones, usual names, columns that appear late, and what is logged of them."""

import gzip

import polars as pl
import pytest

from pipeline.dataset_section import DatasetSection
from pipeline.source.columns import Columns, check_source, find_columns, score_columns
from weights_store.errors import InputError


def found(*names, **settings):
    return find_columns(DatasetSection(name="x", source="x.jsonl", **settings), names)


def guess(**columns):
    """Return columns whose prompt only has a usual name."""
    return Columns(**columns, guesses_prompt=True)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["prompt", "chosen", "rejected"], Columns()),
        (["chosen", "rejected"], Columns(prompt=None)),
        (["Prompt", "Chosen", "REJECTED"], Columns("Chosen", "REJECTED", "Prompt")),
        (["question", "chosen", "rejected", "system"], guess(prompt="question", system="system")),
        (["system_prompt", "query", "chosen", "rejected"], guess(prompt="query", system="system_prompt")),
        (["input", "chosen", "rejected"], guess(prompt="input")),
        (
            ["instruction", "input", "chosen", "rejected"],
            guess(prompt="instruction", input="input", guesses_input=True),
        ),
        (["prompt", "input", "chosen", "rejected"], Columns(input="input", guesses_input=True)),
        (["conversations", "chosen", "rejected"], guess(prompt="conversations")),
        (["prompt", "messages", "chosen", "rejected"], Columns()),
        (["messages", "chosen", "rejected"], guess(prompt="messages")),
        (["prompt", "response_chosen", "response_rejected"], Columns("response_chosen", "response_rejected")),
    ],
)
def test_usual_names_are_found(names, columns):
    assert found(*names) == columns


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen_rating", "rejected_rating"),
        ("chosen-rating", "rejected-rating"),
        ("chosenReward", "rejectedReward"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("chosen_rewards", "rejected_rewards"),
        ("rm_score_chosen", "rm_score_rejected"),
    ],
)
def test_scores_are_found_by_their_usual_names(names):
    columns = found("prompt", "chosen", "rejected", *reversed(names))
    assert (columns.chosen_score, columns.rejected_score) == names


def test_scores_need_both_sides_and_the_usual_name_comes_first():
    assert score_columns(["chosen_score", "rejected_rating", "chosen", "rejected", "score"]) == []
    pairs = [
        ("chosen-rating", "rejected-rating"),
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
    ]
    assert score_columns([name for pair in pairs for name in pair]) == pairs[::-1]


@pytest.mark.parametrize("name", ["{}_rating_rationale", "{}_rewarded_by", "rating_model_{}", "{}_num_ratings"])
def test_what_is_said_about_a_score_is_no_score(name):
    about = [name.format(side) for side in ("chosen", "rejected")]
    assert score_columns(about) == []
    columns = found("prompt", "chosen", "rejected", *about, "chosen_rating", "rejected_rating")
    assert (columns.chosen_score, columns.rejected_score) == ("chosen_rating", "rejected_rating")


def test_a_score_itself_comes_before_a_kind_of_score():
    names = ["chosen_length_score", "rejected_length_score", "chosen_rating", "rejected_rating"]
    assert score_columns(names)[0] == ("chosen_rating", "rejected_rating")


ROLES = ["prompt", "input", "system", "chosen", "rejected"]


@pytest.mark.parametrize("role", ROLES)
def test_a_named_column_is_taken_although_the_usual_one_is_there(role):
    assert getattr(found(*ROLES, "other", **{f"{role}_column": "other"}), role) == "other"


@pytest.mark.parametrize("role", ["prompt", "system"])
def test_an_empty_name_means_no_column(role):
    assert getattr(found(*ROLES, **{f"{role}_column": ""}), role) is None


def test_empty_names_of_scores_mean_no_scores():
    names = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    assert found(*names, chosen_score_column="", rejected_score_column="") == Columns()


@pytest.mark.parametrize("setting", [f"{role}_column" for role in ROLES])
def test_a_named_column_that_is_not_there_is_refused_with_the_nearest_one(setting):
    with pytest.raises(
        InputError, match=rf"no column 'questio'; it has .*question.*Set dataset\.{setting}; nearest: 'question'"
    ):
        found(*ROLES, "question", **{setting: "questio"})


def test_named_scores_that_are_not_there_are_refused():
    settings = {"chosen_score_column": "score_chosen", "rejected_score_column": "score_rejcted"}
    with pytest.raises(
        InputError, match=r"no column 'score_rejcted'; .*Set dataset\.rejected_score_column; nearest: 'score_rej"
    ):
        found("prompt", "chosen", "rejected", "score_chosen", "score_rejected", **settings)


def test_a_source_without_responses_names_its_columns():
    with pytest.raises(
        InputError, match=r"no column of the chosen response; it has text, label. Set dataset\.chosen_column"
    ):
        found("text", "label")


# --- in files ----------------------------------------------------------------------------------------------------------


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("num_before", [1, 150, 2500])
def test_columns_may_appear_in_the_last_row_only(tmp_path, read, write_jsonl, num_before):
    late = PAIR | {"system": "Be brief.", "score_chosen": 2, "score_rejected": 1}
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "chosen": "a"}] * num_before + [late])
    check_source(DatasetSection(name="x", source=str(tmp_path / "x.jsonl"), system_column="system"))
    pairs, reasons = read(tmp_path / "x.jsonl")
    assert reasons == {"missing_value": num_before}
    assert (pairs[num_before].prompt[0]["role"], pairs[num_before].chosen_score) == ("system", 2.0)


def test_a_named_prompt_column_may_appear_late_too(tmp_path, read, write_jsonl):
    late = {"task": "\n\nHuman: p\n\nAssistant:", "chosen": "a", "rejected": "b"}
    write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "chosen": "a", "rejected": "b"}, late])
    pairs, reasons = read(tmp_path / "x.jsonl", prompt_column="task")
    assert (pairs[1].prompt, reasons) == ([{"role": "user", "content": "p"}], {"no_prompt": 1})


def test_a_response_is_no_score_whatever_its_name(tmp_path, read, write_jsonl):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "graded_chosen": "1", "graded_rejected": "2"}])
    (pair,) = read(tmp_path / "x.jsonl", chosen_column="graded_chosen", rejected_column="graded_rejected")[0].values()
    assert (pair.chosen, pair.rejected, pair.chosen_score) == ("1", "2", None)


def test_the_check_before_a_build_reads_no_more_rows_than_it_needs(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 50_000)
    path.write_bytes(whole[: len(whole) // 2])  # reading on would fail
    check_source(DatasetSection(name="x", source=str(path)))
    with pytest.raises(InputError, match="is damaged after row"):
        check_source(DatasetSection(name="x", source=str(path), system_column="system"))


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_the_check_before_a_build_refuses_columns_that_are_in_no_row(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    {"jsonl": pl.DataFrame.write_ndjson, "json": pl.DataFrame.write_json, "parquet": pl.DataFrame.write_parquet}[
        ending
    ](pl.DataFrame([PAIR] * 3), path)
    with pytest.raises(InputError, match=r"no column 'scores'; it has prompt, chosen, rejected"):
        check_source(
            DatasetSection(name="x", source=str(path), chosen_score_column="scores", rejected_score_column="scores")
        )


def test_what_was_found_and_what_is_not_read_is_logged_once(tmp_path, read, write_jsonl, caplog):
    caplog.set_level("INFO", "tokenweights")
    row = {"question": "p", "system": "s", "chosen": "a", "rejected": "b", "source": "web", "tools": None}
    scores = {"chosen_score": 2, "rejected_score": 1, "chosen-rating": 5, "rejected-rating": 4}
    write_jsonl(tmp_path / "x.jsonl", [row, row | scores])
    read(tmp_path / "x.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        "prepare: columns prompt = 'question', system = 'system', chosen_score = 'chosen_score', "
        "rejected_score = 'rejected_score'",
        "prepare: scores are read from 'chosen_score' and 'rejected_score', and not from 'chosen-rating' and "
        "'rejected-rating'; set dataset.chosen_score_column and dataset.rejected_score_column to choose",
        "prepare: columns that are not read: 'source', 'chosen-rating', 'rejected-rating'",
    ]
    caplog.clear()
    write_jsonl(tmp_path / "x.jsonl", [PAIR])
    read(tmp_path / "x.jsonl")
    assert not caplog.records
