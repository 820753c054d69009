"""Every command with the wrong inputs that people give: one line that says what is wrong, no traceback, nothing written."""

from pathlib import Path

import pytest

import tokenweights
from weights_store.errors import InputError

REPO = Path(__file__).resolve().parent.parent
RECIPE = str(REPO / "recipes" / "hh_harmless.toml")
STORE_COMMANDS = (
    ["ls"],
    ["show", "a/b"],
    ["history", "a/b"],
    ["lineage", "a/b"],
    ["diff", "a/b", "a/c"],
    ["export", "a/b", "exported"],
    ["verify"],
    ["vacuum"],
    ["optimize", "a/b"],
    [
        *("train", "--dry-run", "--weights", "a/b", "--model", "x", "--output", "out"),
        *("--set=loss.name=sft", "--set=optim.learning_rate=1e-4"),
    ],
)
STORES = {
    "none": "no store at none|no table weights/a/b in none",
    "file": "no store at file|no table weights/a/b in file|file is not a folder",
    "file/x": "no store at file/x|no table weights/a/b in file/x|file is not a folder",
    "empty": "no store at empty|no table weights/a/b in empty",
    "": "store URI is empty",
    "s3:/x": "a store cannot be at s3:/…",
    "http://x/y": "a store cannot be at http://…",
    "a\0b": "it has a zero byte",
}
SETTINGS = {
    "dataset": "expected section.key=value",
    "dataset.name": "expected section.key=value",
    "=x": "expected section.key=value",
    "a.b.c=1": "unknown section 'a'; expected one of dataset, model, ",
    "dataset.nme=x": "unknown key 'dataset.nme'; did you mean 'dataset.name'",
    "xyz.b=1": "unknown section 'xyz'; expected one of dataset, model, ",
    "model.path=": "model.path '' is empty; give a model folder or a hub id",
    "model.path=file": "model.path 'file' is a file; give a model folder or a hub id",
    "model.path=empty": "model.path empty has no config.json",
    "model.path=no/such/folder": "model.path no/such/folder does not exist",
    "weights.k=nan": "weights.k: Input should be a finite number, got nan",
    "weights.estimator=x": "weights.estimator: Input should be 'tis', ",
    "score.python=./file": "score.python ./file is no interpreter that can be run",
    "store.uri=": "store URI is empty",
    "store.uri=s3:bucket": "a store cannot be at s3:…",
    "store.uri=file": "a store cannot be at file: ",
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Return a function that runs a command in a folder with a file and an empty folder, and checks how it is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()

    def run(arguments, text):
        assert tokenweights.main(arguments) == 1
        streams = capsys.readouterr()
        assert streams.out == ""
        assert streams.err.startswith("error: ")
        assert streams.err.count("\n") == 1
        assert any(part in streams.err for part in text.split("|")), streams.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
        assert list((tmp_path / "empty").iterdir()) == []

    return run


@pytest.mark.parametrize("store", STORES, ids=repr)
@pytest.mark.parametrize("command", STORE_COMMANDS, ids=lambda command: command[0])
def test_a_wrong_store_is_one_line(refused, command, store):
    refused([*command, "--store", store], STORES[store])


@pytest.mark.parametrize("command", ["plan", "build", "check-scorer"])
@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_a_wrong_setting_is_one_line(refused, command, setting):
    if command == "check-scorer" and setting.startswith(("score", "store")):
        return  # it starts its interpreter later, and writes into no store
    refused([command, RECIPE, "--set", setting], SETTINGS[setting])


@pytest.mark.parametrize("command", ["plan", "build", "check-scorer", "serve", "train"])
@pytest.mark.parametrize("path", ["none.toml", "empty", "file", ""], ids=repr)
def test_a_wrong_settings_file_is_one_line(refused, command, path):
    text = "file is not valid TOML" if path == "file" else "no settings file at "
    if (command, path) == ("train", ""):
        text = "flags: missing key 'data'"
    refused([command, path], text)


def test_wrong_names_of_outputs_are_one_line(refused):
    refused(["demo", "--folder", "file"], "file: File exists")
    refused(["demo", "--folder", "file/x"], "file/x: Not a directory")


@pytest.mark.parametrize("content", ["{}", "no JSON", ""], ids=repr)
def test_a_damaged_tokenizer_of_an_export_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/tokenizer.json is damaged: .*; copy it from the model again$"):
        tokenweights._load_tokenizer(str(tmp_path))
