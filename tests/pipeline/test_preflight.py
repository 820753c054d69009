"""What a build needs is looked at before anything starts, by `plan`, by `build` and by the runs of a deployment."""

import re
import shutil
import sys

import pyarrow as pa
import pytest

from flows.build import find_model
from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.preflight import check_inputs
from weights_store import WeightStore
from weights_store.errors import InputError, SettingsError, StoreError
from weights_store.fingerprint import fingerprint_model
from weights_store.schemas import WEIGHTS


@pytest.fixture
def recipe_with(make_recipe, toy_pairs, write_jsonl, tmp_path):
    """Return a function that makes a recipe with usable pairs."""
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:2])
    return make_recipe


@pytest.fixture
def model(toy_model, tmp_path):
    return shutil.copytree(toy_model, tmp_path / "model")


def refused(recipe, kind, text):
    """Check that every way to start refuses a recipe in the same words."""
    starts = (check_inputs, lambda recipe: check_inputs(recipe, only_plan=True), find_model.fn)
    said = set()
    for start in starts:
        with pytest.raises(kind) as caught:
            start(recipe)
        said.add(str(caught.value))
    (only,) = said
    assert text in only
    assert "\n" not in only


def test_a_recipe_that_can_be_built_gives_the_folder_of_its_model(recipe_with, toy_model, tmp_path):
    assert check_inputs(recipe_with()) == toy_model
    assert find_model.fn(recipe_with()) == toy_model
    assert not (tmp_path / "store").exists()


# --- interpreters ------------------------------------------------------------------------------------------------------


SECTIONS = pytest.mark.parametrize("section", ["score", "contrast", "attribute"])


def script(tmp_path, text):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@SECTIONS
def test_an_interpreter_may_stand_behind_a_script(recipe_with, tmp_path, section):
    check_inputs(recipe_with(**{f"{section}.python": script(tmp_path, f'exec "{sys.executable}" "$@"')}))


@SECTIONS
def test_an_interpreter_that_is_not_there_is_named(recipe_with, tmp_path, section):
    text = f"{section}.python {tmp_path}/python is no interpreter that can be run"
    refused(recipe_with(**{f"{section}.python": str(tmp_path / "python")}), InputError, text)


@SECTIONS
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo Python 3.9", "is Python 3.9; give the path of a Python 3.11 or newer"),
        ("echo Python 2.7", "is Python 2.7; give"),
        ("echo no such module >&2; exit 3", "is no Python: it ended with code 3 and said no such module; give"),
        ("true", "is no Python: it ended with code 0 and said nothing; give"),
    ],
)
def test_an_interpreter_that_cannot_run_our_code_is_named(recipe_with, tmp_path, section, text, problem):
    python = script(tmp_path, text)
    refused(recipe_with(**{f"{section}.python": python}), InputError, f"{section}.python {python} {problem}")


def test_a_file_that_is_no_program_is_no_interpreter(recipe_with, tmp_path):
    path = tmp_path / "python"
    path.write_bytes(b"\x7fELF but nothing else")
    path.chmod(0o755)
    refused(
        recipe_with(**{"score.python": str(path)}), InputError, f"score.python {path} is no interpreter that can be"
    )


# --- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (
            "model.safetensors",
            lambda data: data[: len(data) // 2],
            r"model\.safetensors is not whole: its header says ",
        ),
        (
            "model.safetensors",
            lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n",
            r"model\.safetensors is a git-LFS pointer to a file of 7 bytes, not that file; run `git lfs pull`",
        ),
        ("config.json", lambda data: data[:20], r"config\.json is not valid JSON: "),
        ("config.json", lambda _: b"[]", r"config\.json: expected a JSON object, got a list"),
        ("tokenizer.json", lambda data: data[:100], r"tokenizer\.json is not valid JSON: "),
        ("tokenizer.json", lambda _: b"\xff\xfe", r"tokenizer\.json is not valid JSON: "),
    ],
)
def test_files_of_a_model_that_are_damaged_are_named(recipe_with, model, name, change, problem):
    (model / name).write_bytes(change((model / name).read_bytes()))
    recipe = recipe_with(**{"model.path": str(model)})
    for only_plan in (True, False):
        with pytest.raises(InputError) as caught:
            check_inputs(recipe, only_plan=only_plan)
        assert re.search(rf"{model}/{problem}", str(caught.value))


def test_a_model_without_weights_is_refused(recipe_with, model):
    (model / "model.safetensors").unlink()
    refused(recipe_with(**{"model.path": str(model)}), InputError, f"model.path: no weight files in {model}; expected ")


# --- the contrastive pair ----------------------------------------------------------------------------------------------


def test_a_given_model_that_is_not_there_is_refused_if_the_weights_read_a_pair(recipe_with, tmp_path):
    given = {"contrast.method": "given", "contrast.negative_model": f"{tmp_path}/nowhere"}
    refused(
        recipe_with(**given), InputError, f"contrast.negative_model {tmp_path}/nowhere does not exist; give a model"
    )
    check_inputs(recipe_with(**given, **{"weights.name": "toy/ones", "weights.estimator": "uniform"}))


def test_other_pairs_that_are_not_built_are_refused_with_how_to_build_them(recipe_with):
    recipe = recipe_with(**{"contrast.weights": "more/uniform"})
    text = "contrast.weights more/uniform: no store at"
    refused(recipe, InputError, text)
    refused(
        recipe, InputError, 'a recipe for the other pairs with weights.name = "more/uniform" and weights.estimator ='
    )


@pytest.mark.parametrize("what", ["tokenizer and chat template", "reference model"])
def test_other_pairs_of_another_model_are_refused(recipe_with, toy_model, tmp_path, what):
    made_with = {
        "tokenizer": {"rendering": ChatTokenizer(toy_model).rendering_fingerprint},
        "reference": {"model_fingerprint": fingerprint_model(toy_model)},
    }
    other = WeightStore(tmp_path / "store").table("weights/more/uniform")
    other.append(pa.Table.from_pylist([], WEIGHTS), {"fingerprint": "x", **made_with})
    check_inputs(recipe_with(**{"contrast.weights": "more/uniform"}))
    made_with["tokenizer" if what.startswith("tokenizer") else "reference"] = {}
    other.replace(pa.Table.from_pylist([], WEIGHTS), {"fingerprint": "y", **made_with})
    text = f"has another {what} than {toy_model}: recorded is nothing, expected "
    refused(recipe_with(**{"contrast.weights": "more/uniform"}), InputError, text)
    check_inputs(recipe_with(**{"contrast.weights": "more/uniform@0"}))


def test_other_rows_that_cannot_train_the_two_models_are_refused(recipe_with, toy_model, tmp_path):
    made_with = {
        "tokenizer": {"rendering": ChatTokenizer(toy_model).rendering_fingerprint},
        "reference": {"model_fingerprint": fingerprint_model(toy_model)},
        "statistics": {"num_unpaired_rows": 5, "chosen": {"num_responses": 5}, "rejected": {"num_responses": 0}},
    }
    other = WeightStore(tmp_path / "store").table("weights/more/uniform")
    other.append(pa.Table.from_pylist([], WEIGHTS), {"fingerprint": "x", **made_with})
    text = "contrast.method 'dpo' trains on pairs, and 5 rows of "
    refused(recipe_with(**{"contrast.weights": "more/uniform"}), InputError, text)
    by_sft = {"contrast.weights": "more/uniform", "contrast.method": "sft"}
    refused(recipe_with(**by_sft), InputError, "weights/more/uniform@0 has no undesirable ones: set contrast.method to")
    made_with["statistics"]["rejected"]["num_responses"] = 3
    other.replace(pa.Table.from_pylist([], WEIGHTS), {"fingerprint": "y", **made_with})
    check_inputs(recipe_with(**by_sft))


# --- the store ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/x/y"])
def test_a_store_that_is_a_file_is_refused(recipe_with, tmp_path, below):
    (tmp_path / "file").write_text("x")
    text = f"a store cannot be at {tmp_path}/file{below}: {tmp_path}/file is not a folder"
    refused(recipe_with(**{"store.uri": f"{tmp_path}/file{below}"}), StoreError, text)


def test_a_mistyped_scheme_is_refused_and_leaves_no_folder(recipe_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        recipe_with(**{"store.uri": "s3:/bucket/x"}), SettingsError, "a store cannot be at s3:/…: expected a folder"
    )
    assert not (tmp_path / "s3:").exists()


def test_a_store_that_cannot_be_written_is_refused_by_a_build_and_a_warning_of_a_plan(recipe_with, disk, logged):
    folder, remount = disk
    remount("ro")
    recipe = recipe_with(**{"store.uri": str(folder / "store")})
    problem = f"the store {folder}/store cannot be written: no permission for {folder}, or its file system is read-only"
    with pytest.raises(StoreError, match=re.escape(f"{problem}; change store.uri or give --store")):
        check_inputs(recipe)
    assert logged.lines == []
    check_inputs(recipe, only_plan=True)
    assert logged.lines == [f"{problem}; a build from here would fail"]
