"""Estimator `head` and `weights.spread` from tables in a store to a published version: no model is needed for them."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stages.publish import Ingredients, Wanted, publish
from pipeline.stages.report import summary_rows
from pipeline.weighing.head import Responses, fit_head
from pipeline.weighing.join import Join
from train.data.selection import is_held_out, prompt_hashes
from weights_store import WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import InputError, MismatchError, SettingsError
from weights_store.processes.spread import in_turn
from weights_store.schemas import ATTRIBUTIONS, LOGPS, SIDES, TOKENS

HEAD = {"weights.estimator": "head", "weights.lower": -9.0, "weights.upper": 9.0}
GOOD, NUM_CONTEXTS = 5, 2


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "store")


def pair_id(row):
    return f"{row:012x}{row * 7919:020x}"


def pair(row):
    """Chosen has the good token more often, mostly; all else is noise."""
    rng = np.random.default_rng(row)
    sides = [rng.integers(6, 12, rng.integers(2, 6)).tolist() for _ in range(2)]
    sides[rng.random() < 0.2].append(GOOD)
    return sides


def ingredients(store, rows, split=lambda row: "train", logp=lambda row: -1.0, contexts=False):
    """Write tables that have these rows too."""
    pairs = {row: pair(row) for row in rows}
    tokens = [
        {"pair_id": pair_id(row), "prompt": "[]", "prompt_ids": [1], "split": split(row), "source_row": row}
        | {"chosen_ids": chosen, "rejected_ids": rejected}
        for row, (chosen, rejected) in pairs.items()
    ]
    metadata = {
        "fingerprint": f"tokens of {rows}",
        "tokenizer": {"fingerprint": "t", "vocab_size": 12, "eos_token_id": 2},
        "statistics": {"num_source_rows": rows.stop, "num_pairs": rows.stop, "quarantined": {}},
    }
    made = {"tokens": store.table("tokens/toy-1").append(pa.Table.from_pylist(tokens, TOKENS), metadata)}
    for role, of_row in (("ref", lambda row: -1.0), ("positive", logp), ("negative", lambda row: -4.0)):
        values = [
            {"pair_id": pair_id(row)}
            | {f"{side}_logps": [of_row(row)] * len(ids) for side, ids in zip(SIDES, pairs[row], strict=True)}
            for row in rows
        ]
        scorer = {"model": f"{role} model", "dtype": "float32"}
        record = {"fingerprint": f"{role} of {rows}", "statistics": {}, "scorer": scorer}
        made[f"{role}_logps"] = store.table(f"logps/toy-1/{role}").append(pa.Table.from_pylist(values, LOGPS), record)
    if contexts:
        values = [{"pair_id": pair_id(row)} for row in rows]
        for row, value in zip(rows, values, strict=True):
            for side, ids in zip(SIDES, pairs[row], strict=True):
                value[f"{side}_attributions"] = [1.0] * len(ids)
                value[f"{side}_contexts"] = np.random.default_rng(row).normal(size=len(ids) * NUM_CONTEXTS).tolist()
        record = {"fingerprint": f"contexts of {rows}", "statistics": {}}
        table = store.table("attributions/toy-1/ref")
        made["attributions"] = table.append(pa.Table.from_pylist(values, ATTRIBUTIONS), record)
    return Ingredients(**made)


def without_pair(made):
    return Ingredients(made.tokens, made.ref_logps, attributions=made.attributions)


def published(make_recipe, made_of, **settings):
    recipe = make_recipe(**settings)
    return publish(recipe, recipe.weights, made_of)


def weights_of(store, name="toy/tis-dpo"):
    """Log of the chosen and of minus the rejected weights by pair_id: the scores, if nothing is clamped."""
    columns = [f"{side}_token_weights" for side in SIDES]
    rows = store.scan(name).select("pair_id", *columns).collect().iter_rows()
    return {key: (np.log(chosen), -np.log(rejected)) for key, chosen, rejected in rows}


def fitted(rows):
    """The scores of all pairs of a fit on some rows, computed without a store."""
    rows = sorted(rows, key=pair_id)
    sides = [
        Responses(np.concatenate([pair(r)[i] for r in rows]), np.array([len(pair(r)[i]) for r in rows])) for i in (0, 1)
    ]
    return fit_head(*sides, prompt_hashes(map(pair_id, rows)))


def scores_of(head, row):
    groups = prompt_hashes([pair_id(row)])
    return tuple(head.scores(Responses(np.array(ids), np.array([len(ids)])), groups) for ids in pair(row))


def test_weights_are_the_scores_of_the_fit_with_the_spread_that_was_asked_for(store, make_recipe):
    made = published(make_recipe, without_pair(ingredients(store, range(300))), **HEAD)
    head, weights = fitted(range(300)), weights_of(store)
    natural = np.concatenate([np.concatenate(scores_of(head, row)) for row in range(300)])
    scale = 0.3 / natural.std()
    for row in (0, 7, 299):
        for got, wanted in zip(weights[pair_id(row)], scores_of(head, row), strict=True):
            np.testing.assert_allclose(got, scale * wanted, rtol=1e-3, atol=2e-3)
    assert np.std(np.concatenate([np.concatenate(each) for each in weights.values()])) == pytest.approx(0.3, abs=1e-3)
    statistics = made.statistics
    assert statistics["spread"]["head"] == pytest.approx({"std": natural.std(), "scale": scale}, rel=1e-3)
    assert statistics["head"]["num_pairs"] == 300
    assert statistics["head"]["log_likelihood"] == max(statistics["head"]["log_likelihoods"].values())
    record = statistics["held_out"]["head"]
    assert (record["num_pairs"], record["num_seen_pairs"], record["spread"]) == (300, 0, 0.3)
    assert 0.7 < record["accuracy"] < 0.9
    assert f"; weights.spread 0.3 multiplies them by {scale:.3g}" in dict(summary_rows(made))["verdict"]


def test_new_pairs_change_every_weight_and_the_same_pairs_give_the_same_ones(store, make_recipe):
    settings = HEAD | {"weights.spread": "none"}
    published(make_recipe, without_pair(ingredients(store, range(200))), **settings)
    before = weights_of(store)
    made_of = without_pair(ingredients(store, range(200, 300)))
    published(make_recipe, made_of, **settings)
    after = weights_of(store)
    assert len(store.table("weights/toy/tis-dpo").shards()) == 1  # all rows were written again
    assert np.mean([(after[key][0] != before[key][0]).all() for key in before]) > 0.9
    published(make_recipe, made_of, **settings, **{"weights.name": "toy/other"})  # tokens in two shards, as before
    at_once = WeightStore(store.root.path.parent / "at-once")
    recipe = make_recipe(**settings, **{"store.uri": str(at_once.root)})
    publish(recipe, recipe.weights, without_pair(ingredients(at_once, range(300))))
    for other in (weights_of(store, "toy/other"), weights_of(at_once)):
        for key, sides in after.items():
            np.testing.assert_array_equal(np.concatenate(sides), np.concatenate(other[key]))


@pytest.mark.parametrize(
    "settings",
    [
        HEAD | {"weights.transforms": ["position"], "weights.position_bins": 3},
        {"weights.estimator": "tis", "weights.scale": "calibrated", "contrast.method": "prompt"},
    ],
    ids=["head, spread and position", "calibrated"],
)
def test_ranges_weighed_elsewhere_give_the_bits_of_ranges_weighed_here(
    store, make_recipe, elsewhere, monkeypatch, settings
):
    made_of = ingredients(store, range(300), logp=lambda row: -1.0 - row % 7 / 10)
    made_of = made_of if settings["weights.estimator"] == "tis" else Ingredients(made_of.tokens, made_of.ref_logps)

    def weighed(name, range_bytes, spread):
        monkeypatch.setattr("pipeline.weighing.join.RANGE_BYTES", range_bytes)
        recipe = make_recipe(**settings, **{"weights.name": f"toy/{name}"})
        made = publish(recipe, recipe.weights, made_of, spread=spread)
        return made.statistics, weights_of(store, f"toy/{name}")

    (statistics, here), (elsewhere_statistics, there) = weighed("a", 3_000, in_turn), weighed("b", 3_000, elsewhere)
    monkeypatch.setattr("pipeline.weighing.join.RANGE_BYTES", 3_000)
    assert len(Join(made_of.by_role(), make_recipe(**settings).weights).ranges()) > 3
    assert statistics == elsewhere_statistics
    _, at_once = weighed("c", 1 << 30, in_turn)
    assert here.keys() == there.keys() == at_once.keys()
    for key, sides in here.items():
        np.testing.assert_array_equal(np.concatenate(sides), np.concatenate(there[key]))
        np.testing.assert_allclose(np.concatenate(sides), np.concatenate(at_once[key]), rtol=2**-11)


def test_labels_of_other_splits_and_held_out_prompts_are_never_fitted_on(store, make_recipe):
    settings = HEAD | {"weights.spread": "none", "contrast.held_out": 0.25, "dataset.split": ["train", "test"]}
    made_of = without_pair(ingredients(store, range(300), split=lambda row: "test" if row % 3 == 0 else "train"))
    made = published(make_recipe, made_of, **settings)
    kept = [row for row in range(300) if row % 3 and not is_held_out(pair_id(row), 0.25)]
    assert made.statistics["head"]["num_pairs"] == len(kept) < 180
    head, weights = fitted(kept), weights_of(store)
    for row in (3, 4, 5, 6, 7):
        for got, wanted in zip(weights[pair_id(row)], scores_of(head, row), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-3)
    metadata = store.metadata("toy/tis-dpo")
    assert metadata["contrast"] == {"held_out": 0.25, "split": "train", "is_head": True}
    assert metadata["identity"]["settings"]["labels"] == {"split": "train", "held_out": 0.25}
    assert metadata["identity"]["settings"]["contrast"] == {}


def test_contexts_reach_the_fit(store, make_recipe):
    settings = HEAD | {"weights.features": "contexts", "attribute.contexts": NUM_CONTEXTS}
    made = published(make_recipe, without_pair(ingredients(store, range(300), contexts=True)), **settings)
    tried = made.statistics["head"]["log_likelihoods"]
    assert any("," in strengths for strengths in tried)
    with pytest.raises(
        SettingsError, match=r"weights.features 'contexts' reads .* set attribute.contexts, for example"
    ):
        make_recipe(**HEAD | {"weights.features": "contexts"})


def test_the_fingerprint_says_if_the_axes_of_contexts_are_those_of_fewer_rows(store, make_recipe, tmp_path):
    """They are fitted to the rows that a table begins with, and a build of all rows at once has others."""
    settings = {"weights.features": "contexts", "attribute.contexts": NUM_CONTEXTS}
    with_contexts, without = make_recipe(**HEAD | settings), make_recipe(**{"weights.estimator": "ti"})
    begun = {"fingerprint": "contexts of fewer rows"}
    store.table("attributions/toy-1/ref").append(pa.Table.from_pylist([], ATTRIBUTIONS), begun)
    made_of = [
        without_pair(ingredients(each, range(20), contexts=True)) for each in (store, WeightStore(tmp_path / "other"))
    ]
    grown, at_once = (Wanted.of(with_contexts, with_contexts.weights, each).identity["data"] for each in made_of)
    assert [role for role in grown if grown[role] != at_once[role]] == ["attributions"]
    assert at_once["attributions"] == made_of[0].attributions.fingerprint
    grown, at_once = (Wanted.of(without, without.weights, each).identity["data"] for each in made_of)
    assert grown == at_once


def test_contexts_that_do_not_fit_the_tokens_are_refused(store, make_recipe):
    made_of = without_pair(ingredients(store, range(30), contexts=True))
    rows = store.table("attributions/toy-1/ref").scan().sort("pair_id").collect().to_dicts()
    rows[7]["rejected_contexts"].append(0.5)
    wrong = store.table("attributions/toy-1/wrong")
    attributions = wrong.append(pa.Table.from_pylist(rows, ATTRIBUTIONS), {"fingerprint": "wrong", "statistics": {}})
    settings = HEAD | {"weights.features": "contexts", "attribute.contexts": NUM_CONTEXTS}
    with pytest.raises(
        MismatchError, match=rf"pair {rows[7]['pair_id']}: .* rejected_contexts .* expected 2 for each; 1 such"
    ):
        published(make_recipe, dataclasses.replace(made_of, attributions=attributions), **settings)


def test_an_ensemble_with_a_pair_that_was_not_trained_needs_no_model_in_the_store(store, make_recipe):
    settings = {"weights.estimator": "ensemble", "weights.members": ["tis", "head"], "contrast.method": "prompt"}
    made_of = ingredients(store, range(60), logp=lambda row: -4.0 + 0.1 * row)
    made = published(make_recipe, made_of, **settings, **{"weights.spread": 0.3})
    assert list(made.statistics["held_out"]) == list(made.statistics["spread"]) == ["tis", "head"]
    assert store.metadata("toy/tis-dpo")["contrast"] == {"held_out": 0, "split": None, "is_head": True}
    assert not [finding for finding in verify(store) if "model" in finding.problem]


def test_the_spread_of_log_ratios_by_hand(store, make_recipe):
    # log pi+ - log pi- is 1 in even and 3 in odd rows, on all tokens: the deviation is that of these numbers by token.
    made_of = ingredients(store, range(60), logp=lambda row: -1.0 if row % 2 else -3.0)
    settings = {"contrast.method": "prompt", "weights.spread": 0.5, "weights.lower": -9.0, "weights.upper": 9.0}
    made = published(make_recipe, made_of, **settings)
    tokens = np.repeat([3.0 if row % 2 else 1.0 for row in range(60)], [sum(map(len, pair(row))) for row in range(60)])
    assert made.statistics["spread"]["tis"] == pytest.approx({"std": tokens.std(), "scale": 0.5 / tokens.std()})
    weights = weights_of(store)
    np.testing.assert_allclose(weights[pair_id(1)][0], 3 * 0.5 / tokens.std(), rtol=1e-3)
    np.testing.assert_allclose(weights[pair_id(2)][1], 1 * 0.5 / tokens.std(), rtol=1e-3)


def test_scores_that_are_all_equal_have_no_spread_and_give_equal_weights(store, make_recipe):
    settings = {"contrast.method": "prompt", "weights.spread": 0.5}
    made = published(make_recipe, ingredients(store, range(20)), **settings)
    assert made.statistics["spread"] == {"tis": {"std": 0, "scale": 0}}
    assert made.statistics["constant_weights"]


def test_a_spread_and_a_scale_exclude_each_other_and_few_prompts_are_refused(store, make_recipe):
    for scale in (2.0, "calibrated"):
        with pytest.raises(
            SettingsError, match=r"weights.scale \(.*\) and weights.spread \(0.3\) both multiply .* to \"none\""
        ):
            make_recipe(**HEAD | {"weights.scale": scale})
    make_recipe(**HEAD | {"weights.scale": "calibrated", "weights.spread": "none"})
    with pytest.raises(InputError, match=r"'head' learns .*: labels of only 9 prompts, and at least 10 .* any split"):
        published(make_recipe, without_pair(ingredients(store, range(9))), **HEAD)
    assert not store.table("weights/toy/tis-dpo").exists()


def test_head_needs_no_contrastive_pair_and_no_attributions(make_recipe):
    recipe = make_recipe(**HEAD)
    assert (recipe.needs_pair, recipe.needs_attributions) == (False, False)
    assert recipe.weights.looks_at_all_pairs
    assert make_recipe(**HEAD | {"weights.features": "contexts", "attribute.contexts": 16}).needs_attributions
