import dataclasses
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.chat.tokenizer import Condition
from pipeline.models.section import ContrastSection
from pipeline.stages.contrast import contrast, untrained_pair, wanted_models
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, publish
from pipeline.stages.score import Scorer, score
from weights_store import WeightStore
from weights_store.errors import InputError, MissingExtraError, StageError
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import LOGPS

SMALL = {
    "contrast.train.optim.pairs_per_step": 8,
    "contrast.train.optim.max_steps": 2,
    "contrast.train.optim.learning_rate": 1e-3,
}


@pytest.fixture
def uniform(make_recipe, toy_model, toy_pairs, tmp_path, write_jsonl):
    """Return a function that publishes the first so many pairs with weights 1 and the model's own log-probs."""
    model = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)

    def logps(prompt_ids, response_ids):
        ids = torch.tensor([[*prompt_ids, *response_ids]])
        with torch.no_grad():
            all_logps = model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        return all_logps.gather(-1, ids[0, len(prompt_ids) :, None])[:, 0].tolist()

    def publish_uniform(num_pairs):
        write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:num_pairs])
        recipe = make_recipe(**{"weights.name": "toy/uniform", "weights.estimator": "uniform"})
        tokens = prepare(recipe, toy_model).tokens
        store = WeightStore(recipe.store.uri)
        rows = [
            {
                "pair_id": row["pair_id"],
                "chosen_logps": logps(row["prompt_ids"], row["chosen_ids"]),
                "rejected_logps": logps(row["prompt_ids"], row["rejected_ids"]),
            }
            for row in store.table(tokens.table).scan().collect().iter_rows(named=True)
        ]
        metadata = {"fingerprint": f"r{num_pairs}", "statistics": {}}
        scored = store.table("logps/toy/ref").append(pa.Table.from_pylist(rows, LOGPS), metadata)
        return publish(recipe, recipe.weights, Ingredients(tokens, scored)).weights

    return publish_uniform


def test_prompt_pair_is_one_model_behind_two_prompts(make_recipe, toy_model, uniform):
    settings = make_recipe(
        **{"contrast.method": "prompt", "contrast.positive_prompt": "good", "contrast.negative_prompt": "bad"}
    )
    pair = contrast(settings.contrast, toy_model, uniform(4))
    assert pair.scorers["positive"].model == pair.scorers["negative"].model == toy_model
    assert (pair.scorers["positive"].condition, pair.scorers["negative"].condition) == (
        Condition("good", "system"),
        Condition("bad", "system"),
    )


def test_several_prompts_and_given_models_have_a_role_each(toy_model, tmp_path):
    other = shutil.copytree(toy_model, tmp_path / "other")
    settings = ContrastSection(method="given", positive_model=str(other), positive_prompt=["good", "kind"], role="user")
    assert untrained_pair(settings, toy_model).scorers == {
        "positive": Scorer(other, Condition("good", "user")),
        "negative": Scorer(toy_model),
        "positive2": Scorer(other, Condition("kind", "user")),
        "negative2": Scorer(toy_model),
    }


def test_a_pair_is_trained_on_the_other_pairs_that_the_recipe_names(make_recipe, toy_model, uniform, monkeypatch):
    commands = []

    def train(_module, command, _what, _python, launcher):
        assert launcher == []
        commands.append(command)
        shutil.copytree(toy_model, command[command.index("--output") + 1], dirs_exist_ok=True)

    monkeypatch.setattr("pipeline.stages.train.run_child", train)
    pairs = uniform(4)
    own = dataclasses.replace(pairs, table="weights/other/tis-dpo")  # the recipe's own dataset, which has another name
    settings = {"contrast.method": "sft", "dataset.name": "other", "dataset.split": ["a", "b"]}
    recipe = make_recipe(**settings, **{"weights.name": "other/tis-dpo", "contrast.weights": "toy/uniform"})
    assert recipe.contrast_settings.split is None  # the first split is one of this recipe's pairs
    contrast(recipe.contrast_settings, toy_model, own)
    assert [command[command.index("--weights") + 1] for command in commands] == ["toy/uniform@0"] * 2
    grown = uniform(8)
    found = wanted_models(recipe.contrast_settings, toy_model, own)
    assert [(model.identity["table"], model.data) for model in found] == [
        ("weights/toy/uniform", pairs.fingerprint)
    ] * 2
    pinned = recipe.contrast_settings.model_copy(
        update={"weights": "toy/uniform@1"}
    )  # a version that is named is meant
    assert [(model.folder, model.data) for model in wanted_models(pinned, toy_model, own)] == [
        (None, grown.fingerprint)
    ] * 2
    gone = recipe.contrast_settings.model_copy(update={"weights": "toy/uniform@9"})
    with pytest.raises(
        InputError, match="contrast.weights toy/uniform@9: .*Build it first, with the same model and store"
    ):
        wanted_models(gone, toy_model, own)


def test_trained_pair_is_two_models_of_opposite_data_and_is_reused(make_recipe, toy_model, uniform):
    recipe = make_recipe(**{"contrast.method": "sft", **SMALL})
    pairs = uniform(16)
    with ThreadPoolExecutor() as builds:  # two at once: one trains, the other waits and takes the same model
        first, other = builds.map(lambda _: contrast(recipe.contrast, toy_model, pairs), range(2))
    assert first.scorers == other.scorers
    configs = [json.loads((scorer.model / "lineage.json").read_text())["config"] for scorer in first.scorers.values()]
    assert [config["data"]["swap"] for config in configs] == [False, True]
    assert {config["loss"]["name"] for config in configs} == {"sft"}
    assert first.num_trained + other.num_trained == 2
    # A vLLM or transformers user finds a whole model there, tokenizer included.
    assert (first.scorers["positive"].model / "tokenizer.json").read_bytes() == (
        toy_model / "tokenizer.json"
    ).read_bytes()

    again = contrast(recipe.contrast, toy_model, uniform(20))
    assert (again.num_trained, again.scorers) == (0, first.scorers)


def test_adapters_are_trained_in_two_processes_and_scored_merged_into_their_base(make_recipe, toy_model, uniform):
    """The store keeps the adapters; the probe of `pipeline/models/lora.py` has compared base + adapter with what is scored."""
    shared = {"contrast.train.lora.rank": 4, "contrast.train.num_processes": 2}
    sharded = {"contrast.train.parallel.strategy": "fsdp2", "contrast.train.optim.tokens_per_batch": 512}
    recipe = make_recipe(**{"contrast.method": "dpo", **SMALL, **shared, **sharded})
    pairs = uniform(16)
    pair = contrast(recipe.contrast, toy_model, pairs)
    assert pair.num_trained == 2
    start = load_file(toy_model / "model.safetensors")
    changes = []
    for model, scorer in zip(wanted_models(recipe.contrast, toy_model, pairs), pair.scorers.values(), strict=True):
        assert model.folder == scorer.model
        stored = WeightStore(pairs.store).root.path / "models" / model.name
        record = json.loads((stored / "contrast.json").read_text())
        assert record["fingerprint"] == fingerprint_model(scorer.model)
        assert not list(stored.glob("*.safetensors"))
        adapter = load_file(stored / "adapter" / "adapter_model.safetensors")
        layer = "model.layers.1.self_attn.q_proj"
        low, high = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        merged = load_file(scorer.model / "model.safetensors")[f"{layer}.weight"]
        change = (32 / 4) * high @ low  # alpha / rank
        torch.testing.assert_close(merged, start[f"{layer}.weight"] + change, rtol=1e-5, atol=1e-6)
        changes.append(change.flatten())
    # Opposite data: the two models move apart.
    assert torch.cosine_similarity(*changes, dim=0) < 0
    lone = make_recipe(**{"contrast.method": "dpo", **SMALL, "contrast.train.lora.rank": 4})
    assert contrast(lone.contrast, toy_model, pairs).num_trained == 0  # who computes is no part of a model's identity


def test_grown_data_train_a_new_pair_only_when_asked_or_if_one_side_is_missing(make_recipe, toy_model, uniform):
    settings = {"contrast.method": "sft", **SMALL}
    plain, retrain = (make_recipe(**settings, **{"contrast.retrain": again}).contrast for again in (False, True))
    first = contrast(plain, toy_model, uniform(16))
    grown = uniform(20)
    found = [model.folder for model in wanted_models(plain, toy_model, grown)]
    assert found == [scorer.model for scorer in first.scorers.values()]
    assert [(model.folder, model.data) for model in wanted_models(retrain, toy_model, grown)] == [
        (None, grown.fingerprint)
    ] * 2
    shutil.rmtree(first.scorers["negative"].model)  # as after a kill between the two trainings
    second = contrast(plain, toy_model, grown)
    records = [json.loads((s.model / "contrast.json").read_text()) for s in second.scorers.values()]
    assert [record["data"] for record in records] == [grown.fingerprint] * 2
    assert second.num_trained == 2
    assert contrast(retrain, toy_model, grown).num_trained == 0


def test_what_is_held_out_and_the_split_reach_the_training_and_name_other_models(make_recipe, toy_model, uniform):
    settings = {"contrast.method": "sft", **SMALL}
    held_out, split = {"contrast.held_out": 0.25}, {"contrast.split": "train"}
    plain, changed = make_recipe(**settings), make_recipe(**settings, **held_out)
    # As the first stores have them: what came later is named if it is not as it was.
    flat = {"method": "sft", "dtype": "float32", "learning_rate": 1e-3, "num_epochs": 1, "max_steps": 2}
    flat |= {"pairs_per_step": 8, "seed": 0}
    assert plain.contrast_settings.training_settings() == flat
    later = {"contrast.train.lora.rank": 4, "contrast.train.optim.schedule": "constant"}
    lora = {"rank": 4, "alpha": 32.0, "target_modules": "all-linear"}
    assert make_recipe(**settings, **later).contrast.training_settings() == {
        **flat,
        "lora": lora,
        "schedule": "constant",
    }
    assert plain.result_settings()["contrast"] == plain.contrast.training_settings()
    assert changed.contrast.training_settings() == {**plain.contrast.training_settings(), "held_out": 0.25}
    pairs = uniform(16)
    both = contrast(make_recipe(**settings, **held_out, **split).contrast, toy_model, pairs)
    config = json.loads((both.scorers["positive"].model / "lineage.json").read_text())["config"]
    assert (config["eval"]["share"], config["data"]["split"]) == (0.25, "train")
    names = [
        model.name
        for options in ({}, held_out, split, held_out | split)
        for model in wanted_models(make_recipe(**settings, **options).contrast, toy_model, pairs)
    ]
    assert len(set(names)) == 8
    assert names[-2:] == [scorer.model.name for scorer in both.scorers.values()]


@pytest.mark.parametrize(
    ("settings", "split"),
    [
        ({}, None),
        ({"dataset.split": ["dev"]}, None),
        ({"dataset.split": ["dev", "test"]}, "dev"),
        ({"dataset.split_column": "fold"}, "train"),
        ({"dataset.split_column": "fold", "contrast.split": "training"}, "training"),
    ],
)
def test_of_several_splits_the_first_one_trains_the_contrastive_models(make_recipe, settings, split):
    recipe = make_recipe(**settings)
    assert recipe.contrast_settings.split == split
    assert recipe.result_settings()["contrast"].get("split") == split


def test_training_without_torch_names_the_extra(make_recipe, toy_model, uniform, monkeypatch):
    pairs = uniform(4)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'torch'.*tokenweights\[train\]"):
        contrast(make_recipe(**{"contrast.method": "sft", **SMALL}).contrast, toy_model, pairs)


def test_scoring_without_vllm_names_the_extras(make_recipe, toy_model, toy_pairs, tmp_path, write_jsonl, monkeypatch):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:3])
    recipe = make_recipe()
    tokens = prepare(recipe, toy_model).tokens
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        MissingExtraError, match=r"needs the package 'vllm'.*tokenweights\[score\].*tokenweights\[score-cpu\]"
    ):
        score(tokens, {"ref": Scorer(toy_model)}, recipe.score, toy_model)


def test_failing_training_job_says_why_in_one_line(make_recipe, toy_model, uniform, tmp_path):
    recipe = make_recipe(**{"contrast.method": "sft", **SMALL})
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((toy_model / name).read_bytes())
    with pytest.raises(StageError, match="training .* failed with exit code 1: .*tokenizer"):
        contrast(recipe.contrast, broken, uniform(4))
