"""Choosing pairs of the small store, and comparing two datasets of it."""

import re

import polars as pl
import pytest

from weights_store.errors import InputError, SettingsError
from weights_store.inspection.choice import Choice, choose
from weights_store.inspection.pair_tables import PairTables
from weights_store.tables.key_ranges import KeyRange
from weights_store.views.token_texts import TokenTexts

NAME, REVERSED = "hh-harmless/tis-dpo", "hh-harmless/reversed"
# Sums of log-ratios, chosen - rejected: a 1 - 2, b 1.5 + 1.5, c -1.5 + 2, d 0.25 - 0.5.
PAIR_LOGRATIOS = {"a": -1.0, "b": 3.0, "c": 0.5, "d": -0.25}


@pytest.fixture
def chosen(read_store, texts):
    """Return a function that chooses pairs, and returns their ids and how they were chosen."""

    def run(name=NAME, other=None, store=read_store, **choice):
        here, there = (None if each is None else PairTables(store.root, store.resolve(each)) for each in (name, other))
        found = choose(here, there, Choice(**choice), TokenTexts(texts))
        return "".join(found.pair_ids), found.words

    return run


def test_the_worst_pairs_are_those_whose_contrastive_pair_contradicts_the_label_most(chosen):
    assert chosen(worst=2) == ("ad", "2 of 4 pairs, those whose contrastive pair disagrees most with the label")
    assert chosen(worst=9) == ("adcb", "all 4 pairs")


def test_without_a_contrastive_pair_the_worst_have_their_weight_on_the_fewest_tokens(chosen):
    # (Σw)² / (T Σw²): b 16/(4·6) and 9/(3·3.5), mean .762; c 4/(2·2.5) and 25/(5·6.5), mean .785; d 1.
    assert chosen("hh-harmless/ti-dpo", worst=2) == ("bc", "2 of 4 pairs, those whose weights lie on the fewest tokens")


def test_of_two_datasets_the_worst_are_those_on_which_they_disagree_most(chosen):
    # Mean |log2| of the ratios: a (0+2+2 + 4+0)/5 = 1.6, b (4+0+2+1 + 2+1+0)/7 = 1.43.
    assert chosen(other=REVERSED, worst=2) == ("ab", "2 of 4 pairs, those on which the two datasets disagree most")


def test_random_pairs_depend_on_the_seed_and_the_ids_and_on_nothing_else(chosen, small_store):
    before = {seed: chosen(random=2, seed=seed)[0] for seed in range(8)}
    assert len(set(before.values())) > 2
    rows = small_store.scan(NAME).collect()
    table, metadata = small_store.table(f"weights/{NAME}"), small_store.metadata(NAME)
    table.replace(rows.filter(pl.col("pair_id") > "b").to_arrow(), metadata)  # now one shard with c and d,
    table.append(rows.filter(pl.col("pair_id") <= "b").to_arrow(), metadata)  # and another one with a and b
    assert {seed: chosen(random=2, seed=seed, store=small_store)[0] for seed in range(8)} == before


def test_pairs_are_named_by_the_beginning_of_their_id_and_shown_in_that_order(chosen):
    assert chosen(pairs=["d", "a", "d"]) == ("da", "2 pairs of 4, by id")
    assert chosen(pairs=["d", "a", "b"], worst=2)[0] == "ad"


def test_an_unknown_or_ambiguous_beginning_is_refused(small_store, chosen):
    rows = small_store.scan(NAME, 0).with_columns(pair_id=pl.lit("0") + pl.col("pair_id")).collect()
    small_store.table("weights/hh-harmless/longer").append(rows.to_arrow(), small_store.metadata(NAME, 0))
    with pytest.raises(InputError, match=r"no pair of weights/hh-harmless/longer@0 begins with 'a'"):
        chosen("hh-harmless/longer", store=small_store, pairs=["a"])
    with pytest.raises(
        InputError, match="3 pairs of weights/hh-harmless/longer@0 begin with '0', for example 0a, 0b, 0c"
    ):
        chosen("hh-harmless/longer", store=small_store, pairs=["0"])
    assert chosen("hh-harmless/longer", store=small_store, pairs=["0a"])[0] == "0a"


def test_search_finds_text_over_token_borders_in_any_case(chosen):
    assert sorted(chosen(search="CAFÉ")[0]) == ["c"]  # in b there is a token between " caf" and "é"
    assert sorted(chosen(search="q?")[0]) == ["a", "c"]  # in prompts


def test_conditions_combine_and_then_the_worst_are_picked(chosen):
    assert chosen(where="split = 'test'")[0] == "d"
    ids, words = chosen(where="num_chosen_tokens >= 2 AND pair_logratio < 1", search="sir", worst=1)
    assert ids == "a"
    assert words == (
        "1 of 2 pairs containing 'sir' and with num_chosen_tokens >= 2 AND pair_logratio < 1 (of 4), those whose contrastive "
        "pair disagrees most with the label"
    )
    assert sorted(chosen(other=REVERSED, where="disagreement > 1.5")[0]) == ["a"]


def test_every_column_of_a_condition_has_the_value_that_its_name_says(read_store):
    tables = PairTables(read_store.root, read_store.resolve(NAME))
    rows = tables.scan(KeyRange(None, None), tables.columns).collect().sort("pair_id")
    assert rows["pair_logratio"].to_list() == list(PAIR_LOGRATIOS.values())
    assert rows["source_row"].to_list() == [0, 1, 2, 3]
    assert rows["num_prompt_tokens"].to_list() == [2, 1, 3, 2]
    assert rows["num_rejected_tokens"].to_list() == [2, 3, 5, 1]
    assert rows["mean_chosen_weight"].to_list() == pytest.approx([3.5 / 3, 7 / 4, 1.25 / 2, 1.25])
    # a: 3.5² / (3·5.25) and 1.25² / (2·1.0625)
    assert rows["effective_share"][0] == pytest.approx((12.25 / 15.75 + 1.5625 / 2.125) / 2)


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("length > 3", "there is no column length; the columns are pair_id, .*num_chosen_tokens.*pair_logratio"),
        ("split", "must be of type `Boolean`"),
        ("split =", "unable to parse"),
        ("disagreement > 1", "there is no column disagreement"),
        ("CAST(split AS INT) > 3", "conversion from `str` to `i32` failed"),
        ("1=1; DROP TABLE weights", "unexpected token ';'"),
        ("split = '\udce9'", "surrogates not allowed"),
    ],
)
def test_a_condition_that_is_none_is_refused_with_the_columns(chosen, where, problem):
    with pytest.raises(SettingsError, match=rf"where .{re.escape(repr(where)[1:-1])}. is no condition.*{problem}"):
        chosen(where=where)


def test_a_choice_that_cannot_be_made_is_refused(read_store, chosen):
    with pytest.raises(SettingsError, match="exclude each other"):
        Choice(worst=1, random=1)
    with pytest.raises(SettingsError, match="worst is 0; expected a number of pairs, at least 1"):
        Choice(worst=0)
    with pytest.raises(SettingsError, match="search needs the texts of tokens"):
        read_store.view(NAME, search="x")
    with pytest.raises(InputError, match="none of 4 pairs contain 'zzz' and match \"split = 'test'\""):
        chosen(search="zzz", where="split = 'test'")


def test_two_datasets_without_a_common_pair_are_refused(small_store, chosen):
    rows = small_store.scan(REVERSED).with_columns(pair_id=pl.lit("0") + pl.col("pair_id")).collect()
    small_store.table("weights/hh-harmless/longer").append(rows.to_arrow(), small_store.metadata(REVERSED))
    with pytest.raises(InputError, match="the two datasets have no pair in common"):
        chosen(other="hh-harmless/longer", store=small_store, worst=2)


def test_the_same_pairs_are_found_range_by_range(chosen, monkeypatch):
    expected = [chosen(worst=3), chosen(random=2), chosen(other=REVERSED, worst=3)]
    cuts = [KeyRange(None, "b"), KeyRange("b", "d"), KeyRange("d", None)]
    monkeypatch.setattr(PairTables, "ranges", lambda *arguments: cuts)
    assert [chosen(worst=3), chosen(random=2), chosen(other=REVERSED, worst=3)] == expected


def test_two_datasets_are_compared_over_all_their_common_pairs(small_store, monkeypatch):
    monkeypatch.setattr(PairTables, "ranges", lambda *arguments: [KeyRange(None, "c"), KeyRange("c", None)])
    rows = small_store.scan(REVERSED).filter(pl.col("pair_id") != "d").collect()
    cut = rows.with_columns(  # c's rejected response has other tokens
        rejected_ids=pl.when(pair_id="c").then(pl.lit([5, 6, 7, 3, 9], pl.List(pl.Int32))).otherwise("rejected_ids")
    )
    small_store.table("weights/hh-harmless/cut").append(cut.to_arrow(), small_store.metadata(REVERSED))
    view = small_store.view(NAME, "hh-harmless/cut", pairs=["c", "a"])
    # a and b: both above or both below 1 nowhere; opposite sides: a 1.., 2 of 3 and 1 of 2, b 3 of 4 and 2 of 3.
    x = [1.0, 2.0, 0.5, 0.25, 1.0, 4.0, 1.0, 0.5, 1.5, 2.0, 1.5, 1.0]
    y = [1.0, 0.5, 2.0, 4.0, 1.0, 0.25, 1.0, 2.0, 0.75, 0.5, 0.75, 1.0]
    assert view.comparison == {
        "num_common": 3,
        "num_only_here": 1,
        "num_only_there": 0,
        "num_differing_tokens": 1,
        "num_tokens": 12,
        "num_disagreeing": 8,
        "correlation": pytest.approx(pl.select(pl.corr(pl.Series(x), pl.Series(y))).item()),
    }
    c, a = view.pairs
    assert (c.disagreement, c.chosen.other_weights) == (None, None)
    assert (a.disagreement, a.chosen.other_weights) == (pytest.approx(1.6), [1.0, 0.5, 2.0])


def test_constant_weights_have_no_correlation_and_a_weight_of_0_no_infinite_disagreement(read_store):
    view = read_store.view("hh-harmless/ti-dpo", "hh-harmless/uniform", pairs=["b"])
    assert view.comparison["correlation"] is None
    # Against 1: |log2| of 2, 0 (counts as 1/64), 1, 1 and 0.5, 1.5, 1: (1 + 6 + 0 + 0 + 1 + 0.585 + 0) / 7.
    assert view.pairs[0].disagreement == pytest.approx(8.585 / 7, abs=1e-4)
