import json
import pickle
import re
from pathlib import Path

import pytest

from pipeline.recipe import Recipe, load_recipe
from pipeline.weighing.estimators import ESTIMATORS
from train.config import TrainConfig
from weights_store.errors import SettingsError
from weights_store.settings import KINDS, load_toml, parse_settings

REPO = Path(__file__).resolve().parents[2]
RECIPES = sorted(REPO.glob("recipes/*.toml"))
TRAIN_RECIPES = sorted(REPO.glob("recipes/train/*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_has_a_schedule(path):
    recipe = load_recipe(path)
    assert (recipe.schedule.cron is None) != (recipe.schedule.interval_s is None)


@pytest.mark.parametrize("path", TRAIN_RECIPES, ids=lambda path: path.stem)
def test_every_training_recipe_loads_and_reads_what_a_recipe_builds(path):
    config = parse_settings(TrainConfig, load_toml(path), str(path))
    build = next(recipe for recipe in map(load_recipe, RECIPES) if recipe.weights.name == config.data.weights)
    is_student = config.loss.name == "distill"
    assert (build.model.path == config.model.path) != is_student
    assert not is_student or build.score.top_k
    assert build.store.uri == config.data.store


@pytest.mark.parametrize("path", TRAIN_RECIPES, ids=lambda path: path.stem)
def test_a_training_config_given_as_a_recipe_is_told_for_what_it_is(path):
    text = f"{path} is a training config (sections data, loss, optim, output), not a recipe; use it with `tokenweights train`"
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert str(caught.value) == text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_given_as_a_training_config_is_told_for_what_it_is(path):
    text = rf"^{path} is a recipe \(sections [a-z, ]+\), not a training config; use it with `tokenweights build`$"
    with pytest.raises(SettingsError, match=text):
        parse_settings(TrainConfig, load_toml(path), str(path))


def test_a_misplaced_section_of_the_other_kind_is_an_unknown_key():
    settings = load_toml(RECIPES[0]) | {"optim": {"learning_rate": 1.0}}
    with pytest.raises(SettingsError, match="unknown section 'optim'; expected one of dataset, model, "):
        parse_settings(Recipe, settings, "x.toml")


def test_the_kinds_of_files_are_told_apart_by_the_sections_that_only_one_of_them_has():
    recipe, training = Recipe.model_fields.keys(), TrainConfig.model_fields.keys()
    assert {kind.name: set(kind.sections) for kind in KINDS} == {
        "recipe": recipe - training,
        "training config": training - recipe,
    }


def test_recipes_ship_for_local_files_and_for_the_hub():
    sources = {load_recipe(path).dataset.source for path in RECIPES}
    assert {"Anthropic/hh-rlhf", "trl-lib/ultrafeedback_binarized"} < sources
    assert {Path(source).name for source in sources} >= {"hh_harmless.jsonl", "alpaca_judged.parquet"}


def _load(*overrides):
    """Return the paper's recipe, which has a contrastive pair, without its preset."""
    own = ("weights.preset=none", "weights.estimator=tis")
    return load_recipe(REPO / "recipes" / "hh_harmless_paper.toml", [*own, *overrides])


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
        ("contrast.method=magic", "contrast.method: .*'prompt', 'sft', 'dpo' or 'given'.*got 'magic'"),
        ("contrast.method=given", "'given' needs contrast.positive_model or contrast.negative_model; for the starting"),
        ("contrast.negative_model=x", "contrast.negative_model has no effect with contrast.method 'dpo': set 'given'"),
        ("contrast.positive_revision=x", "contrast.positive_revision has no effect without contrast.positive_model"),
        ("contrast.weights=HH", "contrast.weights: bad name 'HH'"),
        ("contrast.weights=hh-harmless/uniform@2", "contrast.weights hh-harmless/uniform@2 is what this recipe builds"),
        ("contrast.negative_prompt=['bad', ' ']", "contrast.negative_prompt: a prompt is empty"),
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
        ("weights.share=0.5", r"estimator='tis' does not read weights.share, got 0.5; .*sepo, binary, ensemble\)"),
        ("weights.ti_lambda=0.5", r"estimator='tis' does not read weights.ti_lambda, got 0.5; .*\bti, ensemble\)"),
        ("weights.lowr=-1", "unknown key 'weights.lowr'; did you mean 'weights.lower'"),
        ("weights.estimator=tiss", "weights.estimator: .*'tis', 'reversed'.*'sepo'.*got 'tiss'"),
        ("weights.members=['ti']", "estimator='tis' does not read weights.members"),
        ("weights.estimator=ensemble", r"missing key 'weights.members', for example \['tis', 'ti'\]"),
        ("weights.transforms=['blur']", "weights.transforms.*'position', 'smooth'.*got 'blur'"),
        ("weights.transforms=['decay','smooth','decay']", "weights.transforms: expected each name once, got"),
        ("weights.smooth_window=4", "weights.smooth_window: expected an odd number of tokens"),
        ("weights.smooth_window=5", "weights.smooth_window has no effect here, only with transform 'smooth'"),
        ("weights.decay_gamma=0.5", "weights.decay_gamma has no effect here, only with transform 'decay'"),
        ("weights.quality_eta=0.1", "weights.quality_eta has no effect here, only with pair_weight 'quality'"),
        ("weights.estimator=entropy", "estimator 'entropy' .*: set score.top_k"),
        ("weights.estimator=activation", "set attribute.activations = true"),
    ],
)
def test_wrong_overrides_say_what_and_where(override, message):
    with pytest.raises(SettingsError, match=message):
        _load(override)


def test_equal_contrastive_prompts_are_refused():
    with pytest.raises(SettingsError, match="every weight would be constant"):
        _load("contrast.method=prompt", "contrast.positive_prompt=same", "contrast.negative_prompt=same")


def test_prompts_of_several_pairs_come_in_lists_of_equal_length():
    lists = ["contrast.positive_prompt=['good', 'kind']", "contrast.negative_prompt=['bad', 'unkind']"]
    assert _load("contrast.method=prompt", *lists).contrast.prompt_pairs == [("good", "bad"), ("kind", "unkind")]
    with pytest.raises(SettingsError, match="positive_prompt has 2 prompts and contrast.negative_prompt 1: expected"):
        _load("contrast.method=prompt", lists[0], "contrast.negative_prompt=bad")
    with pytest.raises(SettingsError, match="contrast.weights has no effect with contrast.method 'prompt'"):
        _load("contrast.method=prompt", "contrast.weights=other/uniform")


def test_given_models_have_no_prompt_unless_one_is_set():
    # The recipe file sets both prompts, for the method prompt.
    settings = load_toml(REPO / "recipes" / "hh_harmless_paper.toml") | {
        "contrast": {"method": "given", "positive_model": "x"}
    }
    plain = parse_settings(Recipe, settings, "x.toml")
    assert plain.contrast.prompt_pairs == [(None, None)]
    assert plain.result_settings()["contrast"] == {"method": "given"}
    settings["contrast"]["positive_prompt"] = ["good", "kind"]
    prompted = parse_settings(Recipe, settings, "x.toml")
    assert prompted.contrast.prompt_pairs == [("good", None), ("kind", None)]
    assert prompted.result_settings()["contrast"] == {
        "method": "given",
        "positive_prompt": ["good", "kind"],
        "role": "system",
    }
    assert Recipe.model_validate(prompted.model_dump(mode="json")) == prompted


def test_settings_that_do_not_change_results_are_not_in_the_identity():
    base = _load().result_settings()
    assert (
        _load(
            "score.batch_tokens=512", "score.chunk_tokens=9", "store.uri=/x", "schedule.cron=* * * * *"
        ).result_settings()
        == base
    )
    train = (
        "optim.tokens_per_batch=2048", "model.gradient_checkpointing=true", "model.packing=false", "model.compile=true",
        "parallel.strategy=fsdp2", "num_processes=4", "num_machines=2", "main_address=node0:29500",
    )  # fmt: skip
    faster = (*(f"contrast.train.{override}" for override in train), "contrast.python=/x", "dataset.source=/y")
    assert _load(*faster).result_settings() == base
    assert _load("score.top_k=0").result_settings() == base
    for override in (
        "score.dtype=float32",
        "score.top_k=16",
        "contrast.train.loss.beta=0.2",
        "contrast.train.optim.schedule=constant",
        "contrast.train.model.dtype=float32",
        "contrast.train.lora.rank=8",
        "weights.k=2",
        "dataset.max_response_tokens=9",
    ):
        assert _load(override).result_settings() != base, override


def test_settings_of_other_methods_and_estimators_are_not_in_the_identity():
    prompt = _load("contrast.method=prompt").result_settings()
    assert _load("contrast.method=prompt", "contrast.train.optim.learning_rate=1").result_settings() == prompt
    uniform = _load("weights.estimator=uniform").result_settings()
    assert (
        _load("weights.estimator=uniform", "weights.upper=9", "contrast.train.loss.beta=3").result_settings() == uniform
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("beta=0.2", "unknown key 'contrast.beta'; did you mean 'contrast.train.loss.beta'?"),
        ("learning_rate=1e-5", "did you mean 'contrast.train.optim.learning_rate'?"),
        ("train.model.dtyp=float32", "did you mean 'contrast.train.model.dtype'?"),
        ("train.lora.merge=true", "unknown key 'contrast.train.lora.merge'"),
        ("train.model.dtype=float16", "contrast.train.model.dtype: Input should be 'float32' or 'bfloat16'"),
        ("train.model.quantization=nf4", "freezes the model's weights; add a [contrast.train.lora] section"),
        ("train.num_processes=5", "pairs_per_step=32 cannot be shared equally by 5 processes"),
        (
            "train.num_machines=2",
            "contrast.train.num_machines=2 needs the host:port of the first machine, and got none",
        ),
        ("train.main_address=node0:29500", "main_address='node0:29500' is for several machines"),
        ("train.main_address=node0", "contrast.train.main_address: String should match pattern"),
    ],
)
def test_wrong_settings_of_the_contrastive_trainings_are_refused(override, message, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError) as caught:
        _load(f"contrast.{override}")
    assert message in str(caught.value)


def test_several_machines_meet_at_the_address_of_the_recipe_or_else_of_the_environment(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29400")

    def launcher(*overrides):
        return _load("contrast.train.num_machines=2", *overrides).contrast.train.launcher(1)

    assert launcher()[2:10] == ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node7", "--master-port", "29400"]
    given = launcher("contrast.train.main_address=node0:29500")
    assert given[6:10] == ["--master-addr", "node0", "--master-port", "29500"]
    assert _load().contrast.train.launcher() == []  # one process: the variables of whoever started us mean nothing


def test_4_bit_weights_of_the_contrastive_trainings_cannot_be_split():
    settings = ("train.model.quantization=nf4", "train.lora.rank=8", "train.parallel.strategy=fsdp2")
    with pytest.raises(SettingsError, match=r"Set contrast.train.parallel.strategy='ddp' \(each process then holds"):
        _load(*(f"contrast.{setting}" for setting in settings))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["estimator=ti", "span=sequence"], "weights.span 'sequence' .*: set attribute.prompts = true"),
        (["estimator=ti", "share=0.5"], "weights.estimator='ti' does not read weights.share"),
        (["estimator=ti", "lower=-1"], "weights.estimator='ti' does not read weights.lower"),
        (["estimator=sepo", "share=0"], "weights.share: .*greater than 0"),
        (["estimator=ti", "ti_lambda=1.01"], "weights.ti_lambda: .*less than or equal to 1"),
        (["estimator=ti", "ti_lambda=-0.1"], "weights.ti_lambda: .*greater than or equal to 0"),
        (["estimator=ti", "sigma_divisor=0"], "weights.sigma_divisor: .*greater than 0"),
        (
            ["estimator=rank_based", "min_weight=2"],
            r"weights.min_weight \(2.0\) must be below weights.max_weight \(1.3\)",
        ),
        (
            ["estimator=threshold", "lower=-2", "upper=0"],
            r"weights.upper \(0.0\) must be above 0 with estimator 'threshold'",
        ),
        (
            ["estimator=ti", "ti_lambda=1", "transforms=['shrink']"],
            "estimator 'ti' gives weights of 0: leave 'shrink' out",
        ),
        (
            ["estimator=rank_based", "min_weight=0", "transforms=['shrink']"],
            "estimator 'rank_based' gives weights of 0: leave 'shrink' out",
        ),
        (["estimator=origin", "transforms=['shrink']"], "estimator 'origin' gives weights of 0: leave 'shrink' out"),
        (
            ["estimator=ensemble", "members=['tis','surprise']", "transforms=['shrink']"],
            "estimator 'surprise' gives weights of 0",
        ),
        (
            ["estimator=ensemble", "members=['tis']"],
            "weights.members: .*at least 2 items",
        ),
        (["estimator=ensemble", "members=['tis','ti','tis']"], "weights.members: expected each name once"),
        (
            ["estimator=ensemble", "members=['tis','tiss']"],
            "weights.members: no estimator 'tiss': expected some of 'tis'",
        ),
        (
            ["estimator=ensemble", "members=['tis','ti']", "share=0.5"],
            "weights.share has no effect here, only with member 'sepo' or member 'binary'",
        ),
        (
            ["transforms=['smooth']", "smooth_over=words", "smooth_window=5"],
            "weights.smooth_window has no effect with weights.smooth_over 'words'",
        ),
        (["name=hh-harmless/uniform", "estimator=uniform", "transforms=['decay']"], "without transforms, pair weights"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        _load(*(f"weights.{override}" for override in overrides))


def test_a_margin_has_no_prompt_attributions_for_each_response():
    with pytest.raises(SettingsError, match="belong to both responses: use 'gold_logps'"):
        _load("weights.estimator=ti", "attribute.target=dpo_margin", "attribute.prompts=true")


def test_versions_of_earlier_recipes_keep_their_identity():
    # What stood in the identity before there were other estimators, to the letter.
    clamp = {"k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}
    before = {
        "tis": clamp,
        "reversed": clamp,
        "random": {**clamp, "seed": 0},
        "sepo": {"share": 0.3},
        "uniform": {},
    }
    for estimator, settings in before.items():
        found = _load(f"weights.estimator={estimator}").result_settings()
        assert found["weights"] == {"name": "hh-harmless/tis-dpo", "estimator": estimator, **settings}
        assert set(found) == {"dataset", "contrast", "score", "weights"}


def test_each_estimator_asks_for_what_it_reads():
    def asks(*overrides):
        recipe = _load(*overrides)
        return recipe.needs_pair, recipe.needs_attributions

    assert asks() == asks("weights.estimator=rank_based") == (True, False)
    assert asks("weights.estimator=ti") == (False, True)
    assert asks("weights.estimator=surprise") == asks("weights.estimator=decay") == (False, False)
    assert asks("weights.estimator=activation", "attribute.activations=true") == (False, True)
    assert asks("weights.estimator=ensemble", "weights.members=['ti','surprise']") == (False, True)
    assert asks("weights.estimator=ensemble", "weights.members=['ti','tis']") == (True, True)
    assert asks("weights.estimator=ti", "weights.pair_weight=margin") == (True, True)
    assert asks("weights.estimator=ti", "weights.pair_weight=quality") == (False, True)


def test_own_weights_are_read_from_the_columns_that_are_needed():
    assert _load().weight_columns == {}
    assert _load("weights.estimator=column").weight_columns == {
        "chosen_weights_column": "chosen_weights",
        "rejected_weights_column": "rejected_weights",
    }
    named = ["dataset.chosen_weights_column=a", "dataset.rejected_weights_column=b", "weights.pair_weight=column"]
    members = ["weights.estimator=ensemble", "weights.members=['spans','tis']"]
    assert list(_load(*members, *named).weight_columns.values()) == ["a", "b", "pair_weight"]
    assert list(_load(*members).weight_columns.values()) == ["chosen_spans", "rejected_spans"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["weights.estimator=pattern"], "estimator 'pattern' has no pattern"),
        (["weights.estimator=pattern", "weights.patterns=[['(', 1]]"], "'(' is no regular expression"),
        (["weights.estimator=pattern", "weights.patterns=[['a', -1]]"], "greater than or equal to 0"),
        (["weights.estimator=pattern", f"weights.patterns=[['{'(' * 3000}', 1]]"], "it is nested too deep"),
        (["weights.estimator=pattern", "weights.roles=[['tool', 1], ['tool', 2]]"], "expected each role once"),
        (["weights.estimator=pattern", "weights.roles=[['user', 1]]"], "'assistant' or 'tool'"),
        (
            ["weights.estimator=ensemble", "weights.members=['column','spans']"],
            "estimator 'column' and estimator 'spans' each take a number for each token from the source",
        ),
        (
            ["weights.estimator=ensemble", "weights.members=['column','pattern']", "weights.roles=[['tool', 1]]"],
            "estimator 'column' and weights.roles each take a number for each token from the source",
        ),
        (
            ["weights.estimator=head", "dataset.pair_weight_column=a"],
            "dataset.pair_weight_column has no effect here, only with weights.pair_weight 'column': leave it out",
        ),
        (
            ["weights.estimator=head", "dataset.chosen_weights_column=a", "dataset.rejected_weights_column=b"],
            "dataset.chosen_weights_column has no effect here, only with weights.estimator 'column' or 'spans'",
        ),
        (
            ["dataset.chosen_weights_column=a"],
            "set both dataset.chosen_weights_column and dataset.rejected_weights_column",
        ),
        (["weights.estimator=spans", "weights.rest=0", "weights.transforms=['shrink']"], "gives weights of 0"),
        (
            ["weights.estimator=pattern", "weights.patterns=[['a', 0]]", "weights.transforms=['shrink']"],
            "gives weights of 0",
        ),
        (["weights.estimator=diff", "weights.diff_gamma=0", "weights.transforms=['shrink']"], "gives weights of 0"),
    ],
)
def test_marks_that_cannot_be_used_are_refused(overrides, problem):
    with pytest.raises(SettingsError, match=re.escape(problem)):
        _load(*overrides)


def test_patterns_are_in_the_identity_in_their_order():
    both = [
        _load("weights.estimator=pattern", f"weights.patterns={given}").result_settings()["weights"]
        for given in ("[['@code', 2], ['x', 0.5]]", "[['x', 0.5], ['@code', 2]]")
    ]
    assert both[0]["patterns"] == [["@code", 2.0], ["x", 0.5]]
    assert both[0] == json.loads(json.dumps(both[0]))
    assert both[0] != both[1]


def test_what_changes_weights_is_in_the_identity_and_nothing_else():
    ti = _load("weights.estimator=ti").result_settings()
    assert ti["weights"] == {
        "name": "hh-harmless/tis-dpo",
        "estimator": "ti",
        "ti_lambda": 0.7,
        "sigma_divisor": 4.0,
        "span": "response",
    }
    assert ti["contrast"] == {}
    assert ti["attribute"]["target"] == "max_logit"
    whole = _load(
        "weights.estimator=ensemble",
        "weights.members=['ti','rank_based']",
        "weights.transforms=['smooth','decay']",
        "weights.smooth_over=words",
        "weights.pair_weight=margin",
    ).result_settings()["weights"]
    read = {"members", "ti_lambda", "sigma_divisor", "span", "min_weight", "max_weight"}
    read |= {"transforms", "smooth_over", "decay_gamma", "pair_weight", "margin_tau", "margin_formula"}
    assert set(whole) == {"name", "estimator", *read}


def _weights(*overrides):
    return load_recipe(REPO / "recipes" / "hh_harmless.toml", [f"weights.{override}" for override in overrides]).weights


def test_a_recipe_without_an_estimator_asks_for_no_contrastive_pair():
    settings = load_toml(REPO / "recipes" / "hh_harmless.toml")
    del settings["weights"]["estimator"]
    recipe = parse_settings(Recipe, settings, "x.toml")
    assert (recipe.weights.estimator, recipe.needs_pair, recipe.needs_attributions) == ("head", False, False)


@pytest.mark.parametrize(
    ("preset", "same"),
    [
        (["preset=paper", "estimator=tis"], ["estimator=tis", "upper=1.5", "lower=-0.5", "scale=1", "k=1", "mu=1"]),
        (["preset=release", "estimator=rank_based"], ["estimator=rank_based", "min_weight=0.7", "max_weight=1.3"]),
        (["preset=paper", "estimator=ti"], ["estimator=ti", "ti_lambda=0.7", "sigma_divisor=4", "span=response"]),
    ],
)
def test_a_preset_is_another_way_to_write_its_settings(preset, same):
    assert _weights(*preset).result_settings() == _weights(*same).result_settings()


def test_the_release_of_ti_dpo_needs_attributions_of_prompts():
    overrides = ["weights.preset=release", "weights.estimator=ti"]
    with pytest.raises(SettingsError, match=r"weights.span 'sequence' .*: set attribute.prompts = true"):
        _load(*overrides)
    weights = _load(*overrides, "attribute.prompts=true").weights
    assert (weights.ti_lambda, weights.sigma_divisor, weights.span) == (0.2, 8, "sequence")


def test_a_preset_names_its_estimator_if_the_recipe_names_none():
    settings = load_toml(REPO / "recipes" / "hh_harmless_paper.toml")
    found = {}
    for preset in ("paper", "release"):
        settings["weights"]["preset"] = preset
        found[preset] = parse_settings(Recipe, settings, "x.toml").weights
    assert {preset: weights.estimator for preset, weights in found.items()} == {"paper": "tis", "release": "rank_based"}
    assert Recipe.model_validate(settings | {"weights": found["paper"].model_dump()}).weights == found["paper"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=paper", "estimator=tis", "upper=2"], r"'paper' sets weights.upper = 1.5 for .*'tis', got 2: leave"),
        (
            ["preset=paper", "estimator=tis", "transforms=['decay']"],
            r"sets weights.transforms = \[\] .*got \['decay'\]",
        ),
        (["preset=release", "estimator=tis"], "is for estimator 'rank_based' or 'ti', got weights.estimator 'tis'"),
        (["preset=papers"], "weights.preset: .*'none', 'paper' or 'release', got 'papers'"),
    ],
)
def test_what_contradicts_a_preset_is_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        _weights(*overrides)


def test_the_releases_transforms_have_its_own_ends():
    ends = {"threshold": (-1, 1), "threshold_and_scale": (-1.5, 1.5), "tis": (-0.5, 1.5)}
    for estimator, expected in ends.items():
        weights = _load(f"weights.estimator={estimator}").weights
        assert (weights.lower, weights.upper) == expected
    weights = _load("weights.estimator=threshold_and_scale", "weights.upper=2").weights
    assert (weights.lower, weights.upper) == (-1.5, 2)


@pytest.mark.parametrize("override", ["k=2", "mu=0.5", "lower=-1", "upper=1", "seed=1"])
def test_a_clamp_has_no_effect_on_a_selection_and_is_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(SettingsError, match=f"weights.estimator='sepo' does not read weights.{key}"):
        _load("weights.estimator=sepo", f"weights.{override}")


def test_a_selection_is_identified_by_its_share_and_its_contrastive_pair():
    sepo = _load("weights.estimator=sepo")
    assert sepo.needs_pair
    assert sepo.result_settings()["weights"] == {"name": "hh-harmless/tis-dpo", "estimator": "sepo", "share": 0.3}
    assert sepo.result_settings()["contrast"] == _load().result_settings()["contrast"]
    assert _load("weights.estimator=sepo", "weights.share=0.5").result_settings() != sepo.result_settings()


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "ensemble"])
def test_a_recipe_comes_back_from_a_deployment(estimator):
    from pipeline.recipe import Recipe

    inputs = ["score.top_k=8", "attribute.activations=true"]
    needed = {
        "ensemble": ["weights.members=['threshold','ti']"],
        "pattern": ["weights.patterns=[['@code',2],['x',0.5]]"],
    }
    recipe = _load(f"weights.estimator={estimator}", *inputs, *needed.get(estimator, []))
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_every_key_stands_in_the_settings_page_and_no_other():
    from typing import get_args

    from pipeline.recipe import Recipe
    from train.config import TrainConfig

    def keys(name, annotation):  # of an optional section, one that is a union, or one with sections in it
        parts = [part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields")]
        inner = [keys(f"{name}.{key}", field.annotation) for part in parts for key, field in part.model_fields.items()]
        return {key for found in inner for key in found} or {name}

    page = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
    parts = page.split("## Training")
    for model, part in zip((Recipe, TrainConfig), parts, strict=True):
        known = {key for name, field in model.model_fields.items() for key in keys(name, field.annotation)}
        assert set(re.findall(r"^\| `([a-z_]+\.[a-z_.]+)`", part, flags=re.MULTILINE)) == known
