import dataclasses
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipeline.stages.publish import Ingredients, publish
from pipeline.stages.report import summary_markdown, write_report
from weights_store import WeightStore
from weights_store.errors import DamageError, InputError, MismatchError
from weights_store.inspection.survey import survey
from weights_store.schemas import ANCHORS, ATTRIBUTIONS, LOGPS, TOKENS

SIDES = {"chosen": [5, 6, 2], "rejected": [7, 2]}


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "store")


def _tokens(store, *names, scores=None):
    rows = [
        {
            "pair_id": name * 32,
            "prompt": "[]",
            "prompt_ids": [1, 4],
            "chosen_ids": SIDES["chosen"],
            "rejected_ids": SIDES["rejected"],
            **dict(zip(("chosen_score", "rejected_score"), (scores or {}).get(name, (None, None)), strict=True)),
            "source_row": index,
            "split": "train",
        }
        for index, name in enumerate(names)
    ]
    metadata = {
        "fingerprint": "tokens-" + "".join(names),
        "tokenizer": {"fingerprint": "t", "vocab_size": 8, "eos_token_id": 2},
        "statistics": {"num_source_rows": len(names) + 1, "num_pairs": len(names), "quarantined": {"not_text": 1}},
    }
    return store.table("tokens/toy-1").append(pa.Table.from_pylist(rows, TOKENS), metadata)


def _logps(store, scorer, names, chosen, rejected, **tops):
    rows = [{"pair_id": name * 32, "chosen_logps": chosen, "rejected_logps": rejected, **tops} for name in names]
    metadata = {"fingerprint": f"{scorer}-{''.join(names)}", "statistics": {}}
    return store.table(f"logps/toy-1/{scorer}").append(pa.Table.from_pylist(rows, LOGPS), metadata)


def _ingredients(store, names="ab"):
    return Ingredients(
        _tokens(store, *names),
        _logps(store, "ref", names, [-1.0, -2.0, -3.0], [-4.0, -5.0]),
        _logps(store, "pos", names, [-1.0, -1.0, -1.0], [-2.0, -3.0]),
        _logps(store, "neg", names, [-1.5, -4.0, -0.75], [-2.25, -1.0]),
    )


def _publish(make_recipe, ingredients, expect_same=False, **settings):
    recipe = make_recipe(**settings)
    return publish(recipe, recipe.weights, ingredients, expect_same)


def test_published_weights_by_hand(store, make_recipe):
    _publish(make_recipe, _ingredients(store))
    row = store.scan("toy/tis-dpo").filter(pl.col("pair_id") == "a" * 32).collect().row(0, named=True)
    # log-ratios: chosen 0.5, 3 -> 1.5, -0.25; rejected 0.25, -2 -> -0.5 with mu = -1. Stored with 12 mantissa bits.
    np.testing.assert_allclose(row["chosen_token_weights"], [1.6487213, 4.4816891, 0.7788008], rtol=2**-13)
    np.testing.assert_allclose(row["rejected_token_weights"], [0.7788008, 1.6487213], rtol=2**-13)
    assert (row["chosen_ids"], row["chosen_ref_logps"]) == ([5, 6, 2], [-1.0, -2.0, -3.0])
    assert row["rejected_ref_logps"] == [-4.0, -5.0]


@pytest.mark.parametrize(
    ("path", "column"),
    [
        ("tokens/toy-1", "rejected_ids"),
        ("logps/toy-1/ref", "chosen_logps"),
        ("logps/toy-1/pos", "chosen_logps"),
        ("logps/toy-1/neg", "rejected_logps"),
    ],
)
def test_nothing_is_published_from_damaged_tables(store, make_recipe, flip_silently, path, column):
    ingredients = _ingredients(store)
    flip_silently(store.table(path), column)
    with pytest.raises(DamageError, match=f"^{path} in .*: shard .* is not the file that was committed"):
        _publish(make_recipe, ingredients)
    assert not store.table("weights/toy/tis-dpo").exists()


def test_nothing_is_added_to_damaged_weights(store, make_recipe, flip_silently):
    _publish(make_recipe, _ingredients(store, "a"))
    flip_silently(store.table("weights/toy/tis-dpo"), "pair_id")
    with pytest.raises(DamageError, match="^weights/toy/tis-dpo in"):
        _publish(make_recipe, _ingredients(store, "ab"))


def test_statistics_by_hand(store, make_recipe):
    statistics = _publish(make_recipe, _ingredients(store)).statistics
    assert (statistics["num_pairs"], statistics["num_response_tokens"]) == (2, 10)
    assert statistics["chosen"]["share_at_upper"] == pytest.approx(1 / 3)
    assert statistics["rejected"]["share_at_lower"] == pytest.approx(1 / 2)
    assert statistics["chosen"]["mean_logratio"] == pytest.approx((0.5 + 3 - 0.25) / 3)
    assert statistics["num_source_rows"] == statistics["num_pairs"] + sum(statistics["quarantined"].values())
    assert statistics["constant_weights"] is False


def test_log_ratios_are_averaged_over_several_pairs_of_prompts(store, make_recipe):
    one = _ingredients(store)
    second = {
        "positive2_logps": _logps(store, "pos2", "ab", [-1.0, -2.0, -1.0], [-1.0, -1.0]),
        "negative2_logps": _logps(store, "neg2", "ab", [-2.0, -1.0, -0.75], [-1.75, -1.0]),
    }
    single = _publish(make_recipe, one)
    both = _publish(make_recipe, dataclasses.replace(one, more_logps=second))
    assert both.weights.fingerprint != single.weights.fingerprint
    assert [change for change in both.changes if change.startswith("tables.")] == [
        'tables.negative2_logps: null -> "logps/toy-1/neg2"',
        'tables.positive2_logps: null -> "logps/toy-1/pos2"',
    ]
    row = store.scan("toy/tis-dpo").filter(pl.col("pair_id") == "a" * 32).collect().row(0, named=True)
    # Chosen: (0.5, 3, -0.25) and (1, -1, -0.25), mean (0.75, 1, -0.25). Rejected: (0.25, -2), (0.75, 0): (0.5, -1 -> -0.5).
    np.testing.assert_allclose(row["chosen_token_weights"], [2.1170000, 2.7182818, 0.7788008], rtol=2**-13)
    np.testing.assert_allclose(row["rejected_token_weights"], [0.6065307, 1.6487213], rtol=2**-13)
    assert both.statistics["chosen"]["mean_logratio"] == pytest.approx(0.5)
    tokens = (
        store.scan_tokens("toy/tis-dpo").filter(pl.col("pair_id") == "a" * 32, pl.col("side") == "chosen").collect()
    )
    assert tokens["logp_pos"].to_list() == [-1.0, -1.5, -1.0]
    assert tokens["logp_neg"].to_list() == [-1.75, -2.5, -0.75]
    short = _logps(store, "short", "ab", [-1.0], [-1.0, -1.0])
    with pytest.raises(MismatchError, match=r"pair a{32}: 1 chosen_positive2_logps for 3 chosen_ids; 2 such pairs"):
        _publish(make_recipe, dataclasses.replace(one, more_logps={**second, "positive2_logps": short}))


def test_given_models_stand_in_the_lineage_by_their_own_names(store, make_recipe):
    rows = [{"pair_id": "a" * 32, "chosen_logps": [-1.0] * 3, "rejected_logps": [-1.0] * 2}]
    logps = [
        store.table(f"logps/toy-1/{number}").append(
            pa.Table.from_pylist(rows, LOGPS),
            {"fingerprint": f"{number}", "statistics": {}, "scorer": {"model": model * 64, "dtype": "float32"}},
        )
        for number, model in enumerate("abac")
    ]
    made_of = Ingredients(_tokens(store, "a"), *logps[:3], more_logps={"positive2_logps": logps[3]})
    given = {"contrast.method": "given", "contrast.positive_model": "org/larger"}
    recipe = make_recipe(**given)
    publish(recipe, recipe.weights, made_of)
    models = store.lineage("toy/tis-dpo").filter(pl.col("kind") == "model")
    assert models.select("role", "name", "fingerprint").rows() == [
        ("model", recipe.model.path, "a" * 64),
        ("positive model", "org/larger", "b" * 64),
        ("positive model", "org/larger", "c" * 64),
    ]
    assert "contrast" not in store.metadata("toy/tis-dpo")  # nothing was trained on these labels here


TOPS = {
    "chosen_top_ids": [5, 1, 6, 3, 2, 4],
    "chosen_top_logps": [-1.0, -1.5, -0.5, -2.0, -1.0, -3.0],
    "rejected_top_ids": [3, 7, 2, 1],
    "rejected_top_logps": [-0.5, -4.0, -0.25, -2.0],
}


def _with_tops(store, scorer="top", **changes):
    ref = _logps(store, scorer, "ab", [-1.0, -2.0, -3.0], [-4.0, -5.0], **{**TOPS, **changes})
    return dataclasses.replace(_ingredients(store), ref_logps=ref)


def test_the_references_top_k_goes_along_as_it_is(store, make_recipe):
    published = _publish(make_recipe, _with_tops(store))
    row = store.scan("toy/tis-dpo").filter(pl.col("pair_id") == "b" * 32).collect().row(0, named=True)
    assert {name.replace("_ref_top_", "_top_"): row[name] for name in row if "_ref_top_" in name} == TOPS
    assert published.statistics["ref_top_k"] == 2


def test_without_top_k_and_scores_their_columns_are_null_and_counted_as_none(store, make_recipe):
    statistics = _publish(make_recipe, _ingredients(store)).statistics
    rows = store.scan("toy/tis-dpo").select(r"^.*(_top_|_score).*$").collect()
    assert (rows.width, set(rows.null_count().row(0))) == (6, {2})
    assert (statistics["ref_top_k"], statistics["num_scored_pairs"]) == (0, 0)


@pytest.mark.parametrize(
    "change", [{"rejected_top_ids": None}, {"rejected_top_ids": [3, 7, 2]}, {"chosen_top_logps": [-1.0] * 9}], ids=str
)
def test_lists_of_another_k_are_refused(store, make_recipe, change):
    with pytest.raises(
        MismatchError, match=r"pair a{32}: .* values per token in .*_ref_top_.*, expected 2 as in the other lists"
    ):
        _publish(make_recipe, _with_tops(store, **change))


def test_annotators_scores_go_along_and_pairs_with_both_are_counted(store, make_recipe):
    full = _ingredients(store)
    tokens = _tokens(store, *"abcd", scores={"c": (4.5, 1.0), "d": (2.0, None)})
    logps = {role: store.table(f"logps/toy-1/{role}").reference() for role in ("ref", "pos", "neg")}
    for role, chosen, rejected in (
        ("ref", [-1.0] * 3, [-1.0] * 2),
        ("pos", [-1.0] * 3, [-2.0] * 2),
        ("neg", [-2.0] * 3, [-1.0] * 2),
    ):
        logps[role] = _logps(store, role, "cd", chosen, rejected)
    first = _publish(make_recipe, full)
    grown = _publish(make_recipe, Ingredients(tokens, logps["ref"], logps["pos"], logps["neg"]))
    scores = store.scan("toy/tis-dpo").sort("pair_id").select("chosen_score", "rejected_score").collect().rows()
    assert scores == [(None, None), (None, None), (4.5, 1.0), (2.0, None)]
    assert (first.statistics["num_scored_pairs"], grown.statistics["num_scored_pairs"]) == (0, 1)


def test_a_selection_by_hand(store, make_recipe):
    # log-ratios: chosen 0.5, 3, -0.25; rejected 0.25, -2. floor(0.5 * 3) = 1 and floor(0.5 * 2) = 1 are selected.
    published = _publish(make_recipe, _ingredients(store), **{"weights.estimator": "sepo", "weights.share": 0.5})
    row = store.scan("toy/tis-dpo").collect().row(0, named=True)
    assert (row["chosen_token_weights"], row["rejected_token_weights"]) == ([0, 1, 0], [0, 1])
    assert published.statistics["chosen"]["mean_weight"] == pytest.approx(1 / 3)
    assert published.statistics["constant_weights"] is False


@pytest.mark.parametrize(
    ("estimator", "chosen", "rejected"),
    [
        # log pi+ - log ref: chosen 0, 1, 2, rejected 2, 2; 0.05 for each nat
        ("tgdpo", [1, 1.05, 1.1], [0.9, 0.9]),
        # ref: e^-1, e^-2, e^-3 with mean 0.184; e^-4, e^-5
        ("confidence", [0, 1, 1], [0, 1]),
        # p+^2 / p- on rejected: e^-1.75, e^-5
        ("critical", [1, 1, 1], [0.8262261, 0.9932621]),
    ],
)
def test_estimators_of_other_papers_by_hand(store, make_recipe, estimator, chosen, rejected):
    _publish(make_recipe, _ingredients(store), **{"weights.estimator": estimator})
    row = store.scan("toy/tis-dpo").collect().row(0, named=True)
    np.testing.assert_allclose(row["chosen_token_weights"], chosen, rtol=2**-12)
    np.testing.assert_allclose(row["rejected_token_weights"], rejected, rtol=2**-12)


def test_a_version_records_whose_log_probs_it_holds_and_what_was_checked(store, make_recipe):
    ingredients = _ingredients(store)
    table = store.table("logps/toy-1/ref")
    scorer = {"model": "f" * 64, "condition": None, "dtype": "bfloat16"}
    ref = table.replace(table.scan().collect().to_arrow(), {**table.metadata(), "scorer": scorer})
    recipe, calls = make_recipe(), []

    def check():
        calls.append("asked")
        return {"parity": {"mean": 0.5}}

    for _ in range(2):  # the second time the version is there, and nothing is checked
        made_of = dataclasses.replace(ingredients, ref_logps=ref)
        publish(recipe, recipe.weights, made_of, check=check)
    metadata = store.metadata("toy/tis-dpo")
    assert metadata["parity"] == {"mean": 0.5}
    assert metadata["reference"] == {"model_fingerprint": "f" * 64, "dtype": "bfloat16", "model": recipe.model.path}
    assert calls == ["asked"]


def test_same_ingredients_and_settings_publish_nothing(store, make_recipe):
    ingredients = _ingredients(store)
    first = _publish(make_recipe, ingredients)
    again = _publish(make_recipe, ingredients)
    assert (first.is_new, again.is_new, again.weights) == (True, False, first.weights)


def test_bad_rows_that_came_later_show_in_the_balance_of_the_same_version(store, make_recipe):
    ingredients = _ingredients(store)
    first = _publish(make_recipe, ingredients)
    table = store.table("tokens/toy-1")
    metadata = table.metadata()
    metadata["statistics"] |= {"num_source_rows": 5, "quarantined": {"not_text": 3}}
    later = table.replace(table.scan().collect().to_arrow(), metadata)
    again = _publish(make_recipe, dataclasses.replace(ingredients, tokens=later))
    assert again.weights == first.weights
    assert (again.statistics["num_source_rows"], again.statistics["quarantined"]) == (5, {"not_text": 3})


def test_new_pairs_are_appended_and_the_old_rows_stay_in_their_shards(store, make_recipe):
    first = _publish(make_recipe, _ingredients(store))
    second = _publish(make_recipe, _ingredients(store, "abc"))
    table = store.table("weights/toy/tis-dpo")
    assert set(table.shards(first.weights.version)) < set(table.shards(second.weights.version))
    assert sorted(table.pair_ids()) == ["a" * 32, "b" * 32, "c" * 32]
    assert any(change.startswith("data.tokens") for change in second.changes)


def test_a_pair_that_changed_its_split_is_written_again(store, make_recipe):
    ingredients = _ingredients(store)
    assert _publish(make_recipe, ingredients).statistics["num_pairs_by_split"] == {"train": 2}
    rows = store.table("tokens/toy-1").scan().collect()
    changed = rows.with_columns(split=pl.when(pl.col("pair_id") == "b" * 32).then(pl.lit("test")).otherwise("split"))
    metadata = {**store.table("tokens/toy-1").metadata(), "fingerprint": "other splits"}
    tokens = store.table("tokens/toy-1").replace(changed.to_arrow().cast(TOKENS), metadata)
    published = _publish(make_recipe, dataclasses.replace(ingredients, tokens=tokens))
    splits = dict(store.scan("toy/tis-dpo").select("pair_id", "split").collect().iter_rows())
    assert splits == {"a" * 32: "train", "b" * 32: "test"}
    assert published.statistics["num_pairs_by_split"] == {"test": 1, "train": 1}


def test_a_version_records_on_which_pairs_its_contrastive_models_were_trained(store, make_recipe):
    def recorded(**settings):
        _publish(make_recipe, ingredients, **settings)
        return store.table("weights/toy/tis-dpo").metadata().get("contrast")

    ingredients = _ingredients(store)
    assert recorded() == {"held_out": 0.0, "split": None}
    assert recorded(**{"contrast.held_out": 0.25, "contrast.split": "train"}) == {"held_out": 0.25, "split": "train"}
    assert recorded(**{"contrast.method": "prompt"}) is None  # one model with two prompts: nothing was trained
    ingredients = Ingredients(ingredients.tokens, ingredients.ref_logps)
    assert recorded(**{"weights.estimator": "surprise"}) is None


def test_reading_more_of_the_source_appends(store, make_recipe):
    first = _publish(make_recipe, _ingredients(store), **{"dataset.max_pairs": 3})
    second = _publish(make_recipe, _ingredients(store, "abc"), **{"dataset.max_pairs": 4})
    table = store.table("weights/toy/tis-dpo")
    assert set(table.shards(first.weights.version)) < set(table.shards(second.weights.version))


def test_changed_settings_write_a_whole_new_version_and_say_what_changed(store, make_recipe):
    ingredients = _ingredients(store)
    _publish(make_recipe, ingredients)
    second = _publish(make_recipe, ingredients, **{"weights.upper": 0.25})
    assert second.changes == ["settings.weights.upper: 1.5 -> 0.25"]
    assert store.scan("toy/tis-dpo").select(pl.col("chosen_token_weights").explode().max()).collect().item() < 1.3
    assert store.scan("toy/tis-dpo", 0).select(pl.col("chosen_token_weights").explode().max()).collect().item() > 4.4


def test_another_contrastive_pair_replaces_every_row(store, make_recipe):
    ingredients = _ingredients(store)
    _publish(make_recipe, ingredients)
    other = _logps(store, "pos2", "ab", [-1.5, -4.0, -0.75], [-2.25, -1.0])
    second = _publish(
        make_recipe, Ingredients(ingredients.tokens, ingredients.ref_logps, other, ingredients.negative_logps)
    )
    assert 'tables.positive_logps: "logps/toy-1/pos" -> "logps/toy-1/pos2"' in second.changes
    assert store.scan("toy/tis-dpo").select(pl.col("chosen_token_weights").explode().unique()).collect().height == 1


def test_expect_same_refuses_other_settings_and_allows_new_pairs(store, make_recipe):
    _publish(make_recipe, _ingredients(store))
    more = _ingredients(store, "abc")
    with pytest.raises(InputError, match=r"weights/toy/tis-dpo@0 was made differently: settings.weights.k: 1.0 -> 2.0"):
        _publish(make_recipe, more, expect_same=True, **{"weights.k": 2.0})
    assert _publish(make_recipe, more, expect_same=True).weights.version == 1


def test_a_pair_without_scores_counts_as_quarantined(store, make_recipe):
    ingredients = _ingredients(store)
    fewer = _logps(store, "pos3", "a", [-1.0] * 3, [-2.0] * 2)
    published = _publish(
        make_recipe, Ingredients(ingredients.tokens, ingredients.ref_logps, fewer, ingredients.negative_logps)
    )
    assert published.statistics["num_pairs"] == 1
    assert published.statistics["quarantined"] == {"not_text": 1, "unscorable": 1}


def test_log_probs_of_another_length_are_refused(store, make_recipe):
    ingredients = _ingredients(store)
    short = _logps(store, "pos4", "ab", [-1.0, -1.0], [-2.0, -3.0])
    with pytest.raises(MismatchError, match="2 chosen_positive_logps for 3 chosen_ids"):
        _publish(make_recipe, Ingredients(ingredients.tokens, ingredients.ref_logps, short, ingredients.negative_logps))


def test_appended_pairs_have_their_share_in_the_statistics(store, make_recipe):
    # Published in two steps or in one, the numbers are the same; pair c has other log-probs than a and b.
    def ingredients(names):
        full = _ingredients(store, names)
        for scorer, chosen, rejected in (("pos", [-9.0, -0.25, -1.0], [-1.0, -1.0]), ("neg", [-1.0] * 3, [-0.5, -3.0])):
            _logps(store, scorer, "c", chosen, rejected)
        return dataclasses.replace(
            full,
            positive_logps=store.table("logps/toy-1/pos").reference(),
            negative_logps=store.table("logps/toy-1/neg").reference(),
        )

    _publish(make_recipe, ingredients("ab"))
    grown = _publish(make_recipe, ingredients("abc"))
    at_once = _publish(make_recipe, ingredients("abc"), **{"weights.name": "toy/other"})
    assert grown.weights.version == 1
    assert grown.statistics["chosen"] == pytest.approx(at_once.statistics["chosen"])
    assert grown.statistics["rejected"] == pytest.approx(at_once.statistics["rejected"])
    assert grown.statistics["num_response_tokens"] == at_once.statistics["num_response_tokens"] == 15


def test_little_memory_publishes_the_same_rows(store, make_recipe, monkeypatch):
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 100)
    ingredients = _ingredients(store, "abcdef")
    _publish(make_recipe, ingredients)
    monkeypatch.setattr("pipeline.weighing.join.RANGE_BYTES", 4000)
    assert len(store.table("tokens/toy-1").key_ranges(4000)) > 1
    _publish(make_recipe, ingredients, **{"weights.name": "toy/tight"})
    assert store.scan("toy/tight").collect().equals(store.scan("toy/tis-dpo").collect())


def test_a_build_that_lost_the_race_to_the_same_build_takes_its_version(store, make_recipe):
    ingredients, recipe, raced = _ingredients(store), make_recipe(), []

    def check():  # comes after the newest version was looked up, and before the commit
        if not raced:
            raced.append(_publish(make_recipe, ingredients).weights)
        return {}

    assert publish(recipe, recipe.weights, ingredients, check=check).weights == raced[0]
    assert store.table("weights/toy/tis-dpo").version() == 0


def test_uniform_needs_no_pair_and_says_that_it_is_constant(store, make_recipe):
    full = _ingredients(store)
    published = _publish(make_recipe, Ingredients(full.tokens, full.ref_logps), **{"weights.estimator": "uniform"})
    assert published.statistics["constant_weights"] is True
    assert store.scan("toy/tis-dpo").select(pl.col("rejected_token_weights").explode().unique()).collect().item() == 1.0


def _attributions(store, names="ab", chosen=(2.0, 0.0, 6.0), rejected=(0.0, 0.0), **more):
    row = {"chosen_attributions": list(chosen), "rejected_attributions": list(rejected), **more}
    rows = [{"pair_id": name * 32, **row} for name in names]
    metadata = {"fingerprint": f"attributions-{names}", "statistics": {}}
    return store.table("attributions/toy-1/ref").append(pa.Table.from_pylist(rows, ATTRIBUTIONS), metadata)


def _anchors(store, names="ab", logps=(-0.5, -1.5)):
    rows = [{"pair_id": name * 32, "anchor_ids": [7, 2], "anchor_logps": list(logps)} for name in names]
    metadata = {"fingerprint": f"anchors-{names}", "statistics": {}}
    return store.table("anchors/toy-1/ref").append(pa.Table.from_pylist(rows, ANCHORS), metadata)


def _for_ti(store, names="ab", **more):
    full = _ingredients(store, names)
    return Ingredients(full.tokens, full.ref_logps, attributions=_attributions(store, names, **more))


def test_ti_weights_and_anchors_by_hand(store, make_recipe):
    ingredients = dataclasses.replace(_for_ti(store), anchors=_anchors(store))
    settings = {"weights.estimator": "ti", "weights.ti_lambda": 0.5, "anchors.seed": 3}
    published = _publish(make_recipe, ingredients, **settings)
    row = store.scan("toy/tis-dpo").collect().row(1, named=True)
    # By hand in tests/train/model/test_hybrid.py; two tokens without attribution have the prior alone, 1 each.
    np.testing.assert_allclose(row["chosen_token_weights"], [0.7861029, 0.6777942, 1.5361029], rtol=2**-13)
    np.testing.assert_allclose(row["rejected_token_weights"], [1, 1], rtol=2**-13)
    assert (row["anchor_ids"], row["anchor_ref_logps"], row["pair_weight"]) == ([7, 2], [-0.5, -1.5], 1)
    statistics = published.statistics
    assert (statistics["num_anchored_pairs"], statistics["num_pairs"]) == (2, 2)
    assert [statistics[side]["num_without_mass"] for side in SIDES] == [0, 2]
    assert not {"share_at_lower", "mean_logratio"} & set(statistics["chosen"])
    metadata = store.metadata("toy/tis-dpo")
    assert {parent["role"] for parent in metadata["parents"]} == {"tokens", "ref_logps", "attributions", "anchors"}
    assert metadata["identity"]["settings"]["anchors"]["seed"] == 3
    assert metadata["identity"]["settings"]["weights"]["ti_lambda"] == 0.5


def test_what_has_no_attribution_or_no_anchor_is_counted_out(store, make_recipe):
    # Rows in = published + quarantined: pairs a and b have attributions, b and c anchors.
    full = _ingredients(store, "abc")
    made_of = Ingredients(
        full.tokens, full.ref_logps, attributions=_attributions(store, "ab"), anchors=_anchors(store, "bc")
    )
    published = _publish(make_recipe, made_of, **{"weights.estimator": "ti", "anchors.seed": 0})
    assert store.scan("toy/tis-dpo").collect()["pair_id"].to_list() == ["b" * 32]
    assert published.statistics["quarantined"] == {"not_text": 1, "unscorable": 2}


def test_the_span_of_prompt_and_response_by_hand(store, make_recipe):
    prompts = {"chosen_prompt_attribution": 8.0, "rejected_prompt_attribution": 1.0}
    settings = {"weights.estimator": "ti", "weights.ti_lambda": 0.5, "weights.span": "sequence"}
    _publish(make_recipe, _for_ti(store, **prompts), **settings, **{"attribute.prompts": True})
    row = store.scan("toy/tis-dpo").collect().row(0, named=True)
    # As in tests/train/model/test_hybrid.py: the prompt has two tokens and an attribution of 8.
    expected = [5 * (0.5 * i / 16 + 0.5 * g / 3.0083726) for i, g in ((2, 1.0), (0, 0.7261490), (6, 0.2780373))]
    np.testing.assert_allclose(row["chosen_token_weights"], expected, rtol=2**-13)


def test_activations_by_hand(store, make_recipe):
    made_of = _for_ti(store, chosen_activations=[1.0, 2.0, 3.0], rejected_activations=[3.0, 1.0])
    _publish(make_recipe, made_of, **{"weights.estimator": "activation", "attribute.activations": True})
    row = store.scan("toy/tis-dpo").collect().row(0, named=True)
    assert (row["chosen_token_weights"], row["rejected_token_weights"]) == ([0.5, 1, 1.5], [1.5, 0.5])


@pytest.mark.parametrize("bad", [{"chosen": (1.0, 2.0)}, {"rejected_activations": None}], ids=str)
def test_values_that_are_not_one_per_token_are_refused(store, make_recipe, bad):
    made_of = _for_ti(store, **{"chosen_activations": [1.0] * 3, "rejected_activations": [1.0] * 2, **bad})
    settings = {"weights.estimator": "ensemble", "weights.members": ["ti", "activation"]}
    with pytest.raises(MismatchError, match=r"pair a{32}: [02] \w+_a\w+ for [23] \w+_ids; 2 such pairs"):
        _publish(make_recipe, made_of, **settings, **{"attribute.activations": True})


def test_anchors_with_another_number_of_log_probs_are_refused(store, make_recipe):
    made_of = dataclasses.replace(_for_ti(store), anchors=_anchors(store, logps=[-1.0]))
    with pytest.raises(MismatchError, match="1 anchor_ref_logps for 2 anchor_ids"):
        _publish(make_recipe, made_of, **{"weights.estimator": "ti", "anchors.seed": 0})


def test_the_by_product_does_not_change_with_anchors(store, make_recipe):
    full = _ingredients(store)
    ingredients = Ingredients(full.tokens, full.ref_logps)
    plain, anchored = (make_recipe(**settings) for settings in ({}, {"anchors.seed": 0}))
    first, second = (publish(r, r.uniform, ingredients) for r in (plain, anchored))
    assert (first.weights, second.is_new) == (second.weights, False)


def test_positions_are_measured_over_all_pairs_and_all_rows_are_written_again(store, make_recipe):
    settings = {"weights.transforms": ["position"], "weights.position_bins": 2}
    first = _publish(make_recipe, _ingredients(store), **settings)
    # e^0.5 is in the first half; e^1.5 and e^-0.25 in the second. The same in every pair.
    row = store.scan("toy/tis-dpo").collect().row(0, named=True)
    mean = (4.4816891 + 0.7788008) / 2
    np.testing.assert_allclose(row["chosen_token_weights"], [1, 4.4816891 / mean, 0.7788008 / mean], rtol=2**-12)
    curve = first.statistics["mean_weight_by_position"]["chosen"]
    assert curve == pytest.approx([1.6487213, mean])
    second = _publish(make_recipe, _ingredients(store, "abc"), **settings)
    table = store.table("weights/toy/tis-dpo")
    assert set(table.shards(first.weights.version)).isdisjoint(table.shards(second.weights.version))
    assert (table.num_rows(), _publish(make_recipe, _ingredients(store, "abc"), **settings).is_new) == (3, False)


def test_pairs_are_weighed_by_their_scores_and_pairs_without_are_counted(store, make_recipe):
    settings = {"weights.estimator": "uniform", "weights.pair_weight": "quality", "weights.quality_eta": 0.5}
    _tokens(store, *"ab", scores={"a": (3.0, 1.0), "b": (1.0, 5.0)})
    ref = _logps(store, "ref", "abc", [-1.0] * 3, [-1.0] * 2)
    published = _publish(make_recipe, Ingredients(store.table("tokens/toy-1").reference(), ref), **settings)
    weights = store.scan("toy/tis-dpo").sort("pair_id").collect()["pair_weight"].to_list()
    assert weights == pytest.approx([0.7310586, 0.1192029], rel=2**-12)
    assert published.statistics["mean_pair_weight"] == pytest.approx((0.7310586 + 0.1192029) / 2)
    ends = (published.statistics["min_pair_weight"], published.statistics["max_pair_weight"])
    assert ends == pytest.approx((0.1192029, 0.7310586))
    with pytest.raises(InputError, match=r"and 1 of 3 pairs of tokens/toy-1@1 lack one"):
        _publish(make_recipe, Ingredients(_tokens(store, *"abc"), ref), **settings)


def test_scores_that_changed_weigh_all_pairs_again(store, make_recipe):
    settings = {"weights.estimator": "uniform", "weights.pair_weight": "quality", "weights.quality_eta": 0.5}
    ref = _logps(store, "ref", "ab", [-1.0] * 3, [-1.0] * 2)
    tokens = _tokens(store, *"ab", scores={"a": (3.0, 1.0), "b": (1.0, 5.0)})
    _publish(make_recipe, Ingredients(tokens, ref), **settings)
    table = store.table("tokens/toy-1")
    changed = table.scan().with_columns(chosen_score=pl.Series([1.0, 1.0], dtype=pl.Float32)).collect().to_arrow()
    tokens = table.replace(changed.cast(TOKENS), table.metadata() | {"fingerprint": "other scores"})
    _publish(make_recipe, Ingredients(tokens, ref), **settings)
    rows = store.scan("toy/tis-dpo").sort("pair_id").collect()
    # sigmoid(0.5 * (1 - 1)) and, as before, sigmoid(0.5 * (1 - 5))
    assert rows["pair_weight"].to_list() == pytest.approx([0.5, 0.1192029], rel=2**-12)
    assert rows["chosen_score"].to_list() == [1.0, 1.0]


def test_words_of_the_recipes_tokenizer_are_smoothed(store, make_recipe, toy_model, monkeypatch):
    monkeypatch.setitem(SIDES, "chosen", [10, 11, 2])  # two characters without white space, and the end of turn
    recipe = make_recipe(**{"weights.transforms": ["smooth"], "weights.smooth_over": "words"})
    publish(recipe, recipe.weights, _ingredients(store), tokenizer_folder=toy_model)
    row = store.scan("toy/tis-dpo").collect().row(0, named=True)
    word = (1.6487213 + 4.4816891) / 2
    np.testing.assert_allclose(row["chosen_token_weights"], [word, word, 0.7788008], rtol=2**-12)


def test_few_pairs_at_a_time_publish_the_same(store, make_recipe, monkeypatch):
    ingredients = _ingredients(store, "abcdef")
    at_once = _publish(make_recipe, ingredients)
    monkeypatch.setattr("pipeline.weighing.join.BATCH_PAIRS", 4)
    batched = _publish(make_recipe, ingredients, **{"weights.name": "toy/batched"})
    assert store.scan("toy/batched").collect().equals(store.scan("toy/tis-dpo").collect())
    assert batched.statistics["chosen"] == pytest.approx(at_once.statistics["chosen"])


def test_the_report_says_what_was_done_and_what_was_missing(store, make_recipe, toy_model):
    ingredients = dataclasses.replace(_for_ti(store), anchors=_anchors(store))
    published = _publish(make_recipe, ingredients, **{"weights.estimator": "ti", "anchors.seed": 0})
    report = write_report(published, toy_model)
    text = summary_markdown(published, report.diagnoses, report.path)
    assert "| weights | ti: ti_lambda 0.7, sigma_divisor 4.0, span response |" in text
    assert "| anchors | of 2 pairs |" in text
    assert " tokens | 4, mean weight 1.0000, from 1.0000 to 1.0000, 2 responses with nothing to be weighed by |" in text
    assert report.path.endswith("toy/tis-dpo@0.html")


def test_the_report_of_a_selection_has_no_clamp(store, make_recipe, toy_model):
    settings = {"weights.estimator": "sepo", "weights.share": 0.5, "weights.transforms": ["smooth", "mean_one"]}
    published = _publish(make_recipe, _ingredients(store), **settings)
    text = summary_markdown(published, write_report(published, toy_model).diagnoses)
    assert "| weights | sepo: share 0.5, transforms smooth, mean_one, smooth_over tokens, smooth_window 3 |" in text
    assert "clamped" not in text


def test_a_report_is_written_again_only_if_it_is_damaged_or_of_a_deleted_dataset(store, make_recipe, toy_model):
    published = _publish(make_recipe, _ingredients(store))
    path = Path(write_report(published, toy_model).path)
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", whole.replace(b"toy/tis-dpo", b"toy/tis-dpp", 1)):
        path.write_bytes(damaged)
        write_report(published, toy_model)
        assert path.read_bytes() == whole
    written_ns = path.stat().st_mtime_ns
    write_report(published, toy_model)
    assert path.stat().st_mtime_ns == written_ns
    shutil.rmtree(store.root.path / "weights/toy/tis-dpo")
    made_again = _publish(make_recipe, _ingredients(store), **{"weights.spread": 0.5})
    assert made_again.weights.version == published.weights.version
    write_report(made_again, toy_model)
    assert path.read_bytes() != whole


def test_the_findings_of_a_version_are_read_from_its_report_and_not_found_out_again(
    store, make_recipe, toy_model, monkeypatch
):
    published = _publish(make_recipe, _ingredients(store), **{"weights.lower": -0.01, "weights.upper": 0.01})
    first = write_report(published, toy_model)
    assert first.diagnoses == store.doctor(published.name)
    assert "clamped" in {found.name for found in first.diagnoses}
    surveys = []

    def counted(root, weights):
        surveys.append(str(weights))
        return survey(root, weights)

    monkeypatch.setattr("weights_store.inspection.gather.survey", counted)
    assert write_report(published, toy_model) == first
    assert surveys == []
    page = Path(first.path)
    page.write_bytes(page.read_bytes().replace(b"clamped", b"cramped"))
    assert write_report(published, toy_model) == first
    page.unlink()
    assert write_report(published, toy_model) == first
    monkeypatch.setattr("weights_store.inspection.page.kept._code", lambda: "other rules")
    assert write_report(published, toy_model) == first
    assert surveys == ["weights/toy/tis-dpo@0"] * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"weights.estimator": "tis", "weights.lower": -0.25, "weights.upper": 0.5},  # some log-ratios are the very ends
        {"weights.estimator": "reversed"},
        {"weights.estimator": "tis", "weights.scale": 0.5},
        {"weights.estimator": "tis", "weights.spread": 1.0},
        {"weights.estimator": "origin"},
        {"weights.estimator": "threshold"},
        {"weights.estimator": "threshold_and_scale", "weights.transforms": ["mean_one"]},
        {"weights.estimator": "random", "weights.lower": 0.0},
        {"weights.estimator": "sepo"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_survey_counts_the_clamped_tokens_that_the_build_counted(store, make_recipe, settings):
    ingredients = _ingredients(store)
    second = {
        "positive2_logps": _logps(store, "pos2", "ab", [-1.0, -2.0, -1.1], [-1.3, -1.0]),
        "negative2_logps": _logps(store, "neg2", "ab", [-2.0, -1.0, -0.85], [-1.75, -1.0]),
    }
    published = _publish(make_recipe, dataclasses.replace(ingredients, more_logps=second), **settings)
    for side, seen in store.survey("toy/tis-dpo").sides().items():
        recorded = published.statistics[side]
        assert seen.share_at_lower == pytest.approx(recorded.get("share_at_lower"))
        assert seen.share_at_upper == pytest.approx(
            recorded.get("share_at_upper", None if seen.share_at_upper is None else 0)
        )
