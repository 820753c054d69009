"""The command as a person meets it: wrong inputs give one line and exit code 1, wrong usage 2."""

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

import tokenweights
from weights_store.errors import MissingExtraError, TokenweightsError

REPO = Path(__file__).resolve().parent.parent
RECIPE = str(REPO / "recipes" / "hh_harmless_paper.toml")


@pytest.fixture
def command(capsys):
    def run(*arguments):
        try:
            code = tokenweights.main(arguments)
        except SystemExit as exit_:  # argparse
            code = exit_.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def with_recipe(command, toy_model, toy_pairs, tmp_path, write_jsonl):
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:3])

    def run(name, *overrides, extra=()):
        settings = [f"dataset.source={tmp_path / 'pairs.jsonl'}", f"model.path={toy_model}", *overrides]
        flags = [flag for setting in settings for flag in ("--set", setting)]
        return command(name, RECIPE, "--store", str(tmp_path / "store"), *flags, *extra)

    return run


@pytest.fixture
def build(with_recipe):
    return partial(with_recipe, "build")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/no/such/model"], "model.path /no/such/model does not exist; give a model folder or a hub id"),
        (["model.path=models/none"], "model.path 'models/none' is not a local folder, and it could not be downloaded"),
        (["dataset.source=data/nowhere.jsonl"], "dataset.source data/nowhere.jsonl does not exist"),
        (["dataset.source=nowhere.jsonl"], "dataset.source nowhere.jsonl does not exist"),
        (
            ["dataset.chosen_column=better"],
            "no column 'better'; it has prompt, chosen, rejected. Set dataset.chosen_column",
        ),
        (["dataset.sorce=x"], "unknown key 'dataset.sorce'; did you mean 'dataset.source'?"),
        (["contrast.method=magic"], "contrast.method"),
        (["weights.name=../x"], "bad name '../x'"),
        (["model.chat_template=/no/such.jinja"], "model.chat_template /no/such.jinja cannot be read"),
        (["score.python=/no/such/python"], "score.python /no/such/python is no interpreter"),
        (["nonsense"], "expected section.key=value"),
    ],
)
def test_wrong_input_gives_one_line_and_no_traceback(build, tmp_path, overrides, message):
    code, out, err = build(*overrides)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "override",
    [
        "model.path=/no/such/model",
        "dataset.source=nowhere.jsonl",
        "dataset.chosen_column=better",
        "dataset.sorce=x",
        "score.python=/no/such/python",
    ],
)
def test_a_plan_refuses_what_a_build_refuses_in_the_same_words(with_recipe, tmp_path, override):
    planned, built = with_recipe("plan", override), with_recipe("build", override)
    assert planned == built
    assert (planned[0], planned[1], planned[2].count("\n")) == (1, "", 1)
    assert not (tmp_path / "store").exists()


def test_a_plan_says_what_a_build_would_do_and_leaves_no_store(with_recipe, tmp_path):
    code, out, err = with_recipe("plan")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"A build of hh-harmless/tis-dpo in {tmp_path / 'store'} would do this:"
    assert any(line.split()[:3] == ["prepare", "compute", "3"] for line in lines)
    assert lines[-1].startswith("total: 8 of 8 stages to compute")
    assert not (tmp_path / "store").exists()


def test_a_plan_as_json_has_an_object_for_each_stage(with_recipe):
    code, out, err = with_recipe("plan", extra=["--json"])
    assert (code, err) == (0, "")
    stages = json.loads(out)
    assert [stage["stage"] for stage in stages][::7] == ["prepare", "report"]
    assert {stage["action"] for stage in stages} == {"compute"}
    assert stages[0]["num_pairs"] == 3


def test_model_without_chat_template_gives_one_line(build, toy_model, tmp_path):
    import shutil

    bare = shutil.copytree(toy_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    code, _, err = build(f"model.path={bare}")
    assert code == 1
    assert err.count("\n") == 1
    assert "has no chat template; set model.chat_template" in err


def test_missing_extra_is_named():
    message = "needs the package 'no_such_package', which is not installed; pip install 'tokenweights[flows]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)), tokenweights.needs_extra("flows"):
        import no_such_package  # noqa: F401


def test_a_missing_module_of_ours_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="flows.no_such_module"), tokenweights.needs_extra("flows"):
        import flows.no_such_module  # noqa: F401


def test_a_store_that_is_a_file_gives_one_line(command, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = command("ls", "--store", str(tmp_path / "file"))
    assert (code, err.count("\n")) == (1, 1)


def test_debug_shows_the_traceback(build):
    with pytest.raises(TokenweightsError, match="does not exist"):
        build("model.path=/no/such/model", extra=["--debug"])


def test_wrong_usage_is_exit_code_2(command):
    assert command("build")[0] == 2
    assert command("no-such-command")[0] == 2
    assert command()[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls",),
        ("show", "hh/tis-dpo"),
        ("show", "hh@x"),
        ("history", "hh/tis-dpo"),
        ("lineage", "hh/tis-dpo@3"),
        ("diff", "hh/tis-dpo", "hh/uniform"),
        ("export", "hh/tis-dpo", "out"),
        ("verify",),
        ("verify", "hh/tis-dpo"),
        ("vacuum",),
        ("optimize", "logps/hh/x"),
    ],
    ids=" ".join,
)
def test_commands_on_what_is_not_there_give_one_line(command, tmp_path, arguments):
    code, _, err = command(*arguments, "--store", str(tmp_path / "none"))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: ")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("diff", "hh/tis-dpo"),
        ("export", "hh/tis-dpo"),
        ("export", "a", "b", "--format", "csv"),
        ("optimize",),
        ("history",),
    ],
    ids=" ".join,
)
def test_wrong_usage_of_the_stores_commands_is_exit_code_2(command, arguments):
    assert command(*arguments)[0] == 2


def test_train_is_the_training_job(command, tmp_path):
    code, _, err = command(
        "train", "--store", str(tmp_path), "--weights", "x", "--model", "y", "--output", "z", "--set", "loss.nme=dpo"
    )
    assert code == 1
    assert "unknown key 'loss.nme'; did you mean 'loss.name'" in err


def test_serve_without_schedule_is_refused(command, tmp_path, toy_model):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"[dataset]\nname = 'x'\nsource = 'x.jsonl'\n[model]\npath = {json.dumps(str(toy_model))}\n[weights]\nname = 'x/y'\n"
    )
    code, _, err = command("serve", str(recipe))
    assert code == 1
    assert "has no schedule; add [schedule] with cron or interval_s" in err


def test_version_is_that_of_the_package(command):
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert command("--version") == (0, f"tokenweights {version}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tokenweights", "exp"], ["export"]),
        (["tokenweights", "check-scorer", "--role", ""], ["ref", "positive", "negative"]),
        (["tokenweights", "train", "--over"], ["--overwrite"]),  # of train/run.py's own parser
        (["tokenweights", "plan", "recipes/hh_rlhf"], ["recipes/hh_rlhf_hub.toml"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_bash_completes_commands_options_choices_and_files(command, tmp_path, words, expected):
    code, script, err = command("completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "script").write_text(script)
    line = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_tokenweights; '
    line += "printf '%s\\n' \"${COMPREPLY[@]}\""
    bash = ["bash", "-c", line, "bash", str(tmp_path / "script"), *words]
    assert subprocess.run(bash, cwd=REPO, capture_output=True, text=True).stdout.split() == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_too(command, shell):
    code, script, err = command("completion", shell)
    assert (code, err) == (0, "")
    assert "expect-same" in script


@pytest.mark.parametrize(
    "flags", [["-m", "tokenweights"], ["-P", "-m", "tokenweights"], [str(REPO / "tokenweights.py")]]
)
def test_a_users_own_files_are_not_imported(tmp_path, flags):
    for name in ("train", "flows", "pipeline", "weights_store", "argparse", "pathlib", "datasets", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, *flags, "train", "--store", str(tmp_path), "--weights", "x", "--set", "loss.nme=dpo"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean 'loss.name'" in done.stderr


@pytest.mark.parametrize("python_path", ["", ".", f"{os.pathsep}/their/own"])
def test_the_console_script_does_not_import_a_users_own_files(tmp_path, python_path):
    for name in ("train", "weights_store"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')\n")
    script = tmp_path / "bin" / "tokenweights"  # as pip writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom tokenweights import main\nsys.exit(main())\n")
    environment = {**os.environ, "PYTHONPATH": python_path}
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
