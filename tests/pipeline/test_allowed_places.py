"""Recipes and training configs name no place that the operator has not allowed (`TOKENWEIGHTS_ALLOWED`)."""

import json
import os
from typing import get_args

import pytest
from pydantic import ValidationError

from pipeline.dataset_section import DatasetSection
from pipeline.models.launch import Launch
from pipeline.models.resolve import resolve_path
from pipeline.recipe import Recipe
from pipeline.source.load import open_source
from train.config import TrainConfig
from train.run import build_parser, load_config
from weights_store import WeightStore
from weights_store.errors import InputError, SettingsError

RECIPE_PLACES = {
    "dataset.source": {},
    "model.path": {},
    "model.chat_template": {},
    "contrast.positive_model": {"contrast.method": "given"},
    "contrast.negative_model": {"contrast.method": "given"},
    "score.python": {},
    "contrast.python": {},
    "attribute.python": {},
    "contrast.train.main_address": {"contrast.train.num_machines": 2},
    "score.ray_address": {},
    "store.uri": {},
}
"""Keys that name a place, and what each needs beside it."""
ADDRESSES = {"contrast.train.main_address": "elsewhere:29500", "score.ray_address": "ray://elsewhere:10001"}
CONFIG_PLACES = {"data.store", "data.cache_folder", "model.path", "output.folder"}
NO_PLACES = {
    "dataset": "name config data_dir split split_column revision prompt_column input_column system_column chosen_column "
    "rejected_column completion_column label_column chosen_score_column rejected_score_column chosen_weights_column "
    "rejected_weights_column pair_weight_column unprinted_keys transcript",
    "model": "revision template_date",
    "contrast": "positive_prompt positive_revision negative_prompt negative_revision weights split",
    "contrast.train.lora": "target_modules",
    "weights": "name members",
    "schedule": "cron timezone",
    "data": "weights split",
    "lora": "target_modules",
    "eval": "split",
    "output": "report_to",
}
"""Texts that name none: names in the store, columns, revisions, prompts. `data_dir` is a folder in `source`, see below."""


def free_texts(name, annotation):
    """Yield the keys below a section whose values are any text."""
    parts = [annotation, *get_args(annotation)]
    sections = [part for part in parts if hasattr(part, "model_fields")]
    for section in sections:
        for key, field in section.model_fields.items():
            yield from free_texts(f"{name}.{key}", field.annotation)
    if not sections and (str in parts or any(str in get_args(part) for part in parts)):
        yield name


@pytest.mark.parametrize(("model", "places"), [(Recipe, RECIPE_PLACES), (TrainConfig, CONFIG_PLACES)])
def test_every_text_in_the_settings_is_known_to_be_a_place_or_none(model, places):
    found = {key for name, field in model.model_fields.items() for key in free_texts(name, field.annotation)}
    others = {f"{section}.{key}" for section, keys in NO_PLACES.items() for key in keys.split()}
    assert set(places) <= found
    assert not found - set(places) - others, "look at each: does it name a place? Then check it, and add it here"


@pytest.mark.parametrize("key", RECIPE_PLACES)
def test_a_recipe_that_names_a_place_outside_is_refused(make_recipe, toy_model, tmp_path, monkeypatch, key):
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", os.pathsep.join([str(tmp_path), str(toy_model)]))
    make_recipe()
    place = ADDRESSES.get(key, "/etc/passwd")
    with pytest.raises(SettingsError, match=f"{key} (tcp://)?{place}.* the operator allows") as caught:
        make_recipe(**{**RECIPE_PLACES[key], key: place})
    assert "TOKENWEIGHTS_ALLOWED" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_home_folder_is_the_same_place_when_it_is_checked_and_when_it_is_read(make_recipe, tmp_path, monkeypatch):
    """A `~/..` that is checked as above the home folder, and read from a folder of that name, would lead out of the list."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = make_recipe(**{"dataset.source": "~/pairs.jsonl", "model.chat_template": "~/t.jinja", "model.path": "~/m"})
    assert recipe.dataset.source == str(tmp_path / "home/pairs.jsonl")
    assert recipe.model.chat_template == str(tmp_path / "home/t.jinja")
    assert recipe.model.path == str(tmp_path / "home/m")
    assert WeightStore("~/store").root.path == tmp_path / "home/store"


@pytest.mark.parametrize("data_dir", ["/etc", "../secret", "link"])
def test_a_folder_in_a_dataset_does_not_lead_out_of_it(make_recipe, toy_model, tmp_path, monkeypatch, data_dir):
    """`datasets` joins both, so an absolute one replaces the source."""
    for name in ("pairs/part", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pairs/link").symlink_to(tmp_path / "secret")
    allowed = [str(tmp_path / "pairs"), str(tmp_path / "store"), str(toy_model)]
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", os.pathsep.join(allowed))
    source = {"dataset.source": str(tmp_path / "pairs")}
    make_recipe(**source, **{"dataset.data_dir": "part"})
    with pytest.raises(SettingsError, match=r"dataset\.data_dir .* is outside of what the operator allows"):
        make_recipe(**source, **{"dataset.data_dir": data_dir})


def test_a_readme_of_a_dataset_names_no_file_outside(tmp_path, monkeypatch):
    (tmp_path / "pairs").mkdir()
    row = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    for name in ("pairs/own.jsonl", "secret.jsonl"):
        (tmp_path / name).write_text(row)
    dataset = DatasetSection(name="toy", source=str(tmp_path / "pairs"))
    readme = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    (tmp_path / "pairs/README.md").write_text(readme.format("own.jsonl"))
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", str(tmp_path / "pairs"))
    assert open_source(dataset).name == dataset.source
    (tmp_path / "pairs/README.md").write_text(readme.format(tmp_path / "secret.jsonl"))
    with pytest.raises(InputError, match=r"a file of dataset\.source .*/pairs, .*/secret\.jsonl is outside of what"):
        open_source(dataset)


def test_machines_meet_only_where_the_operator_allows(monkeypatch):
    """Whoever answers there tells the processes of a training what to run: pickles, as torch.distributed sends objects."""
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", "/data:tcp://head:29500")
    assert Launch(num_machines=2, main_address="head:29500").address == "head:29500"
    with pytest.raises(ValidationError, match="main_address tcp://other:29500 is outside of what the operator allows"):
        Launch(num_machines=2, main_address="other:29500")
    monkeypatch.setenv("MASTER_ADDR", "other")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert Launch(num_machines=2).address == "other:29500"  # the environment is the operator's


def test_hub_ids_and_object_stores_have_to_be_allowed_by_name(make_recipe, tmp_path, monkeypatch):
    hub = {"model.path": "owner/model", "dataset.source": "owner/pairs", "store.uri": "s3://bucket/team/store"}
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", f"{tmp_path}:hf://owner:hf://datasets/owner:s3://bucket/team")
    assert make_recipe(**hub).model.path == "owner/model"
    for key, other in {
        "model.path": "other/model",
        "dataset.source": "other/pairs",
        "store.uri": "s3://bucket",
    }.items():
        with pytest.raises(SettingsError, match=f"{key} {other}.* is outside of what the operator allows"):
            make_recipe(**{**hub, key: other})


def test_the_base_of_an_adapter_must_be_allowed_too(toy_model, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(toy_model)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=f"adapter {adapter}: base_model_name_or_path {toy_model} is outside"):
        resolve_path(str(adapter), None, "model.path")


@pytest.fixture
def config_with(tmp_path):
    """Return a function that loads a training config as `tokenweights train` does, with one key replaced."""

    def load(key, value):
        keys = {name: str(tmp_path / "x") for name in CONFIG_PLACES} | {"data.weights": "toy/ones", key: value}
        others = ["loss.name=tis_dpo", "loss.beta=0.1", "optim.learning_rate=1e-6"]
        options = [f"--set={name}={value}" for name, value in keys.items()] + [f"--set={text}" for text in others]
        return load_config(build_parser().parse_args(options))

    return load


@pytest.mark.parametrize("key", sorted(CONFIG_PLACES))
def test_a_training_config_that_names_a_place_outside_is_refused(config_with, tmp_path, monkeypatch, key):
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", str(tmp_path))
    config_with(key, str(tmp_path / "y"))
    with pytest.raises(InputError, match=f"{key} /etc/x is outside of what the operator allows: {tmp_path}; change it"):
        config_with(key, "/etc/x")
    monkeypatch.setenv("TOKENWEIGHTS_CHILD", "1")
    config_with(key, "/etc/x")  # a build has checked what it was given, and trains in caches too


def test_the_operator_chooses_interpreters_and_store_for_recipes_that_name_none(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENWEIGHTS_SCORE_PYTHON", "/envs/score/bin/python")
    monkeypatch.setenv("TOKENWEIGHTS_TRAIN_PYTHON", "/envs/train/bin/python")
    monkeypatch.setenv("TOKENWEIGHTS_STORE", "s3://bucket/store")
    recipe = make_recipe(**{"attribute.python": "/own/python", "store": {}})
    assert recipe.store.uri == "s3://bucket/store"
    assert recipe.score.python == "/envs/score/bin/python"
    assert recipe.contrast.python == "/envs/train/bin/python"
    assert recipe.attribute.python == "/own/python"
