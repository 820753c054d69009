"""What a version records of held-out labels, and the scale that is fitted on them, from tables in a store to plain words."""

import dataclasses
import re

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import tokenweights
from pipeline.stages.publish import Ingredients, publish
from pipeline.stages.report import summary_rows
from pipeline.weighing.held_out import fit_multiplier
from train.data.selection import is_held_out
from weights_store import WeightStore
from weights_store.errors import InputError, SettingsError
from weights_store.schemas import LOGPS, TOKENS, WEIGHTS

PROMPT = {"contrast.method": "prompt"}


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "store")


def pair_id(row):
    return f"{row:012x}{row:020x}"


def margin(row):
    """log pi+ - log pi- over the chosen minus over the rejected tokens: ten nats a token, but the label is noisy."""
    return 10 * float(np.random.default_rng(row).normal(1, 1))


def other_pairs(store, rows, splits):
    """Write a weight dataset that has these prompts, with other responses."""
    pairs = [
        {"chosen_ids": [5], "rejected_ids": [6], "chosen_token_weights": [1.0], "rejected_token_weights": [1.0]}
        | {"pair_id": f"{row:012x}{'f' * 20}", "prompt_ids": [1], "split": split, "pair_weight": 1.0}
        | {"chosen_ref_logps": [-1.0], "rejected_ref_logps": [-1.0]}
        for row, split in zip(rows, splits, strict=True)
    ]
    store.table("weights/other/uniform").append(
        pa.Table.from_pylist(pairs, WEIGHTS), {"fingerprint": "other", "statistics": {}}
    )


def second_pair(store, rows):
    """Write the log-probs of a second contrastive pair, whose margins are 0: it halves those of the mean."""
    logps = [{"pair_id": pair_id(row), "chosen_logps": [-1.0], "rejected_logps": [-1.0]} for row in rows]
    return {
        f"{scorer}_logps": store.table(f"logps/toy-1/{scorer}").append(
            pa.Table.from_pylist(logps, LOGPS), {"fingerprint": f"{scorer} of {rows}", "statistics": {}}
        )
        for scorer in ("positive2", "negative2")
    }


def ingredients(store, rows):
    """Write tables that have these rows too: one token a side, the margin on the chosen one."""
    ids = {"prompt": "[]", "prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6], "split": "train"}
    tokens = [{"pair_id": pair_id(row), **ids, "source_row": row} for row in rows]
    metadata = {
        "fingerprint": f"tokens of {rows}",
        "tokenizer": {"fingerprint": "t", "vocab_size": 8, "eos_token_id": 2},
        "statistics": {"num_source_rows": rows.stop, "num_pairs": rows.stop, "quarantined": {}},
    }
    made = {"tokens": store.table("tokens/toy-1").append(pa.Table.from_pylist(tokens, TOKENS), metadata)}
    # pi+ differs from the reference only by noise that knows nothing.
    chosen = {
        "ref": lambda row: -1.0 - row % 7,
        "positive": lambda row: -4.0,
        "negative": lambda row: -4.0 - margin(row),
    }
    for scorer, logp in chosen.items():
        logps = [{"pair_id": pair_id(row), "chosen_logps": [logp(row)], "rejected_logps": [-4.0]} for row in rows]
        table = store.table(f"logps/toy-1/{scorer}")
        record = {"fingerprint": f"{scorer} of {rows}", "statistics": {}}
        made[f"{scorer}_logps"] = table.append(pa.Table.from_pylist(logps, LOGPS), record)
    return Ingredients(**made)


def published(make_recipe, made_of, **settings):
    recipe = make_recipe(**settings)
    return publish(recipe, recipe.weights, made_of)


def fitted(rows):
    margins = np.array([margin(row) for row in rows])
    return fit_multiplier(margins, np.array(list(rows), np.uint64))[0]


def test_a_version_records_how_its_scores_predict_labels_and_says_so(store, make_recipe, capsys):
    made = published(make_recipe, ingredients(store, range(400)), **PROMPT)
    record = made.statistics["held_out"]["tis"]
    assert list(made.statistics["held_out"]) == ["tis"]
    assert (record["num_pairs"], record["scale"], record["verdict"]) == (400, 1, "overconfident")
    assert record["multiplier"] == pytest.approx(fitted(range(400)), rel=2e-3)  # stored with 12 mantissa bits
    rows = dict(summary_rows(made))
    line = rows["held-out labels"]
    right = np.mean([margin(row) > 0 for row in range(400)])
    assert line.startswith(
        f"log-likelihood {record['log_likelihood']:.3f} ± {record['log_likelihood_se']:.3f} nats a pair"
    )
    assert line.endswith(f" (chance -0.693), {100 * right:.0f} % right in 400 pairs")
    times = 1 / record["multiplier"]
    verdict = f'the scores are {times:.1f} times overconfident: set weights.scale = "calibrated", or use no weights'
    assert rows["verdict"] == verdict
    tokenweights.main(["show", "toy/tis-dpo", "--store", str(store.root)])
    shown = capsys.readouterr().out
    assert re.search(rf"\n  held-out labels +{re.escape(line)}\n  verdict +{re.escape(verdict)}\n", shown)
    assert "held_out" not in shown  # no second time as bare numbers


def test_appended_pairs_are_measured_with_the_others(store, make_recipe):
    published(make_recipe, ingredients(store, range(40)), **PROMPT)
    made_of = ingredients(store, range(40, 100))
    grown = published(make_recipe, made_of, **PROMPT)
    assert len(store.table("weights/toy/tis-dpo").shards()) == 2  # the old rows have stayed
    at_once = published(make_recipe, made_of, **PROMPT, **{"weights.name": "toy/other"})
    assert grown.statistics["held_out"]["tis"].pop("verdict") == at_once.statistics["held_out"]["tis"].pop("verdict")
    assert grown.statistics["held_out"]["tis"] == pytest.approx(at_once.statistics["held_out"]["tis"])
    assert grown.statistics["held_out"]["tis"]["num_pairs"] == 100


def test_appended_pairs_of_several_prompts_are_measured_by_their_mean(store, make_recipe):
    def grow(rows):
        return dataclasses.replace(ingredients(store, rows), more_logps=second_pair(store, rows))

    published(make_recipe, grow(range(40)), **PROMPT)
    grown = published(make_recipe, grow(range(40, 100)), **PROMPT)
    record = grown.statistics["held_out"]["tis"]
    assert (record["num_pairs"], record["num_seen_pairs"]) == (100, 0)
    assert record["multiplier"] == pytest.approx(2 * fitted(range(100)), rel=2e-3)


def test_prompts_of_the_other_pairs_that_trained_the_models_are_left_out(store, make_recipe):
    made_of = ingredients(store, range(400))
    other_pairs(store, range(300, 500), ["train"] * 150 + ["dev"] * 50)
    settings = {"contrast.weights": "other/uniform", "contrast.held_out": 0.25, "contrast.split": "train"}
    recipe = make_recipe(**settings)
    made = publish(recipe, recipe.weights, made_of)
    record = made.statistics["held_out"]["tis"]
    seen = [row for row in range(300, 400) if not is_held_out(pair_id(row), 0.25)]
    assert 50 < len(seen) < 100
    assert (record["num_pairs"], record["num_seen_pairs"]) == (400 - len(seen), len(seen))
    assert record["multiplier"] == pytest.approx(fitted([row for row in range(400) if row not in seen]), rel=2e-3)
    assert list(made.statistics["held_out"]) == ["tis"]  # DPO on this dataset does not know the labels of the other one
    assert store.metadata("toy/tis-dpo")["contrast"] == {
        "held_out": 0.25,
        "split": "train",
        "weights": "other/uniform@0",
        "num_seen_pairs": len(seen),
    }


def test_given_models_are_measured_on_an_assumption(store, make_recipe):
    given = {"contrast.method": "given", "contrast.positive_model": "org/larger"}
    made = published(make_recipe, ingredients(store, range(40)), **given)
    assert made.statistics["held_out"]["tis"]["num_pairs"] == 40
    line = dict(summary_rows(made))["held-out labels"]
    assert line.endswith("; assumed: the given models were not trained on these labels")


def test_only_prompts_that_the_models_have_not_seen_are_measured_and_dpo_is_compared(store, make_recipe):
    made_of, held_out = ingredients(store, range(400)), {"contrast.held_out": 0.25}
    unseen = [row for row in range(400) if is_held_out(pair_id(row), 0.25)]
    made = published(make_recipe, made_of, **held_out)
    found = made.statistics["held_out"]
    assert found["tis"]["num_pairs"] == found["dpo"]["num_pairs"] == len(unseen)
    assert found["tis"]["multiplier"] == pytest.approx(fitted(unseen), rel=2e-3)
    gain = found["tis"]["log_likelihood"] - found["dpo"]["log_likelihood"]
    assert found["tis"]["gain_over_dpo"] == pytest.approx(gain)
    rows = dict(summary_rows(made))
    assert "; they predict better than DPO's own implicit reward (+0." in rows["verdict"]
    assert " on the same pairs: log-likelihood -0." in rows["DPO's own reward"]
    sft = published(make_recipe, made_of, **held_out, **{"contrast.method": "sft"})
    assert list(sft.statistics["held_out"]) == ["tis"]


def test_a_pair_that_was_trained_on_all_labels_is_not_measured(store, make_recipe):
    made_of = ingredients(store, range(40))
    made = published(make_recipe, made_of)
    line = dict(summary_rows(made))["held-out labels"]
    assert line.startswith(
        "not measured: the models of the contrastive pair were trained on all these labels; set contrast."
    )
    uniform = published(make_recipe, made_of, **{"weights.estimator": "uniform"})
    assert "held_out" not in uniform.statistics


def test_a_calibrated_scale_by_hand_and_new_pairs_change_every_weight(store, make_recipe):
    settings = {**PROMPT, "weights.scale": "calibrated", "weights.lower": -9.0, "weights.upper": 9.0}
    first = published(make_recipe, ingredients(store, range(200)), **settings)
    a = fitted(range(200))
    weights = dict(
        store.scan("toy/tis-dpo").select("pair_id", pl.col("chosen_token_weights").list.first()).collect().rows()
    )
    expected = {pair_id(row): np.exp(a * margin(row)) for row in range(200)}
    assert weights == pytest.approx(expected, rel=2e-3)
    record = first.statistics["held_out"]["tis"]
    assert (record["scale"], record["verdict"]) == (record["multiplier"], "calibrated")
    assert dict(summary_rows(first))["verdict"] == f"the scores times {a:.3g} (weights.scale) are calibrated"
    grown = published(make_recipe, ingredients(store, range(200, 300)), **settings)
    assert grown.statistics["held_out"]["tis"]["scale"] == pytest.approx(fitted(range(300)), rel=2e-3)
    assert len(store.table("weights/toy/tis-dpo").shards()) == 1  # all rows were written again
    assert store.metadata("toy/tis-dpo")["identity"]["settings"]["weights"]["scale"] == "calibrated"


def test_a_calibrated_scale_without_held_out_labels_is_refused_before_and_after_training(store, make_recipe):
    with pytest.raises(SettingsError, match=r"'calibrated' fits the scale on labels .* set contrast.held_out"):
        make_recipe(**{"weights.scale": "calibrated"})
    with pytest.raises(SettingsError, match=r"weights.scale"):
        make_recipe(**{"weights.scale": 0})
    other = {"contrast.weights": "other/uniform"}
    for allowed in (
        other,
        {"contrast.held_out": 0.1},
        {"contrast.split": "train"},
        {"dataset.split_column": "fold"},
        PROMPT,
    ):
        make_recipe(**{"weights.scale": "calibrated", **allowed})
    # 40 pairs of one split, on which the models were trained.
    settings = {"weights.scale": "calibrated", "contrast.split": "train"}
    with pytest.raises(
        InputError,
        match=r"'tis' .*: only 0 prompts of 40 pairs have labels .* at least 10 .*; set contrast.held_out, for example to",
    ):
        published(make_recipe, ingredients(store, range(40)), **settings)
    assert not store.table("weights/toy/tis-dpo").exists()
