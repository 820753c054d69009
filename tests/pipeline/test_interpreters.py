"""`tokenweights doctor-env`: what the interpreters of a build have and lack, seen as a stage would start them."""

import re
import sys

import pytest

import tokenweights
from flows.environments import environment_rows
from pipeline.interpreters import Fact, Interpreter, interpreters_of, look_at


def by_what(facts):
    return {fact.what: fact for fact in facts}


def test_an_environment_of_the_base_lacks_the_packages_of_a_scorer_and_runs_our_code(light_install):
    python = str(light_install())
    facts = by_what(look_at(Interpreter(python, ["score.python"], ["score"])))
    assert facts["polars"].found == "2.1.0"
    assert not facts["polars"].problem
    assert facts["vllm"] == Fact("vllm", "missing", "<0.34,>=0.32", f"{python}: {SCORER}")
    assert facts["import vllm"].problem == "ModuleNotFoundError: No module named 'vllm'"
    assert facts["import pipeline.workers.process"].problem == "ModuleNotFoundError: No module named 'pydantic'"
    assert facts["GPU"].found == "none"


SCORER = "pip install 'tokenweights[score]' (GPU) or 'tokenweights[score-cpu]'"


def test_a_version_out_of_bounds_is_a_problem(light_install, monkeypatch):
    bounds = ["polars>=99", "pydantic>=2.10; extra == 'train'", "numpy"]
    monkeypatch.setattr("pipeline.interpreters.requires", lambda name: bounds)
    monkeypatch.setattr("pipeline.interpreters._IMPORTS", {"train": ()})
    facts = by_what(look_at(Interpreter(str(light_install()), ["contrast.python"], ["train"])))
    assert (facts["polars"].found, facts["polars"].expected) == ("2.1.0", ">=99")
    assert facts["polars"].problem.endswith("bin/python: pip install 'tokenweights[train]'")
    assert facts["pydantic"].found == "missing"
    assert not facts["numpy"].problem


@pytest.mark.parametrize(
    ("text", "what", "problem"),
    [
        ("echo Python 3.9.2", "Python", "score.python {} is Python 3.9.2; give the path of a Python 3.11 or newer"),
        (f'[ "$1" = -I ] && exec "{sys.executable}" "$@"; kill -ILL $$', "our code", "was killed by signal 4"),
    ],
)
def test_an_interpreter_that_cannot_run_our_code_has_one_line(tmp_path, text, what, problem):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{text}\n")
    python.chmod(0o755)
    last = look_at(Interpreter(str(python), ["score.python"], ["score"]))[-1]
    assert last.what == what
    assert problem.format(python) in last.problem


def test_each_interpreter_of_a_recipe_is_looked_at_once_for_all_that_it_runs(make_recipe):
    others = {"score.python": "/score/python", "contrast.python": "/torch/python", "attribute.python": "/torch/python"}
    own, score, torch = interpreters_of(make_recipe(**others, **{"score.executor": "ray"}))
    assert (own.path, own.extras) == (sys.executable, ["flows"])
    assert (score.path, score.uses, score.extras) == ("/score/python", ["score.python"], ["score", "ray"])
    assert (torch.path, torch.uses, torch.extras) == ("/torch/python", ["contrast.python"], ["train"])
    (only,) = interpreters_of(make_recipe())
    assert only.extras == ["flows", "score", "train"]
    (untrained,) = interpreters_of(make_recipe(**{"weights.name": "toy/ones", "weights.estimator": "uniform"}))
    assert untrained.extras == ["flows", "score"]


def test_the_command_prints_one_table_and_fails_on_a_problem(capsys, monkeypatch):
    monkeypatch.setattr("flows.environments._of_prefect", list)  # other tests may have a server
    monkeypatch.setattr("flows.environments.look_at", lambda one: [Fact("vllm", "missing", ">=0.32", "install it")])
    assert tokenweights.main(["doctor-env"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^this interpreter +path +/", out, re.MULTILINE)
    assert re.search(r"^this interpreter +vllm +missing +>=0\.32 +install it$", out, re.MULTILINE)
    assert err == "error: vllm: install it\n"
    monkeypatch.setattr("flows.environments.look_at", lambda one: [Fact("vllm", "0.32.0", ">=0.32")])
    assert tokenweights.main(["doctor-env"]) == 0


def test_a_server_that_does_not_answer_is_a_problem_without_its_password(monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr("flows.environments.look_at", lambda one: [])
    with temporary_settings({PREFECT_API_URL: "http://user:pass-word@127.0.0.1:9/api"}):
        row = environment_rows(None)[-1]
    assert row["found"] == "http://***@127.0.0.1:9/api does not answer"
    assert "PREFECT_API_URL" in row["problem"]
    assert "pass-word" not in str(row)
