"""What README, CONTRIBUTING and docs/ tell people to type.

Every command parses, every path, link and import exists. Quick commands and blocks run as written, in a folder with a small
store in `stores/default`. The blocks of docs/polars.md and docs/readers.md have tests of their own, with their results.
"""

import ast
import importlib
import re
import runpy
import shlex
import tomllib
from argparse import ArgumentParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

import tokenweights

REPO = Path(__file__).resolve().parent.parent
PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    REPO / "benchmarks/results/README.md",
    *sorted(REPO.glob("docs/*.md")),
]
FOLDERS = "benchmarks|docker|docs|flows|pipeline|recipes|requirements|tests|train|weights_store"
MADE_UP = {"recipes/big.toml"}

NOT_RUN = {
    "build": "scores and trains for minutes",
    "plan": "reads ../shared, which is not part of the project",
    "check-scorer": "starts vLLM",
    "check-prompts": "starts vLLM",
    "train": "loads torch and a model",
    "plot": "needs the folders of two trainings",
    "serve": "runs until it is stopped",
    "status": "needs a server",
    "doctor-env": "needs the environments that the page has just made",
}
"""Commands of ours that the docs show and this file only parses."""
OTHER_PROGRAMS = {
    "make": "make test runs this file",
    "pip": "needs the package index",
    "hf": "logs in to the hub",
    "torchrun": "trains",
    "accelerate": "trains",
    "prefect": "needs a server",
    "ray": "needs machines",
    "export": "sets credentials",
    "python3": "makes an environment",
    "docker": "needs Docker",
    "docker/make-secrets.sh": "tests/docker runs it",
    "kubectl": "needs Kubernetes",
    "helm": "needs Kubernetes",
}
ELSEWHERE = {"s3://bucket/weights", "owner/hh-harmless-head", "owner/hh-policy"}
"""Places on the network: commands with one of them are only parsed."""
SLOW_BLOCKS = {"make_chat_model": "trains a model", "WeightedDPOTrainer": "trains", "train.job": "trains"}
"""Words of Python blocks that are not run: only their imports are tried."""
OWN_TESTS = ("polars", "readers")
"""Pages whose blocks build on each other: tests/weights_store runs them."""
BY_HAND = {"daft", "duckdb_extension_delta", "pyspark"}
"""Packages that docs/readers.md was run with by hand; the environment of the tests does not have them."""


def pages_text():
    return {page: page.read_text(encoding="utf-8") for page in PAGES}


def shell_commands():
    """Yield every command of the ```console blocks as its words, in the order of the pages."""
    for page, text in pages_text().items():
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
            for command in re.findall(r"^\$ ((?:.*\\\n)*.*)$", block, re.MULTILINE):
                words = shlex.split(command.replace("\\\n", " "), comments=True)
                words = words[: words.index(">")] if ">" in words else words
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")


def our_commands():
    """Yield the arguments of `tokenweights` and of `torchrun … -m tokenweights`."""
    for command in shell_commands():
        (words,) = command.values
        if words[0] in ("tokenweights", "torchrun", "accelerate"):
            yield pytest.param(words[words.index("tokenweights") + 1 :], id=command.id)


def python_blocks():
    for page, text in pages_text().items():
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            yield pytest.param(block, id=f"{page.stem}: block {number}")


def inline_code():
    """Yield every page and `text` in backticks outside of blocks."""
    for page, text in pages_text().items():
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            yield page, code


# --- commands ----------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Ends a command once its arguments are parsed."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that parses the arguments of `tokenweights` and runs nothing."""
    original = ArgumentParser.parse_args

    def parse_args(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)

    def run(arguments):
        try:
            return tokenweights.main(arguments)
        except Parsed:
            return 0
        except SystemExit as leaving:  # --version and --help, or wrong usage
            return leaving.code or 0

    return run


@pytest.mark.parametrize("arguments", list(our_commands()))
def test_our_commands_parse(parse, arguments, capsys):
    assert parse(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize("arguments", list(our_commands()))
def test_recipes_that_commands_name_load_with_the_keys_that_they_set(arguments, monkeypatch):
    from pipeline.recipe import load_recipe
    from train.config import TrainConfig
    from weights_store.settings import apply_overrides, kind_of, load_toml, parse_settings

    monkeypatch.chdir(REPO)
    overrides = [after for word, after in pairwise(arguments) if word == "--set"]
    for recipe in [word for word in arguments if word.endswith(".toml") and word not in MADE_UP]:
        if arguments[0] == "train" or (arguments[0] == "serve" and kind_of(load_toml(recipe)).command == "train"):
            parse_settings(TrainConfig, apply_overrides(load_toml(recipe), overrides), recipe)
        else:
            load_recipe(recipe, overrides)


def test_commands_in_running_text_parse(parse, capsys):
    for page, code in inline_code():
        if code.startswith("tokenweights ") and not re.search(r"[A-Z…]", code):  # no NAME, no SHELL, nothing left out
            name = shlex.split(code)[1]
            assert parse([name] if name.startswith("-") else [name, "--help"]) == 0, f"{page.name}: {code}"


@pytest.mark.parametrize("words", list(shell_commands()))
def test_every_command_is_run_here_or_has_a_reason_why_not(words):
    assert words[0] == "tokenweights" or words[0] in OTHER_PROGRAMS


def test_make_targets_and_extras_exist():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page, text in pages_text().items():
        for target in re.findall(r"(?:^\$ |`)make ([a-z-]+)(?!…)\b", text, re.MULTILINE):
            assert target in targets or target == "bench-", f"{page.name}: make {target}"
        for names in re.findall(r"tokenweights\[([a-z,-]+)\]", text):
            assert set(names.split(",")) <= set(extras), f"{page.name}: [{names}]"


# --- what is run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the small store of tests/weights_store in `stores/default`."""
    folder = tmp_path_factory.mktemp("docs")
    made = runpy.run_path(str(REPO / "tests" / "weights_store" / "conftest.py"))
    made["add_head"](made["add_ti"](made["build_small_store"](folder / "stores" / "default")))
    return folder


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def quick_commands():
    for command in our_commands():
        (arguments,) = command.values
        if arguments[0] not in NOT_RUN and not ELSEWHERE & set(arguments):
            yield command


@pytest.mark.parametrize("arguments", list(quick_commands()))
@pytest.mark.usefixtures("in_folder")
def test_quick_commands_run_as_written(arguments, capsys):
    try:
        code = tokenweights.main(arguments)
    except SystemExit as leaving:  # --version
        code = leaving.code or 0
    streams = capsys.readouterr()
    assert code == 0, streams.err
    assert streams.out


@pytest.mark.parametrize("block", list(python_blocks()))
def test_imports_of_python_blocks_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            if node.module.partition(".")[0] in BY_HAND:
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Import):
            assert all(alias.name in BY_HAND or find_spec(alias.name) for alias in node.names)


def quick_blocks():
    for block in python_blocks():
        (code,) = block.values
        if not block.id.startswith(OWN_TESTS) and not any(word in code for word in SLOW_BLOCKS):
            yield block


@pytest.mark.parametrize("block", list(quick_blocks()))
@pytest.mark.usefixtures("in_folder")
def test_quick_python_blocks_run_as_written(block):
    exec(compile(block, "a block of the docs", "exec"), {})


# --- paths and links ---------------------------------------------------------------------------------------------------


def test_paths_of_the_project_exist():
    path = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w(?![\w/*…<]|\.\.)")
    named = [(page.name, found) for page, code in inline_code() for found in path.findall(code)]
    assert len(named) > 20
    missing = [(page, name) for page, name in named if name not in MADE_UP and not (REPO / name).exists()]
    assert not missing


def test_modules_that_are_started_exist():
    modules = {name for _, code in inline_code() for name in re.findall(r"-m ([\w.]+)", code)}
    assert modules
    assert all(find_spec(name) for name in modules)


def test_folders_of_the_readme_exist():
    (tree,) = re.findall(r"```\n(tokenweights\.py.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    above = REPO
    for line in tree.splitlines():
        names = re.match(r" *((?:[\w./]+ )+)", line + "  ").group(1).split()
        if not line.startswith(" "):
            above = REPO / names[0]
        for name in names:
            assert (above / name if line.startswith(" ") else REPO / name).exists(), line


def test_links_lead_to_files_and_headings():
    for page, text in pages_text().items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            file, _, heading = target.partition("#")
            other = (page.parent / file).resolve() if file else page
            assert other.exists(), f"{page.name}: {target}"
            if heading:
                assert heading in headings(other), f"{page.name}: {target}"


def headings(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
