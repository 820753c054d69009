"""`tokenweights serve` with its own server: a schedule finds new rows, and a sound version starts a training."""

import json
import re
import subprocess
import sys
import time

import pytest

from tests.server.stack import FLOWS_PYTHON, environment
from tests.server.worlds import write_world
from tests.torture import orphans
from weights_store import WeightStore

NUM_FIRST, NUM_MORE = 12, 4
TRAINING = """
[data]
store = {store}
weights = "toy/plain"
[model]
path = {model}
[loss]
name = "dpo"
beta = 0.1
[optim]
learning_rate = 1e-4
max_steps = 1
pairs_per_step = 4
[gate]
pairs = 0 # the log-probs are made up
[output]
folder = {folder}
"""


@pytest.fixture
def folder(tmp_path, toy_model, toy_pairs):
    """A recipe of weights that the doctor finds sound, a training on them, and files of a user that must not be imported."""
    recipe = write_world(tmp_path, toy_model, toy_pairs[:NUM_FIRST], is_small=True)
    text = recipe.read_text()
    replaced = {'"toy/small"': '"toy/plain"', '"tis"': '"uniform"'}
    for old, new in replaced.items():
        text = text.replace(old, new)
    store = json.dumps(str(tmp_path / "store"))
    recipe.write_text(f"{text}schedule.interval_s = 10\nstore.uri = {store}\n")
    values = {"store": store, "model": json.dumps(str(toy_model)), "folder": json.dumps(str(tmp_path / "runs/policy"))}
    (tmp_path / "policy.toml").write_text(TRAINING.format(**values))
    for name in ("flows", "pipeline", "train", "weights_store", "tokenizers", "prefect", "uvicorn"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')\n")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_new_rows_become_a_version_and_a_policy_without_a_hand(folder, toy_pairs):
    log, arguments = folder / "serve.log", ["serve", "recipe.toml", "policy.toml"]
    variables = environment(folder) | {orphans.MARK: folder.name, "TMPDIR": str(folder / "tmp")}
    variables["TOKENWEIGHTS_TRAIN_PYTHON"] = sys.executable
    with log.open("wb") as stream:
        serving = subprocess.Popen(
            [FLOWS_PYTHON, "-m", "tokenweights", *arguments], cwd=folder, env=variables, stdout=stream, stderr=stream
        )
        try:
            _wait_for(folder / "runs/policy@0/lineage.json", serving, log)
            with (folder / "pairs.jsonl").open("a") as pairs:
                pairs.writelines(json.dumps(pair) + "\n" for pair in toy_pairs[NUM_FIRST : NUM_FIRST + NUM_MORE])
            _wait_for(folder / "runs/policy@1/lineage.json", serving, log)
            shown = _status(folder, variables, log)
            serving.kill()
            serving.wait(20)
            _wait_until_nothing_is_left(folder)
        finally:
            serving.kill()
            serving.wait()
            orphans.kill_marked(folder.name)
    assert "a stranger was imported" not in log.read_text(errors="replace")
    store = WeightStore(folder / "store")
    sizes = [store.scan("toy/plain", version).collect().height for version in (0, 1)]
    assert sizes == [NUM_FIRST, NUM_FIRST + NUM_MORE]
    assert {row["deployment"]: row["is_stale"] for row in shown} == {
        "build-and-train/policy": None,
        "build-weights/recipe": False,
        "refresh-weights/recipe": False,
        "train-policy/policy": False,
    }
    refresh = next(row for row in shown if row["deployment"].startswith("refresh"))
    assert refresh["last"]["state"] == "Completed"
    assert refresh["next"]["state"] == "Scheduled"


def _status(folder, variables, log):
    """Return what `tokenweights status --json` says of the server."""
    url = re.search(r"Prefect server: (\S+)", log.read_text(errors="replace"))[1]
    done = subprocess.run(
        [FLOWS_PYTHON, "-m", "tokenweights", "status", "--json"],
        cwd=folder,
        env=variables | {"PREFECT_API_URL": f"{url}/api"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _wait_for(file, process, log, timeout_s=240):
    deadline = time.monotonic() + timeout_s
    while not file.is_file():
        text = log.read_text(errors="replace")[-5000:]
        assert process.poll() is None, text
        assert time.monotonic() < deadline, f"no {file} after {timeout_s} s:\n{text}"
        time.sleep(0.5)


def _wait_until_nothing_is_left(folder):
    deadline = time.monotonic() + 60  # about half a second on an idle core
    while left := orphans.count_left(folder.name, folder / "tmp"):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
