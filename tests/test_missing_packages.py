"""Without one of the packages, each command does its work or says in one line what to install; no traceback.

One process for each package runs all commands; the import system of that process does not find the package.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest
from packaging.requirements import Requirement

from weights_store import WeightStore
from weights_store.fingerprint import fingerprint_tokenizer
from weights_store.packages import how_to_install
from weights_store.schemas import SIDES, WEIGHTS

REPO = Path(__file__).resolve().parent.parent
EXTRAS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGES = {
    extra: {Requirement(text).name for text in EXTRAS[extra]}
    for extra in ("flows", "train", "score", "ray", "trl", "hub")
}
TRANSITIVE = {"tokenizers", "safetensors", "tqdm"}
"""Needed through transformers, and imported by us too."""
NEEDED = {
    "plan": {"pydantic", "regex", "transformers", "jinja2", "datasets", *TRANSITIVE},
    "build": {"pydantic", "prefect", "regex"},
    "serve": {"pydantic", "regex"},
    "check-scorer": {"pydantic", "regex", "safetensors"},
    "train": {"pydantic", "torch", "transformers", "accelerate", *TRANSITIVE},
    "export": {"tokenizers"},
}
"""Without which packages each command cannot do what it does here."""
SCRIPT = """
import contextlib, io, json, sys, traceback
from importlib.machinery import PathFinder

missing = sys.argv[1]

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == missing else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import tokenweights

for name, arguments in json.loads(sys.stdin.read()).items():
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = tokenweights.main(arguments)
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps({"name": name, "code": code, "err": err.getvalue()}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory, toy_model):
    """A store with one weight dataset for the toy model."""
    store = WeightStore(tmp_path_factory.mktemp("missing") / "store")
    rows = [
        {"pair_id": name, "split": "train", "pair_weight": 1.0, "prompt_ids": [1, 5]}
        | {f"{side}_ids": [6, last] for side, last in zip(SIDES, (7, 8), strict=True)}
        | {f"{side}_{column}": [-1.0, -0.5] for side in SIDES for column in ("ref_logps", "token_weights")}
        for name in "abcd"
    ]
    vocab_size = json.loads((toy_model / "config.json").read_text())["vocab_size"]
    tokenizer = {"fingerprint": fingerprint_tokenizer(toy_model), "vocab_size": vocab_size, "eos_token_id": 2}
    metadata = {
        "fingerprint": "0" * 64,
        "tokenizer": tokenizer,
        "statistics": {"num_pairs": 4, "num_response_tokens": 16},
        "parents": [],
        "identity": {"settings": {"weights": {"estimator": "uniform"}, "contrast": {}}},
    }
    store.table("weights/toy/tis").append(pa.Table.from_pylist(rows, WEIGHTS), metadata)
    return store


@pytest.fixture(scope="module")
def commands(store, toy_model, toy_pairs):
    """Each command with its arguments."""
    folder = Path(str(store.root)).parent
    source = folder / "pairs"  # `datasets` finds the splits of a folder
    source.mkdir()
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_pairs[:3]))
    recipe = [str(REPO / "recipes" / "hh_harmless.toml"), "--store", str(folder / "new")]
    recipe += [f"--set=dataset.source={source}", f"--set=model.path={toy_model}"]
    train = [
        "train",
        "--dry-run",
        "--weights",
        "toy/tis",
        "--model",
        str(toy_model),
        "--output",
        str(folder / "policy"),
    ]
    train += ["--set=loss.name=dpo", "--set=loss.beta=0.1", "--set=optim.learning_rate=1e-4"]
    named = ["toy/tis", "--store", str(store.root)]
    return {
        "plan": ["plan", *recipe],
        "build": ["build", *recipe],
        "serve": ["serve", *recipe],
        "check-scorer": ["check-scorer", *recipe],
        "train": [*train, "--store", str(store.root)],
        "export": ["export", *named, str(folder / "exported"), "--tokenizer", str(toy_model)],
        "show": ["show", *named],
    }


@pytest.mark.slow
# Only [lora] and adapters as model.path need peft, and check it themselves; Prefect alone imports SQLAlchemy.
@pytest.mark.parametrize(
    "package", sorted({*PACKAGES["flows"], *PACKAGES["train"], *TRANSITIVE} - {"peft", "sqlalchemy"})
)
def test_every_command_names_the_extra_of_a_missing_package(commands, package):
    tried = {name: line for name, line in commands.items() if package in NEEDED.get(name, {package})}
    child = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, package],
        input=json.dumps(tried),
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    outcomes = {line["name"]: line for line in map(json.loads, child.stdout.splitlines())}
    assert list(outcomes) == list(tried)
    assert outcomes.pop("show")["code"] == 0  # the base is enough
    assert outcomes, "no command needs this package"
    for name, outcome in outcomes.items():
        err = outcome["err"]
        start = f"error: this command needs the package {package!r}, which is not installed; pip install "
        assert (outcome["code"], err[: len(start)], err.count("\n")) == (1, start, 1), f"{name}: {outcome}"
        extra = err.rpartition("tokenweights[")[2].partition("]")[0]
        assert package in PACKAGES[extra] | TRANSITIVE, f"{name}: {err}"


def test_every_package_of_an_extra_has_a_remedy_that_installs_it():
    for extra, packages in PACKAGES.items():
        for package in packages - {"tokenweights"}:
            remedy = how_to_install(package, extra)
            named = remedy.partition("tokenweights[")[2].partition("]")[0]
            assert package in PACKAGES[named], remedy
