"""Builds and trainings from a folder with a user's own `train.py`, `datasets/` and so on: none of these files is ever run.

Three builds share one store, so that the real engine starts once; the others score with a made-up engine.
"""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.pipeline import made_up_scorer
from weights_store import WeightStore

REPO = Path(__file__).resolve().parents[2]
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "tokenweights.py",
    "tokenweights_flows.py",
    "weights_store",
    "pipeline",
    "flows",
    "train",
)
SAFE, PLAIN = ["-P", "-m", "tokenweights"], ["-m", "tokenweights"]
TRAINING = {
    f"train.optim.{key}": value for key, value in {"max_steps": 1, "pairs_per_step": 4, "learning_rate": 1e-4}.items()
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_strangers):
    folder = tmp_path_factory.mktemp("strangers")
    make_strangers(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(folder, write_jsonl, toy_pairs):
    write_jsonl(folder / "pairs.jsonl", toy_pairs[:8])
    return folder / "pairs.jsonl"


def _run(folder, arguments, python=sys.executable):
    """Run the command in the folder, where relative paths start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def _recipe(folder, model, name, **sections):
    settings = {
        "dataset": {"name": "toy", "source": "pairs.jsonl"},
        "model": {"path": str(model)},
        "store": {"uri": "store"},
        "weights": {"name": f"toy/{name}", "estimator": "tis"},
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    lines = []
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / f"{name}.toml").write_text("\n".join(lines))
    return f"{name}.toml"


def _made_up(folder, python=sys.executable):
    """An interpreter for `score.python` that has the made-up engine."""
    path = folder / "made-up"
    path.write_text(f'#!/bin/sh\nexec "{python}" "{made_up_scorer.__file__}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def built(folder, pairs, toy_model):
    """The store of a build with construction P, scored by the real engine."""
    recipe = _recipe(folder, toy_model, "p", contrast={"method": "prompt"}, score={"kv_cache_gib": 1.0})
    _run(folder, [*SAFE, "build", recipe])
    return WeightStore(folder / "store")


def test_a_build_with_two_prompts_scores_with_the_real_engine(built):
    assert built.table("weights/toy/p").num_rows() == 8


def test_a_build_trains_with_sft_and_scores_in_another_interpreter(built, folder, toy_model):
    score = {"python": _made_up(folder)}
    recipe = _recipe(folder, toy_model, "s", contrast={"method": "sft", **TRAINING}, score=score)
    _run(folder, [*PLAIN, "build", recipe])
    assert built.table("weights/toy/s").num_rows() > 0


def test_a_build_trains_with_dpo_attributes_and_samples_anchors(built, folder, toy_model):
    recipe = _recipe(
        folder,
        toy_model,
        "d",
        contrast={"method": "dpo", **TRAINING},
        score={"python": _made_up(folder)},
        weights={"estimator": "ensemble", "members": ["tis", "ti"]},
        anchors={"max_new_tokens": 4},
    )
    _run(folder, [*SAFE, "build", recipe])
    assert built.table("weights/toy/d").num_rows() > 0
    assert [table.path.split("/")[0] for table in built.tables("anchors")] == ["anchors"]
    assert [table.path.split("/")[0] for table in built.tables("attributions")] == ["attributions"]


def _train(folder, model, output, flags=PLAIN, python=sys.executable):
    arguments = ["train", "--store", "store", "--weights", "toy/p@0", "--model", str(model), "--output", output]
    for setting in ('loss.name="tis_dpo"', "loss.beta=0.1", "optim.learning_rate=1e-4", "optim.max_steps=1"):
        arguments += ["--set", setting]
    _run(folder, [*flags, *arguments], python)
    assert (folder / output / "model.safetensors").exists()


def test_a_training_runs(built, folder, toy_model):
    _train(folder, toy_model, "policy")


# --- installed from a wheel --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The interpreter of an environment with our wheel and the packages of this one, but not this checkout."""
    root = tmp_path_factory.mktemp("wheel")
    (root / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copyfile
        copy(REPO / name, root / "source" / name)
    venv.create(root / "environment", symlinks=True)
    (site,) = (root / "environment" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(root / "source")]
    subprocess.run([*pip, *build], cwd=root, check=True, timeout=300)
    (wheel,) = root.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], cwd=root, check=True, timeout=300)
    return root / "environment" / "bin" / "python"


def test_an_installed_wheel_builds_and_trains(installed, built, folder, toy_model):
    where = _run(folder, ["-P", "-c", "import pipeline, train; print(pipeline.__file__, train.__file__)"], installed)
    assert str(REPO) not in where
    score = {"python": _made_up(folder, installed), "parity_pairs": 0}
    store = {"uri": "store-of-the-wheel"}
    recipe = _recipe(folder, toy_model, "w", contrast={"method": "prompt"}, score=score, store=store)
    _run(folder, [*SAFE, "build", recipe], installed)
    assert WeightStore(folder / "store-of-the-wheel").table("weights/toy/w").num_rows() > 0
    _train(folder, toy_model, "policy-of-the-wheel", SAFE, installed)
