"""The real thing, end to end: Prefect's embedded server, real vLLM, the training job."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from flows.demo import next_commands
from pipeline.recipe import load_recipe
from weights_store import WeightStore

REPO = Path(__file__).resolve().parents[2]
NUM_PAIRS, NUM_MORE = 24, 6


pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def world(tmp_path_factory, toy_model, toy_pairs, write_jsonl):
    """A folder with pairs, a recipe file (construction D, very short) and a store that the tests fill in order."""
    folder = tmp_path_factory.mktemp("world")
    write_jsonl(folder / "pairs.jsonl", [*toy_pairs[:NUM_PAIRS], b"{broken"])
    (folder / "recipe.toml").write_text(
        f"""
[dataset]
name = "toy"
source = {json.dumps(str(folder / "pairs.jsonl"))}
[model]
path = {json.dumps(str(toy_model))}
[contrast]
method = "dpo"
[contrast.train.optim]
learning_rate = 1e-3
max_steps = 2
pairs_per_step = 8
[score]
kv_cache_gib = 1.0
[weights]
name = "toy/tis-dpo"
estimator = "tis"
[schedule]
interval_s = 8
[store]
uri = {json.dumps(str(folder / "store"))}
"""
    )
    return folder


def _build(world):
    from flows.build import build_weights

    return build_weights(load_recipe(world / "recipe.toml"))


@pytest.fixture(scope="module")
def first_build(world, prefect_server):
    return _build(world)


def test_build_publishes_every_good_pair_and_accounts_for_every_row(first_build):
    statistics = first_build.published.statistics
    assert statistics["num_pairs"] == NUM_PAIRS
    assert statistics["quarantined"] == {"unparsable_json": 1}
    assert statistics["num_source_rows"] == NUM_PAIRS + 1
    assert first_build.num_trained == 2
    assert "toy/tis-dpo@0" in Path(first_build.report).read_text(encoding="utf-8")


def test_progress_summary_tables_and_links_are_artifacts(first_build):
    from prefect.artifacts import Artifact

    summary = Artifact.get("weights-toy-tis-dpo").data
    assert f"| rows in | {NUM_PAIRS + 1} = {NUM_PAIRS} published + 1 quarantined |" in summary
    assert str(first_build.report) in summary
    assert {float(Artifact.get(f"score-{role}").data) for role in ("ref", "positive", "negative")} == {100.0}
    tables = {what: json.loads(Artifact.get(f"{what}-toy-tis-dpo").data) for what in ("rows", "versions", "costs")}
    assert [(row["rows"], row["number"]) for row in tables["rows"]] == [
        ("published", NUM_PAIRS),
        ("quarantined: unparsable_json", 1),
        ("in the source", NUM_PAIRS + 1),
    ]
    roles = [row["role"] for row in tables["versions"]]
    assert roles == ["tokens", "ref_logps", "positive_logps", "negative_logps", "weights"]
    scored = [row for row in tables["costs"] if row["stage"].startswith("score negative")]
    assert [row["pairs"] for row in scored] == [NUM_PAIRS]
    assert Path(first_build.report).as_uri() in Artifact.get("report-toy-tis-dpo").data
    assert Path(first_build.published.weights.store).as_uri() in Artifact.get("store-toy-tis-dpo").data


def _joined(store, result):
    frame = store.scan("toy/tis-dpo", result.published.weights.version)
    for role in ("positive", "negative"):
        reference = result.scored[role].output
        logps = store.table(reference.table).scan(reference.version)
        frame = frame.join(
            logps.rename({f"{side}_logps": f"{side}_{role}" for side in ("chosen", "rejected")}), on="pair_id"
        )
    return frame.collect()


def test_every_row_has_one_weight_and_one_reference_log_prob_per_id(world, first_build):
    rows = _joined(WeightStore(world / "store"), first_build)
    for side in ("chosen", "rejected"):
        lengths = rows[f"{side}_ids"].list.len()
        for column in (f"{side}_token_weights", f"{side}_ref_logps", f"{side}_positive", f"{side}_negative"):
            assert rows[column].list.len().equals(lengths)
        assert rows[f"{side}_ref_logps"].list.max().max() <= 0


def test_weights_follow_from_the_stored_log_probs_eos_included(world, first_build):
    rows = _joined(WeightStore(world / "store"), first_build)
    eos = WeightStore(world / "store").metadata("toy/tis-dpo")["tokenizer"]["eos_token_id"]
    for row in rows.iter_rows(named=True):
        for side, mu in (("chosen", 1.0), ("rejected", -1.0)):
            assert row[f"{side}_ids"][-1] == eos
            logratios = np.array(row[f"{side}_positive"]) - np.array(row[f"{side}_negative"])
            expected = [math.exp(mu * min(max(ratio, -0.5), 1.5)) for ratio in logratios]
            np.testing.assert_allclose(row[f"{side}_token_weights"], expected, rtol=2e-4)


def test_lineage_leads_back_to_the_pairs(world, first_build):
    store = WeightStore(world / "store")
    metadata = store.metadata("toy/tis-dpo")
    roles = {parent["role"]: parent for parent in metadata["parents"]}
    assert set(roles) == {"tokens", "ref_logps", "positive_logps", "negative_logps"}
    tokens = store.table(roles["tokens"]["table"]).metadata(roles["tokens"]["version"])
    assert tokens["source"]["content"] == _sha256(world / "pairs.jsonl")
    scorer = store.table(roles["positive_logps"]["table"]).metadata()["scorer"]
    assert scorer["model"] == _fingerprint_model(first_build)
    assert metadata["packages"]["polars"] == pl.__version__


def _sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fingerprint_model(result):
    from weights_store.fingerprint import fingerprint_model

    models = [
        json.loads(path.read_text()) for path in Path(result.published.weights.store).glob("models/*/contrast.json")
    ]
    (positive,) = [record["identity"] for record in models if record["identity"]["side"] == "positive"]
    folders = Path(result.published.weights.store).glob("models/*/contrast.json")
    (folder,) = [path.parent for path in folders if json.loads(path.read_text())["identity"] == positive]
    return fingerprint_model(folder)


def test_stored_log_probs_were_compared_with_transformers_once_for_both_datasets(world, first_build):
    store = WeightStore(world / "store")
    uniform, final = store.metadata("toy/uniform"), store.metadata("toy/tis-dpo")
    parity = final["parity"]
    assert parity == uniform["parity"]
    assert (parity["num_pairs"], parity["dtype"]) == (16, "float32")
    # The engine computes in float32, and log-probs are stored to a relative 1.2e-4.
    assert 0 < parity["mean"] < 5e-4
    assert parity["mean"] < parity["p99"] <= parity["max"] < 1e-2
    scorer = store.table(first_build.scored["ref"].output.table).metadata()["scorer"]
    assert final["reference"] == {
        "model_fingerprint": scorer["model"],
        "dtype": "float32",
        "model": str(first_build.model_folder),
    }
    assert "compared with transformers: mean" in Path(first_build.report).read_text(encoding="utf-8")


def test_rebuild_does_nothing(world, first_build):
    before = _files(world / "store")
    again = _build(world)
    assert _files(world / "store") == before
    assert again.published.weights == first_build.published.weights
    assert again.published.is_new is False
    assert again.num_trained == 0
    assert {scored.num_pairs for scored in again.scored.values()} == {0}


def _files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_training_reads_what_was_built(world, first_build):
    output = world / "policy"
    settings = [
        "loss.name=tis_dpo",
        "loss.beta=0.1",
        "optim.learning_rate=1e-3",
        "optim.max_steps=3",
        "optim.pairs_per_step=8",
    ]
    command = [
        sys.executable,
        "-m",
        "tokenweights",
        "train",
        "--store",
        str(world / "store"),
        "--weights",
        "toy/tis-dpo@0",
    ]
    command += ["--model", str(first_build.model_folder), "--output", str(output)]
    done = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    # Before the first step policy and reference are the same model; the engine scored it in float32 as it is stored.
    assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert metrics["after"]["rewards/margins"] > metrics["before"]["rewards/margins"]
    lineage = json.loads((output / "lineage.json").read_text())
    assert first_build.published.weights.fingerprint in json.dumps(lineage)


def test_appended_pairs_are_the_only_ones_scored(world, first_build, toy_pairs, write_jsonl):
    write_jsonl(
        world / "pairs.jsonl", [*toy_pairs[:NUM_PAIRS], b"{broken", *toy_pairs[NUM_PAIRS : NUM_PAIRS + NUM_MORE]]
    )
    grown = _build(world)
    assert {role: scored.num_pairs for role, scored in grown.scored.items()} == dict.fromkeys(
        ("ref", "positive", "negative"), NUM_MORE
    )
    assert grown.num_trained == 0
    store = WeightStore(world / "store")
    old, new = store.scan("toy/tis-dpo", 0).collect(), store.scan("toy/tis-dpo").collect()
    assert (old.height, new.height) == (NUM_PAIRS, NUM_PAIRS + NUM_MORE)
    assert new.join(old, on="pair_id", how="semi").sort("pair_id").equals(old.sort("pair_id"))


def test_the_commands_that_the_demo_prints_work(world, first_build):
    recipe_file = world / "recipe.toml"
    outputs = []
    for _, command in next_commands(recipe_file, load_recipe(recipe_file)):
        done = subprocess.run(
            [sys.executable, "-P", "-m", *command], cwd=world, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    shown, built, trained = outputs
    assert f"toy/tis-dpo@{WeightStore(world / 'store').resolve('toy/tis-dpo').version}: 3 of " in shown
    assert "⟦</s>⟧" in shown
    assert "score ref: logps/" in built
    assert "nothing to score" in built
    assert "published weights/toy/stronger@0" in built
    assert f"wrote {world / 'dpo'}" in trained


def test_the_demo_compares_three_policies_on_what_was_published(world, first_build, monkeypatch):
    from pipeline.toy.compare import SETTINGS, compare

    small = {"pairs_per_step": 8, "steps": [1, 2], "num_samples": 40, "max_new_tokens": 4}
    for key, value in small.items():
        monkeypatch.setitem(SETTINGS, key, value)
    policies = compare(str(world / "store"), "toy/tis-dpo@0", first_build.model_folder)
    assert list(policies) == ["DPO", "published weights", "oracle weights"]
    for points in policies.values():
        assert [point["step"] for point in points] == [0, 1, 2]
        assert points[0]["kl"] == 0 < points[1]["kl"] < points[2]["kl"]
    assert len({points[2]["reward"] for points in policies.values()}) == 3  # they differ in their weights


def test_ctrl_c_ends_a_build_and_keeps_what_was_committed(world, first_build, tmp_path):
    """As a terminal does it: the signal goes to the whole group, Prefect's embedded server included."""
    log, store = tmp_path / "build.log", tmp_path / "store"
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    command = [sys.executable, "-m", "tokenweights", "build", str(world / "recipe.toml"), "--store", str(store)]
    with log.open("wb") as stream:
        build = subprocess.Popen(
            [*command, "--set", "score.chunk_tokens=200"],
            cwd=REPO,
            env={**environment, "PREFECT_HOME": str(tmp_path / "prefect")},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            _wait_for(log, build, "tokens/s", timeout_s=240)
            os.killpg(build.pid, signal.SIGINT)
            assert build.wait(60) == 130
        finally:
            build.kill()
            build.wait()
    assert "interrupted; what was committed stays" in log.read_text(errors="replace")
    (logps,) = WeightStore(store).tables("logps")
    assert 0 < logps.num_rows() <= NUM_PAIRS + NUM_MORE


def _wait_for(log, process, *parts, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if any(all(part in line for part in parts) for line in text.splitlines()):
            return text
        assert process.poll() is None, text[-3000:]
        time.sleep(1)
    raise AssertionError(f"no line with {parts} after {timeout_s} s:\n{log.read_text(errors='replace')[-3000:]}")
