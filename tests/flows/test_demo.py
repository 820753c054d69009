"""The demo's recipe is a file that anybody can go on with. `test_build.py` runs the commands that the demo prints."""

import tomllib

import pytest

from flows.demo import check_language, next_commands, run_demo, write_recipe
from pipeline.recipe import load_recipe
from weights_store.errors import InputError
from weights_store.processes.lock import locked


@pytest.mark.parametrize("name", ["demo", 'a "quoted" folder', "пример"])
def test_the_recipe_leads_to_the_demos_files_from_the_folder_it_was_started_in(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path.joinpath(name).relative_to(tmp_path))
    recipe = load_recipe(file)
    assert str(file) == f"{name}/recipe.toml"
    assert recipe.dataset.source == f"{name}/pairs.jsonl"
    assert recipe.model.path == f"{name}/model"
    assert recipe.store.uri == f"{name}/store"
    assert (recipe.weights.estimator, recipe.weights.name) == ("head", "toy/head")


def test_the_recipe_is_written_again_each_time(tmp_path):
    file = write_recipe(tmp_path)
    before = file.read_text(encoding="utf-8")
    file.write_text("changed", encoding="utf-8")
    assert write_recipe(tmp_path).read_text(encoding="utf-8") == before
    assert before.startswith("# `tokenweights demo` writes this file each time it runs.")
    assert tomllib.loads(before)["weights"]["estimator"] == "head"


def test_the_next_commands_name_the_demos_files(tmp_path):
    file = write_recipe(tmp_path)
    commands = [" ".join(command) for _, command in next_commands(file, load_recipe(file))]
    assert commands == [
        f"tokenweights view toy/head --ansi --random 3 --store {tmp_path}/store",
        f"tokenweights build {file} --set weights.name=toy/stronger --set weights.spread=0.6",
        f"tokenweights train --store {tmp_path}/store --weights toy/head --model {tmp_path}/model "
        f"--output {tmp_path}/dpo --set loss.name=dpo --set loss.beta=0.1 --set optim.learning_rate=3e-4",
    ]


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path):
    with (
        locked(tmp_path / ".lock", pytest.fail),
        pytest.raises(
            InputError, match=rf"^process \d+ on \S+ runs a demo in {tmp_path}; wait until it is done, or give"
        ),
    ):
        run_demo(tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_was_made_of_another_language_is_not_used(tmp_path):
    check_language(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    check_language(tmp_path)
    (tmp_path / "language.json").write_text('{"temperature": 0.75}')
    with pytest.raises(
        InputError, match=rf"in {tmp_path} were made of another language .*; remove the folder {tmp_path},"
    ):
        check_language(tmp_path)
    (tmp_path / "language.json").unlink()  # as earlier versions left it
    with pytest.raises(InputError, match=r"language.json does not say .*\"contrary_topics\": 0"):
        check_language(tmp_path)
