from pathlib import Path

import pytest

from pipeline.recipe import load_recipe
from weights_store.errors import SettingsError

REPO = Path(__file__).resolve().parents[2]
RECIPES = sorted(REPO.glob("recipes/*.toml"))
TRAIN_RECIPES = sorted(REPO.glob("recipes/train/*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_has_a_schedule(path):
    recipe = load_recipe(path)
    assert (recipe.schedule.cron is None) != (recipe.schedule.interval_s is None)


@pytest.mark.parametrize("path", TRAIN_RECIPES, ids=lambda path: path.stem)
def test_every_training_recipe_loads_and_reads_what_a_recipe_builds(path):
    from train.config import TrainConfig
    from weights_store.settings import load_toml, parse_settings

    config = parse_settings(TrainConfig, load_toml(path), str(path))
    build = next(recipe for recipe in map(load_recipe, RECIPES) if recipe.weights.name == config.data.weights)
    assert build.model.path == config.model.path
    assert build.store.uri == config.data.store


def test_recipes_ship_for_local_files_and_for_the_hub():
    sources = {load_recipe(path).dataset.source for path in RECIPES}
    assert {"Anthropic/hh-rlhf", "trl-lib/ultrafeedback_binarized"} < sources
    assert {Path(source).name for source in sources} >= {"hh_harmless.jsonl", "alpaca_judged.parquet"}


def _load(*overrides):
    return load_recipe(REPO / "recipes" / "hh_harmless.toml", overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("dataset.source=/a b/c.jsonl", "/a b/c.jsonl"),
        ("dataset.name=other", "other"),
        ("model.path=some/model", "some/model"),
        ("contrast.method=prompt", "prompt"),
        ("contrast.method=sft", "sft"),
        ("weights.name=a/b", "a/b"),
    ],
)
def test_overrides_reach_the_recipe(override, value):
    section, key = override.split("=")[0].split(".")
    assert getattr(getattr(_load(override), section), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.sorce=x", "unknown key 'dataset.sorce'; did you mean 'dataset.source'"),
        ("wieghts.name=x", "unknown key 'wieghts'"),
        ("contrast.method=magic", "contrast.method: .*'prompt', 'sft' or 'dpo'.*got 'magic'"),
        ("weights.lower=2.0", r"weights.lower \(2.0\) must be below weights.upper \(1.5\)"),
        ("weights.name=../x", r"bad name '\.\./x'"),
        ("dataset.name=a/b", "one part, without '/'"),
        ("schedule.interval_s=60", "schedule.cron and schedule.interval_s are both set"),
        ("weights.upper=inf", "weights.upper: .*finite"),
        ("weights.seed=-1", "greater than or equal to 0"),
        ("weights.name=hh-harmless", "has two parts"),
        ("weights.name=hh-harmless/uniform", "is kept for weights.estimator 'uniform'"),
        ("dataset.max_pairs=0", "greater than or equal to 1"),
        ("score.top_k=257", "score.top_k: .*less than or equal to 256"),
        ("weights.share=0.5", "weights.share has no effect with weights.estimator 'tis': leave it out"),
        ("weights.share=0", "greater than 0"),
    ],
)
def test_wrong_overrides_say_what_and_where(override, message):
    with pytest.raises(SettingsError, match=message):
        _load(override)


def test_equal_contrastive_prompts_are_refused():
    with pytest.raises(SettingsError, match="every weight would be constant"):
        _load("contrast.method=prompt", "contrast.positive_prompt=same", "contrast.negative_prompt=same")


def test_settings_that_do_not_change_results_are_not_in_the_identity():
    base = _load().result_settings()
    assert (
        _load(
            "score.batch_tokens=512", "score.chunk_tokens=9", "store.uri=/x", "schedule.cron=* * * * *"
        ).result_settings()
        == base
    )
    assert _load("contrast.tokens_per_batch=2048", "contrast.python=/x", "dataset.source=/y").result_settings() == base
    assert _load("score.top_k=0").result_settings() == base
    for override in (
        "score.dtype=float32",
        "score.top_k=16",
        "contrast.beta=0.2",
        "weights.k=2",
        "dataset.max_response_tokens=9",
    ):
        assert _load(override).result_settings() != base, override


def test_settings_of_other_methods_and_estimators_are_not_in_the_identity():
    prompt = _load("contrast.method=prompt").result_settings()
    assert _load("contrast.method=prompt", "contrast.learning_rate=1").result_settings() == prompt
    uniform = _load("weights.estimator=uniform").result_settings()
    assert _load("weights.estimator=uniform", "weights.upper=9", "contrast.beta=3").result_settings() == uniform


@pytest.mark.parametrize("override", ["k=2", "mu=0.5", "lower=-1", "upper=1", "seed=1"])
def test_a_clamp_has_no_effect_on_a_selection_and_is_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(SettingsError, match=f"weights.{key} has no effect with weights.estimator 'sepo'"):
        _load("weights.estimator=sepo", f"weights.{override}")


def test_a_selection_is_identified_by_its_share_and_its_contrastive_pair():
    sepo = _load("weights.estimator=sepo")
    assert sepo.needs_pair
    assert sepo.result_settings()["weights"] == {"name": "hh-harmless/tis-dpo", "estimator": "sepo", "share": 0.3}
    assert sepo.result_settings()["contrast"] == _load().result_settings()["contrast"]
    assert _load("weights.estimator=sepo", "weights.share=0.5").result_settings() != sepo.result_settings()


@pytest.mark.parametrize("estimator", ["tis", "sepo", "uniform", "random", "reversed"])
def test_a_recipe_comes_back_from_a_deployment(estimator):
    from pipeline.recipe import Recipe

    recipe = _load(f"weights.estimator={estimator}")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_every_key_stands_in_the_settings_page_and_no_other():
    import re
    from typing import get_args

    from pipeline.recipe import Recipe
    from train.config import TrainConfig

    def section(annotation):  # of an optional section: what stands beside None
        return annotation if hasattr(annotation, "model_fields") else get_args(annotation)[0]

    page = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    parts = page.split("## Training")
    for model, part in zip((Recipe, TrainConfig), parts, strict=True):
        fields = model.model_fields.items()
        known = {f"{name}.{key}" for name, field in fields for key in section(field.annotation).model_fields}
        assert set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)`", part, flags=re.MULTILINE)) == known
