import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from weights_store.fingerprint import fingerprint_tokenizer
from weights_store.inspection.model_tokenizer import tokenizer_folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    Tokenizer(WordLevel({"Yes": 0}, unk_token="Yes")).save(str(folder / "tokenizer.json"))
    return folder


def metadata(folder, fingerprint=None):
    recorded = {"fingerprint": fingerprint or fingerprint_tokenizer(folder), "eos_token_id": 0}
    return {"tokenizer": recorded, "recipe": {"model": {"path": str(folder)}}}


def test_the_recipes_model_is_used_if_its_tokenizer_made_the_ids(folder):
    assert tokenizer_folder(metadata(folder), None) == (str(folder), None)


def test_a_home_folder_in_a_recipe_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    made = metadata(folder)
    made["recipe"]["model"]["path"] = "~/model"
    assert tokenizer_folder(made, None) == (str(folder), None)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_model_of_the_hub_is_found_in_the_hubs_cache(folder, tmp_path, monkeypatch, revision):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--owner--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / (revision or "main")).write_text("5" * 40)
    made = metadata(folder)
    made["recipe"]["model"] = {"path": "owner/model", "revision": revision}
    assert tokenizer_folder(made, None)[0] is None
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / ("5" * 40))
    assert tokenizer_folder(made, None) == (str(cached / "snapshots" / ("5" * 40)), None)


def test_another_tokenizer_in_its_place_is_not_used(folder):
    made = metadata(folder)
    Tokenizer(WordLevel({"No": 0}, unk_token="No")).save(str(folder / "tokenizer.json"))
    used, note = tokenizer_folder(made, None)
    assert used is None
    assert note.startswith(
        f"ids instead of texts: the tokenizer in {folder} is not the one that made the ids; --tokenizer"
    )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (
            {"recipe": {"model": {"path": "some/hub-id"}}},
            "some/hub-id, the recipe's model, is not here with a tokenizer.json",
        ),
        ({"recipe": {"model": {"path": "/no/such/folder"}}}, "/no/such/folder, the recipe's model, is not here"),
        ({"recipe": {"model": {"path": "~nobody-here/x"}}}, "~nobody-here/x, the recipe's model, is not here"),
        ({"tokenizer": {"eos_token_id": 0}}, "the store recorded no tokenizer"),
        ({"tokenizer": None, "recipe": {}}, "the store recorded no tokenizer"),
    ],
)
def test_without_one_that_fits_a_line_says_how_to_get_texts(folder, changed, problem):
    used, note = tokenizer_folder({**metadata(folder), **changed}, None)
    assert used is None
    assert problem in note
    assert "--tokenizer FOLDER" in note


def test_a_given_tokenizer_is_used_and_doubts_are_told(folder):
    assert tokenizer_folder(metadata(folder), str(folder)) == (str(folder), None)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    used, note = tokenizer_folder(metadata(folder, "0" * 64), str(folder))
    assert used == str(folder)
    assert note.startswith(
        f"the tokenizer in {folder} is not the one that the store recorded, or its chat template has"
    )
    assert note.endswith("texts may be wrong")


def test_a_given_folder_without_a_tokenizer_is_left_to_whoever_loads_it(folder, tmp_path):
    assert tokenizer_folder(metadata(folder), str(tmp_path)) == (str(tmp_path), None)
