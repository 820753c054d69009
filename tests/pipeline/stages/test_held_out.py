"""From a source with splits to held-out metrics: neither the training nor the contrastive models have seen what is measured.

All stages run, but the scoring: transformers scores the pairs here.
"""

import json

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.stages.contrast import contrast
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from train.config import TrainConfig
from train.data.selection import is_held_out
from train.job.job import run_job
from weights_store import WeightStore
from weights_store.errors import NotFoundError
from weights_store.schemas import LOGPS, SIDES

pytestmark = pytest.mark.slow
SHORT = {
    "contrast.train.optim.pairs_per_step": 8,
    "contrast.train.optim.max_steps": 2,
    "contrast.train.optim.learning_rate": 1e-3,
}


def score(tokens, folder, scorer):
    """Write the log-probs of all pairs under the model of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for row in WeightStore(tokens.store).table(tokens.table).scan().collect().iter_rows(named=True):
        found = {"pair_id": row["pair_id"]}
        for side in SIDES:
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            found[f"{side}_logps"] = logps[len(row["prompt_ids"]) - 1 :].tolist()
        rows.append(found)
    table = WeightStore(tokens.store).table(f"logps/toy/{scorer}")
    return table.append(pa.Table.from_pylist(rows, LOGPS), {"fingerprint": scorer, "statistics": {}})


@pytest.fixture
def build(make_recipe, toy_model, toy_pairs, tmp_path, write_jsonl):
    """Return a function that builds a dataset of 40 pairs, every fourth in split `test`; it returns the store."""

    def build_on(**settings):
        rows = [{**pair, "fold": "train" if i % 4 else "test"} for i, pair in enumerate(toy_pairs[:40])]
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        recipe = make_recipe(**SHORT, **settings)
        tokens = prepare(recipe, toy_model).tokens
        reference = score(tokens, toy_model, "ref")
        uniform = publish(recipe, recipe.uniform, Ingredients(tokens, reference))
        pair = contrast(recipe.contrast_settings, toy_model, uniform.weights)
        scored = {f"{role}_logps": score(tokens, scorer.model, role) for role, scorer in pair.scorers.items()}
        publish(recipe, recipe.weights, Ingredients(tokens, reference, **scored))
        return recipe.store.uri, pair.scorers["positive"].model

    return build_on


def train(store, folder, toy_model, **sections):
    config = {
        "data": {"store": store, "weights": "toy/tis-dpo", **sections.get("data", {})},
        "model": {"path": str(toy_model)},
        "loss": {"name": "tis_dpo", "beta": 0.1},
        "optim": {"learning_rate": 1e-3, "max_steps": 1, "pairs_per_step": 4},
        "eval": sections.get("eval", {}),
        "output": {"folder": str(folder)},
    }
    return run_job(TrainConfig.model_validate(config))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_split_of_the_source_is_held_out_of_both_trainings(build, toy_model, tmp_path):
    store, positive = build(**{"dataset.split_column": "fold"})
    splits = WeightStore(store).scan("toy/tis-dpo").group_by("split").len().collect()
    assert dict(splits.iter_rows()) == {"train": 30, "test": 10}
    assert metrics_of(positive)["num_sample_pairs"] == 30  # of the contrastive training
    result = train(store, tmp_path / "out", toy_model, data={"split": "train"}, eval={"split": "test"})
    found = metrics_of(result.folder)
    assert found["num_sample_pairs"] == 30
    assert found["held_out"].keys() >= {"loss", "rewards/accuracies", "rewards/margins"}
    assert (found["held_out_was_seen"], found["notices"]) == (False, [])
    with pytest.raises(
        NotFoundError,
        match=r"has no pairs of split 'dev'; it has test \(10 pairs\), train \(30 pairs\)\. Name another split",
    ):
        train(store, tmp_path / "other", toy_model, data={"split": "train"}, eval={"split": "dev"})


def test_the_same_prompts_are_held_out_of_both_trainings(build, toy_model, tmp_path):
    store, positive = build(**{"contrast.held_out": 0.25})
    pair_ids = WeightStore(store).scan("toy/tis-dpo").collect()["pair_id"].to_list()
    num_kept = sum(not is_held_out(pair_id, 0.25) for pair_id in pair_ids)
    assert metrics_of(positive)["num_sample_pairs"] == num_kept < 40
    # The scores of the others are out of sample, and nothing else is measured.
    measured = WeightStore(store).metadata("toy/tis-dpo")["statistics"]["held_out"]["tis"]
    num_prompts = len({pair_id[:12] for pair_id in pair_ids if is_held_out(pair_id, 0.25)})
    problem = f"only {num_prompts} prompts of {len(pair_ids)} pairs have labels that the scores have not seen"
    assert problem in measured["not_measured"]
    result = train(store, tmp_path / "out", toy_model, eval={"share": 0.25})
    found = metrics_of(result.folder)
    assert (found["num_sample_pairs"], found["held_out_was_seen"], found["notices"]) == (num_kept, False, [])
    found = metrics_of(train(store, tmp_path / "more", toy_model, eval={"share": 0.5}).folder)
    assert found["held_out_was_seen"]
    assert "trained on all pairs but a share of 0.25 of the prompts" in found["notices"][0]
