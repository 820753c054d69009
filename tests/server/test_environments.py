"""The usual installation: Prefect in an environment of its own (`FLOWS_PYTHON`), scoring and training in this one.

Builds here have a Prefect server of their own, as from a terminal.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weights_store import WeightStore

REPO = Path(__file__).resolve().parents[2]
FLOWS_PYTHON = os.environ.get("FLOWS_PYTHON", sys.executable)
INTERPRETERS = [f"--set={section}.python={sys.executable}" for section in ("score", "contrast", "attribute")]


@pytest.fixture
def tokenweights(tmp_path, toy_model, toy_pairs, write_jsonl):
    """Return a function that runs a command on a recipe in the environment with Prefect."""
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:12])
    recipe = REPO / "recipes" / "hh_harmless.toml"
    settings = [
        f"--set=dataset.source={tmp_path}/pairs.jsonl",
        f"--set=model.path={toy_model}",
        "--set=score.kv_cache_gib=1.0",
    ]
    apart = {"PREFECT_API_URL", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    environment["PREFECT_HOME"] = str(tmp_path / "prefect")

    def run(command):
        line = [
            FLOWS_PYTHON,
            "-P",
            "-m",
            "tokenweights",
            command,
            recipe,
            *settings,
            *INTERPRETERS,
            f"--store={tmp_path}/store",
        ]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_a_build_prepares_here_and_scores_there(tokenweights, tmp_path):
    done = tokenweights("build")
    assert done.returncode == 0, done.stderr
    assert WeightStore(f"{tmp_path}/store").scan("hh-harmless/head").collect().height == 12
    assert "PyTorch was not found" not in done.stderr, "it is not meant to be there"
    again = tokenweights("build")
    assert "nothing to do: this version exists already" in again.stdout, again.stderr


def test_doctor_env_finds_both_environments_in_order(tokenweights):
    done = tokenweights("doctor-env")
    assert done.returncode == 0, done.stderr
    installed = subprocess.run(
        [FLOWS_PYTHON, "-P", "-c", "from importlib.metadata import version; print(version('prefect'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(
        rf"^this interpreter\S* .*prefect +{re.escape(installed.stdout.strip())} ", done.stdout, re.MULTILINE
    )
    assert re.search(r"import vllm +works", done.stdout)
