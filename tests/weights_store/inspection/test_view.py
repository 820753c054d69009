"""Pairs as they are shown, and the view around them."""

import html
import re

import numpy as np
import polars as pl
import pytest

from weights_store.errors import MismatchError, StoreError
from weights_store.inspection.page import render
from weights_store.inspection.pair_tables import PairTables
from weights_store.inspection.shown import load_pairs

NAME = "hh-harmless/tis-dpo"


def test_a_pair_has_every_number_of_every_token(read_store, texts):
    (pair,) = read_store.view(NAME, pairs=["b"], tokenizer=texts).pairs
    assert (pair.pair_id, pair.split, pair.source_row, pair.prompt, pair.pair_weight) == ("b", "train", 1, "Q", 1.0)
    assert (pair.pair_logratio, pair.disagreement) == (3.0, None)
    chosen = pair.chosen
    assert list(chosen.texts) == [" caf", "</s>", "é", "</s>"]
    assert list(chosen.is_special) == [False, True, False, True]  # the EOS that the store recorded
    assert chosen.measures == {
        "weight": [4.0, 1.0, 0.5, 1.5],
        "logratio": [2.0, 0.0, -1.0, 0.5],
        "logp_pos": [-1.0, -1.0, -2.0, -0.5],
        "logp_neg": [-3.0, -1.0, -1.0, -1.0],
        "ref_logp": [-4.0, -0.125, -2.0, -0.25],
        "surprise": [4.0, 0.125, 2.0, 0.25],
    }
    assert list(chosen.clamped) == [1, 0, -1, 0]  # L = -0.5, U = 1.5
    assert list(pair.rejected.clamped) == [-1, -1, 0]
    assert list(pair.rejected.texts) == ["!", "Yes", "</s>"]


def test_without_a_tokenizer_ids_stand_for_texts(read_store):
    view = read_store.view(NAME, pairs=["a"])
    assert view.pairs[0].prompt == "#1 #2"
    assert list(view.pairs[0].chosen.texts) == ["#3", "#4", "#9"]
    assert view.token_texts == {}


def test_attributions_are_shown_where_there_are_some(read_store):
    view = read_store.view("hh-harmless/ti-dpo", pairs=["c"])
    assert view.measures == ["weight", "ref_logp", "surprise", "attribution"]
    assert view.pairs[0].rejected.measures["attribution"] == [1.0, 1.0, 2.0, 4.0, 2.0]
    assert view.pairs[0].pair_logratio is None


def test_of_two_datasets_the_pairs_that_differ_most_come_first(read_store):
    compared = read_store.view(f"{NAME}@0", "hh-harmless/reversed")
    disagreements = [pair.disagreement for pair in compared.pairs]
    assert disagreements == sorted(disagreements, reverse=True)
    assert disagreements[0] > disagreements[-1]
    named = [pair.pair_id for pair in compared.pairs][::-1]
    assert [p.pair_id for p in read_store.view(f"{NAME}@0", "hh-harmless/reversed", pairs=named).pairs] == named


def test_the_view_says_what_it_shows(read_store, texts):
    view = read_store.view(f"{NAME}@0", "hh-harmless/reversed", tokenizer=texts)
    assert (view.title, view.other, view.num_pairs) == (f"{NAME}@0", "hh-harmless/reversed@0", 3)
    assert view.selection == "all 3 pairs"
    assert view.comparison["num_only_there"] == 1
    assert ("response tokens", "19") in view.facts
    assert ("weights", "tis: k 1.0, mu 1.0, lower -0.5, upper 1.5") in view.facts
    assert view.lineage[0]["name"] == f"weights/{NAME}"
    assert view.token_texts[7] == "é"
    assert (view.survey.chosen.num_tokens, view.other_survey.chosen.num_tokens) == (9, 10)
    assert view.recipe["model"]["path"] == "models/tiny-chat"


def test_the_heaviest_tokens_have_texts_even_if_many_weigh_the_same(write_made_up, made_up):
    """Of about 90 ids that weigh 2 the page lists eight: they must be those whose texts were looked up."""
    weights = {side: [np.where(one < 100, 1.0, 2.0) for one in ids] for side, ids in made_up.ids.items()}
    store = write_made_up(made_up, weights=weights)
    view = store.view("toy/weights", random=1, tokenizer=[f"word{number}" for number in range(200)])
    listed = render(view).partition("Heaviest and lightest tokens")[2].partition("</details>")[0]
    assert listed.count("<td><code>word") == 4 * 8
    assert "<code>#" not in listed


def test_a_notebook_gets_a_frame_that_cannot_reach_it(read_store, texts, monkeypatch):
    page = '<p title="a">&amp;</p><script>"</script>'
    monkeypatch.setattr("weights_store.inspection.page.render", lambda view: page)
    view = read_store.view(NAME, tokenizer=texts)
    assert repr(view) == f"<NotebookView {NAME}@1: all 4 pairs>"
    frame = view._repr_html_()
    assert frame.count("<iframe") == 1
    assert 'sandbox="allow-scripts"' in frame
    (document,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert not {"<", ">"} & set(document)
    assert html.unescape(document) == page
    assert re.search(r'height="\d+"', frame)


def test_a_tokenizer_that_does_not_fit_is_refused(read_store):
    with pytest.raises(MismatchError, match="token id . is not in the tokenizer given"):
        read_store.view(NAME, tokenizer=["a", "b", "c"])


def test_a_pair_without_scores_is_named(small_store):
    table = small_store.table("logps/hh-harmless-0123456789ab/positive")
    rows = table.scan().filter(pl.col("pair_id") != "c").collect()
    made = table.replace(rows.to_arrow(), {"fingerprint": "f"})
    metadata = small_store.metadata(NAME)
    parents = [p | ({"version": made.version} if p["role"] == "positive_logps" else {}) for p in metadata["parents"]]
    weights = small_store.table("weights/hh-harmless/lost")
    weights.append(small_store.scan(NAME).collect().to_arrow(), {**metadata, "parents": parents})
    tables = PairTables(small_store.root, weights.reference())
    with pytest.raises(
        StoreError, match="pair c, chosen, of weights/hh-harmless/lost@0: no values of logp_pos for 2 tokens"
    ):
        load_pairs(tables, None, ["c"], None)
