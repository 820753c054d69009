"""The lines of JSON for other trainers. docs/trainers.md says which of them have read such lines."""

import json

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from tests.weights_store.conftest import TEXTS, TIS, weight_rows
from weights_store.errors import InputError, MismatchError
from weights_store.views.token_texts import TokenTexts
from weights_store.views.trainer_rows import datum_lines, loss_scale_lines

VOCABULARY = {"<s>": 0, "Q": 1, "?": 2, "Yes": 3, "sir": 4, "No": 5, "caf": 6, "é": 7, "!": 8, "</s>": 9, "a": 10}


def frame(pair_ids="abcd"):
    return pl.DataFrame(pl.from_arrow(weight_rows(pair_ids, TIS)))


@pytest.fixture
def tokenizer():
    made = Tokenizer(WordLevel(VOCABULARY, unk_token="a"))
    made.pre_tokenizer = Whitespace()
    return made


def add_marks(tokenizer, template):
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 9)])


# --- Datums ------------------------------------------------------------------------------------------------------------


def test_a_line_of_datums_by_hand():
    # Pair a: prompt 1 2, chosen 3 4 9, rejected 5 9. Token t is predicted at t - 1, and the first one is not predicted.
    (line,) = map(json.loads, datum_lines(frame("a")))
    assert line == {
        "pair_id": "a",
        "pair_weight": 1.0,
        "chosen": {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 4, 9], "dtype": "int64", "shape": [4]},
                "weights": {"data": [0, 1, 2, 0.5], "dtype": "float32", "shape": [4]},
            },
        },
        "rejected": {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 5]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 5, 9], "dtype": "int64", "shape": [3]},
                "weights": {"data": [0, 0.25, 1], "dtype": "float32", "shape": [3]},
            },
        },
        "chosen_ref_logprobs": [0, -1, -2, -0.5],
        "rejected_ref_logprobs": [0, -3, -0.25],
    }


def test_the_reference_side_of_dpo_from_a_line_is_that_of_the_dataset():
    # The cookbook's loss takes dot(log-probs of all targets, weights); b's prompt has one token, so its weights have no 0.
    lines = {line["pair_id"]: line for line in map(json.loads, datum_lines(frame()))}
    for row in weight_rows("abcd", TIS).to_pylist():
        for side in ("chosen", "rejected"):
            weights = lines[row["pair_id"]][side]["loss_fn_inputs"]["weights"]["data"]
            found = np.dot(weights, lines[row["pair_id"]][f"{side}_ref_logprobs"])
            assert found == np.dot(row[f"{side}_token_weights"], row[f"{side}_ref_logps"])


def test_pairs_without_a_prompt_lose_the_token_that_nothing_predicts():
    rows = frame("a").with_columns(prompt_ids=pl.lit(pl.Series([[]], dtype=pl.List(pl.Int32))))
    (line,) = map(json.loads, datum_lines(rows))
    assert line["chosen"]["loss_fn_inputs"]["target_tokens"]["data"] == [4, 9]
    assert line["chosen"]["loss_fn_inputs"]["weights"]["data"] == [2, 0.5]


# --- loss_scale --------------------------------------------------------------------------------------------------------


def test_a_line_with_loss_scale_by_hand(tokenizer):
    (line,) = map(json.loads, loss_scale_lines(frame("a"), TokenTexts(tokenizer)))
    user = {"role": "user", "content": "Q ?"}
    chosen, rejected = (
        {"token_ids": [3, 4, 9], "loss_scale": [1, 2, 0.5]},
        {"token_ids": [5, 9], "loss_scale": [0.25, 1]},
    )
    assert line == {
        "messages": [user, {"role": "assistant", "content": chosen}],
        "rejected_messages": [user, {"role": "assistant", "content": rejected}],
        "add_eos": False,
    }


def test_marks_that_the_tokenizer_adds_in_front_are_not_in_the_text_too(tokenizer):
    add_marks(tokenizer, "<s> $A")
    rows = frame("a").with_columns(prompt_ids=pl.concat_list(pl.lit(0, pl.Int32), "prompt_ids"))
    (line,) = map(json.loads, loss_scale_lines(rows, TokenTexts(tokenizer)))
    assert line["messages"][0]["content"] == "Q ?"
    with pytest.raises(
        MismatchError, match="pair a: with this tokenizer ms-swift would make 3 ids .* the 2 of the dataset"
    ):
        loss_scale_lines(frame("a"), TokenTexts(tokenizer))


def test_a_prompt_whose_text_gives_other_ids_is_refused(tokenizer):
    rows = frame("a").with_columns(
        prompt_ids=pl.lit(pl.Series([[1, 9]], dtype=pl.List(pl.Int32)))
    )  # </s> is three words
    with pytest.raises(MismatchError, match="pair a: .* of the prompt's text that differ"):
        loss_scale_lines(rows, TokenTexts(tokenizer))


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(InputError, match="needs the model's tokenizer: give --tokenizer"):
        loss_scale_lines(frame(), None)
    with pytest.raises(InputError, match="a dict cannot encode texts"):
        loss_scale_lines(frame(), TokenTexts(TEXTS))
    add_marks(tokenizer, "$A </s>")
    with pytest.raises(InputError, match=r"makes \[10, 9\] of a text that is \[10\]"):
        loss_scale_lines(frame(), TokenTexts(tokenizer))


# --- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tinker", "loss_scale"])
def test_export_writes_a_file_of_lines_for_each_split(small_store, tokenizer, tmp_path, form):
    # d is alone in the split test; none of its ids depends on the tokenizer but "Q" twice.
    tokenizer = None if form == "tinker" else tokenizer
    *files, _ = small_store.export("hh-harmless/tis-dpo", tmp_path / "out", format=form, tokenizer=tokenizer)
    assert [file.name for file in files] == ["test.jsonl", "train.jsonl"]
    test, train = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert (len(test), len(train)) == (1, 3)
    if form == "tinker":
        assert (test[0]["pair_id"], [line["pair_id"] for line in train]) == ("d", ["a", "b", "c"])
    else:
        assert test[0]["messages"][0]["content"] == "Q Q"
        assert train[2]["messages"][1]["content"] == {"token_ids": [4, 9], "loss_scale": [0.5, 0.75]}


def test_a_tokenizer_for_lines_without_texts_is_refused(read_store, tokenizer, tmp_path):
    with pytest.raises(InputError, match="lines of tinker have ids and no texts, .* leave it out"):
        read_store.export("hh-harmless/tis-dpo", tmp_path / "out", format="tinker", tokenizer=tokenizer)
