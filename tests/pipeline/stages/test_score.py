"""The stage that scores, with a made-up engine in a process of its own: what it does when things go wrong."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from pipeline.chat.tokenizer import Condition
from pipeline.engine.contract import EngineSettings
from pipeline.engine.score_once import ScoredSequence
from pipeline.recipe import ScoreSection
from pipeline.stages.score import Scorer, engine_key, score
from pipeline.workers.pair_scorer import PairScorer
from pipeline.workers.process import run as fill_all
from pipeline.workers.request import Request, Target
from tests.pipeline.made_up_scorer import MadeUpEngine, logps, scores
from weights_store import Table, WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import EngineError, InputError, StageError, StoreError
from weights_store.schemas import TOKENS, Reason

SCRIPT = Path(__file__).parents[1] / "made_up_scorer.py"
NUM_PAIRS, PAIR_TOKENS = 120, 4 + 6 + 5


@pytest.fixture
def tokens(tmp_path):
    return make_tokens(tmp_path / "store")


def make_tokens(uri, **changed):
    """Pairs of 4 + 6 + 5 tokens; `changed` has other columns for single rows: `row7={"chosen_ids": […]}`."""
    draw = random.Random(0)
    rows = []
    for index in range(NUM_PAIRS):
        row = {
            f"{name}_ids": [draw.randrange(3, 900) for _ in range(n)]
            for name, n in zip(("prompt", "chosen", "rejected"), (4, 6, 5), strict=True)
        }
        row |= {"pair_id": f"{index:032x}", "prompt": "[]", "source_row": index, "split": "train"}
        rows.append({**row, "chosen_score": None, "rejected_score": None, **changed.get(f"row{index}", {})})
    store = WeightStore(uri)
    reference = store.table("tokens/toy-1").replace(pa.Table.from_pylist(rows, TOKENS), {"fingerprint": "tokens"})
    store.table("quarantine/toy-1").append(
        pa.Table.from_pylist([], store.table("quarantine/toy-1").schema), {"fingerprint": "quarantine"}
    )
    return reference


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    """Return a function that runs the stage: `run(tokens, dies_after=2)`; its `log(name)` tells what the engines did."""

    class Run:
        def __init__(self):
            self.folder = tmp_path / "log"
            self.folder.mkdir()

        def __call__(
            self, tokens, scorers=None, chunk_tokens=4 * PAIR_TOKENS, python=None, tokenizer=None, top_k=0, **made_up
        ):
            monkeypatch.setenv("MADE_UP", json.dumps({"log": str(self.folder), **made_up}))
            python = str(python or interpreter(tmp_path))
            settings = ScoreSection(chunk_tokens=chunk_tokens, python=python, top_k=top_k)
            scorers = scorers or {"ref": Scorer(model)}
            return score(tokens, scorers, settings, tokenizer or model)

        def log(self, name):
            path = self.folder / name
            return path.read_text().split() if path.exists() else []

    return Run()


def interpreter(folder, python=sys.executable):
    """A file that can be run like an interpreter and has the made-up engine."""
    path = folder / f"interpreter-{Path(python).parent.parent.name}"
    path.write_text(f'#!/bin/sh\nexec "{python}" "{SCRIPT}" "$@"\n')
    path.chmod(0o755)
    return path


def assert_whole(tokens, scored, without=()):
    """Every pair that is not in `without` is there once, with the made-up engine's numbers."""
    store = WeightStore(tokens.store)
    rows = store.table(tokens.table).scan().join(store.table(scored.output.table).scan(), on="pair_id").collect()
    assert store.table(scored.output.table).num_rows() == rows.height == NUM_PAIRS - len(without)
    assert set(rows["source_row"]).isdisjoint(without)
    for row in rows.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            expected = logps(ScoredSequence(row["prompt_ids"], row[f"{side}_ids"]))
            np.testing.assert_allclose(row[f"{side}_logps"], expected, rtol=2e-4)


def commits(scored):
    return [commit.metadata for commit in WeightStore(scored.output.store).table(scored.output.table).history()]


def test_every_pair_is_scored_once_in_chunks_that_say_how_long_they_took(tokens, run):
    scored = run(tokens)["ref"]
    assert_whole(tokens, scored)
    assert (scored.num_pairs, scored.num_unscorable) == (NUM_PAIRS, 0)
    assert scored.num_tokens == NUM_PAIRS * PAIR_TOKENS
    made = commits(scored)
    assert [commit["statistics"]["num_pairs"] for commit in made] == [4] * (NUM_PAIRS // 4)
    assert all(commit["statistics"]["wall_s"] >= 0 and commit["engine"]["way"] == "made_up" for commit in made)
    assert run(tokens)["ref"].num_pairs == 0
    assert len(run.log("starts")) == 1


def test_scorers_of_one_model_share_an_engine_and_equal_ones_a_table(tokens, run, model):
    other = shutil.copytree(model, model.parent / "other")
    (other / "model.safetensors").write_bytes(b"made up otherwise")
    scorers = {"ref": Scorer(model), "positive": Scorer(other), "negative": Scorer(model), "positive2": Scorer(other)}
    scored = run(tokens, scorers, chunk_tokens=NUM_PAIRS * PAIR_TOKENS)
    assert scored["negative"].output == scored["ref"].output != scored["positive"].output == scored["positive2"].output
    assert [scored[role].num_pairs for role in scorers] == [NUM_PAIRS, NUM_PAIRS, 0, 0]
    assert len(run.log("starts")) == 2
    assert {role: commits(result)[0]["role"] for role, result in scored.items()} == {
        "ref": "ref", "positive": "positive", "negative": "ref", "positive2": "positive"
    }  # fmt: skip


def save_model(folder, shape=(2, 3), config=()):
    """A folder with a real header of safetensors; the engines are made up."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 1000, "_name_or_path": folder.name, **dict(config)}))
    (folder / "tokenizer.json").write_text("{}")
    draw = np.random.default_rng(len(folder.name))
    save_file({"weight": draw.normal(size=shape).astype(np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("made_up", [{}, {"cannot_load": True}])
def test_models_of_one_architecture_share_an_engine_or_get_one_each_if_it_cannot_exchange_weights(
    tokens, run, tmp_path, made_up
):
    models = [save_model(tmp_path / name) for name in ("reference", "plus", "minus-")]
    scorers = dict(zip(("ref", "positive", "negative"), map(Scorer, models), strict=True))
    scored = run(tokens, scorers, chunk_tokens=NUM_PAIRS * PAIR_TOKENS, **made_up)
    for result in scored.values():
        assert_whole(tokens, result)
    assert len({result.output.table for result in scored.values()}) == 3
    amount = NUM_PAIRS * (6 + 5)
    assert sorted(run.log("calls")) == [f"{name}:{amount}" for name in ("minus-", "plus", "reference")]
    assert len(run.log("starts")) == (3 if made_up else 1)
    assert run.log("loads") == ([] if made_up else ["plus", "reference"])  # the first is what it starts with


def test_models_that_differ_in_config_or_tensors_or_are_quantized_have_engines_of_their_own(tmp_path):
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    folders = [
        save_model(tmp_path / "a"),
        save_model(tmp_path / "shape", shape=(3, 2)),
        save_model(tmp_path / "rope", config={"rope_theta": 5e5}),
        save_model(tmp_path / "dtype", config={"dtype": "float16"}),
        save_model(tmp_path / "q1", config=quantized),
        save_model(tmp_path / "q2", config=quantized),
    ]
    assert len({engine_key(folder, ScoreSection()) for folder in folders}) == 6
    same = save_model(tmp_path / "b", config={"transformers_version": "6"})
    assert engine_key(same, ScoreSection()) == engine_key(folders[0], ScoreSection())
    assert engine_key(same, ScoreSection(executor="ray")) != engine_key(folders[0], ScoreSection(executor="ray"))


def test_progress_ends_with_all_tokens(tokens, run, logged):
    run(tokens)
    states = logged.progress
    assert [state.done for state in states] == sorted(state.done for state in states)
    assert (states[0].done, states[-1].done) == (0, NUM_PAIRS * PAIR_TOKENS)
    assert f"{NUM_PAIRS * PAIR_TOKENS:,}/{NUM_PAIRS * PAIR_TOKENS:,} tokens, " in str(states[-1])
    assert states[-1].percent == 100.0


def test_scorers_of_one_model_share_one_engine(tokens, toy_model, run):
    """Construction P: reference and both prompts; the reference alone gets its likeliest tokens."""
    prompts = {role: Scorer(toy_model, Condition(role, "system")) for role in ("positive", "negative")}
    make_tokens(
        tokens.store,
        **{f"row{i}": {"prompt": '{"messages":[{"role":"user","content":"hi"}]}'} for i in range(NUM_PAIRS)},
    )
    tokens = WeightStore(tokens.store).table(tokens.table).reference()
    scored = run(tokens, {"ref": Scorer(toy_model), **prompts}, tokenizer=toy_model, top_k=3)
    assert {role: result.num_pairs for role, result in scored.items()} == dict.fromkeys(scored, NUM_PAIRS)
    assert len({result.output.table for result in scored.values()}) == 3
    assert len(run.log("pids")) == len(run.log("starts")) == 1
    assert_has_likeliest(tokens, scored["ref"], 3)
    for role in prompts:
        rows = WeightStore(tokens.store).table(scored[role].output.table).scan().collect()
        assert rows.select(pl.col("^.*_top_.*$").null_count()).row(0) == (NUM_PAIRS,) * 4
    assert list(verify(WeightStore(tokens.store), rows=True)) == []


# --- the likeliest tokens ----------------------------------------------------------------------------------------------


def assert_has_likeliest(tokens, scored, top_k):
    """Every pair that was scored has the made-up engine's likeliest tokens, `top_k` for each of its own."""
    store = WeightStore(tokens.store)
    rows = store.table(tokens.table).scan().join(store.table(scored.output.table).scan(), on="pair_id").collect()
    for row in rows.iter_rows(named=True):
        for side in ("chosen", "rejected"):
            expected = scores(ScoredSequence(row["prompt_ids"], row[f"{side}_ids"], top_k=top_k))
            assert row[f"{side}_top_ids"] == expected.top_ids.ravel().tolist()
            np.testing.assert_allclose(row[f"{side}_top_logps"], expected.top_logps.ravel(), rtol=2e-4)
            # The token itself is the first of its list, and has the same log-prob there.
            assert row[f"{side}_top_logps"][::top_k] == row[f"{side}_logps"]


def test_asking_for_likeliest_tokens_scores_into_another_table_and_leaves_the_plain_one_as_it_was(
    tmp_path, run, logged
):
    """The engine dies after each chunk, and one response cannot be scored."""
    tokens = make_tokens(tmp_path / "store", row8={"rejected_ids": [999, 4]})
    plain = run(tokens, chunk_tokens=60 * PAIR_TOKENS, bad_id=999)["ref"]
    with_top = run(tokens, chunk_tokens=60 * PAIR_TOKENS, bad_id=999, top_k=2, dies_after=1)["ref"]
    assert with_top.output.table != plain.output.table
    assert any(f"new table; unlike {plain.output.table}: top_k: null -> 2" in line for line in logged.lines)
    assert "top_k" not in commits(plain)[0]["scorer"]
    assert commits(with_top)[0]["scorer"] == {**commits(plain)[0]["scorer"], "top_k": 2}
    assert_whole(tokens, with_top, without={8})
    assert_has_likeliest(tokens, with_top, 2)
    num_starts = len(run.log("starts"))
    assert num_starts == 1 + 2
    assert run(tokens)["ref"].output == plain.output
    assert run(tokens, top_k=2)["ref"].output == with_top.output
    assert len(run.log("starts")) == num_starts


def test_more_likely_tokens_than_the_vocabulary_has_are_refused(tokens, model, monkeypatch):
    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", type("Small", (MadeUpEngine,), {"vocab_size": 96}))
    target = Target("ref", "logps/toy-1/x", None, {}, top_k=128)
    with pytest.raises(InputError, match=f"score.top_k is 128, the vocabulary of {model} has 96 ids"):
        PairScorer(Request("score", tokens, str(model), [target], 100, EngineSettings()))


# --- the size of the engine --------------------------------------------------------------------------------------------


def test_an_engine_is_started_for_the_longest_pair_that_is_missing(tmp_path, run):
    tokens = make_tokens(tmp_path / "store", row3={"prompt_ids": [5] * 9}, row7={"rejected_ids": [6] * 20})
    run(tokens)
    assert run.log("longest") == ["24"]  # a prompt of 4 and a response of 20


def test_a_sequence_that_is_longer_than_foreseen_gets_an_engine_for_any_length(tokens, run):
    scored = run(tokens, too_long=True)["ref"]
    assert_whole(tokens, scored)
    assert run.log("longest") == ["10", "None"]
    assert "a sequence has more tokens" in scored.restarts[0]


# --- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigkill_at_eight_random_moments_loses_two_chunks_each_at_most(tokens, run, monkeypatch):
    draw, stop, kills = random.Random(0), threading.Event(), []

    def kill():
        seen = 0
        while not stop.is_set() and len(kills) < 8:
            pids = run.log("pids")
            if len(pids) > seen:
                seen = len(pids)
                time.sleep(draw.uniform(0, 1.2))
                try:
                    os.kill(int(pids[-1]), signal.SIGKILL)
                    kills.append(pids[-1])
                except ProcessLookupError:
                    pass
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        for _ in range(16):
            try:
                scored = run(tokens, chunk_tokens=2 * PAIR_TOKENS, call_s=0.2)["ref"]
                break
            except StageError:  # given up after four kills in a row before the first commit
                continue
    finally:
        stop.set()
        killer.join()
    assert_whole(tokens, scored)
    assert len(kills) == 8
    assert list(verify(WeightStore(tokens.store), rows=True)) == []
    repeated = sum(map(int, run.log("scored"))) - NUM_PAIRS * (6 + 5)
    assert repeated <= len(kills) * 2 * 2 * (6 + 5)


def test_out_of_memory_halves_the_budget_and_is_recorded(tokens, run, logged):
    scored = run(tokens, oom_above=1024)["ref"]
    assert_whole(tokens, scored)
    assert run.log("starts") == ["4096", "2048", "1024"]
    assert [restart.rpartition("; ")[2] for restart in scored.restarts] == [
        "1/2 of the default batch_tokens",
        "1/4 of the default batch_tokens",
    ]
    engine = commits(scored)[0]["engine"]
    assert engine["batch_tokens"] == 1024
    assert "ran out of memory: made up" in engine["restarts"][0]
    assert any("Starting again with 1/2 of the default batch_tokens" in line for line in logged.lines)


def test_an_engine_that_dies_now_and_then_is_started_again_with_the_same_budget(tokens, run):
    scored = run(tokens, dies_after=7)["ref"]
    assert_whole(tokens, scored)
    assert run.log("starts") == ["4096"] * 5  # 30 chunks, 7 from each
    assert sum(map(int, run.log("scored"))) == NUM_PAIRS * (6 + 5)


def test_an_engine_that_gets_nothing_done_is_given_up_and_what_was_done_stays(tokens, run):
    with pytest.raises(StageError, match="the engine failed: made up"):
        run(tokens, dies_after=0)
    assert len(run.log("starts")) == 4
    assert not list(WeightStore(tokens.store).tables("logps"))
    with pytest.raises(StageError) as caught:
        run(tokens, oom_above=100)
    assert "scoring gave up after 4 starts in a row without a result" in str(caught.value)
    assert f"0 of {NUM_PAIRS} pairs are scored and stay; run again to go on" in str(caught.value)
    assert_whole(tokens, run(tokens)["ref"])


def test_poisonous_rows_are_quarantined_alone_and_never_tried_again(tmp_path, run):
    tokens = make_tokens(
        tmp_path / "store",
        row5={"chosen_ids": [3] * 97},
        row6={"rejected_ids": [1000, 4]},
        row7={"prompt_ids": [-1, 4]},
        row8={"rejected_ids": [999, 4]},
        row9={"chosen_ids": [], "rejected_ids": []},
    )
    scored = run(tokens, bad_id=999)["ref"]
    assert_whole(tokens, scored, without={5, 6, 7, 8, 9})
    assert scored.num_unscorable == 5
    quarantine = WeightStore(tokens.store).table("quarantine/toy-1").scan().sort("source_row").collect()
    assert quarantine["source_row"].to_list() == [5, 6, 7, 8, 9]
    assert set(quarantine["reason"]) == {Reason.UNSCORABLE.value}
    details = [detail.partition(": ")[2].rpartition(" (pair ")[0] for detail in quarantine["detail"]]
    assert details == [
        "prompt and response have 101 tokens, the model takes 100",
        "a token id is outside the model's vocabulary of 1000",
        "a token id is outside the model's vocabulary of 1000",
        "rejected: response token 0: log-prob is nan, expected a finite number",
        "the prompt or both responses have no tokens",
    ]
    assert run(tokens)["ref"].num_unscorable == 0
    assert len(run.log("starts")) == 1


@pytest.mark.parametrize("engine_dies_too", [False, True])
def test_a_commit_that_fails_ends_the_process_and_what_was_committed_before_stays(
    tokens, model, monkeypatch, engine_dies_too
):
    append, num_calls, failed = Table.append, [], threading.Event()

    class Engine(MadeUpEngine):
        def score(self, *args, **options):
            if engine_dies_too and len(num_calls) >= 2 and failed.wait(1.0):
                raise EngineError("the engine died")  # in the next chunk: that it did is not what to say
            return super().score(*args, **options)

    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", Engine)

    def fails_the_third_time(self, *args):
        num_calls.append(self.path)
        if len(num_calls) == 3:
            failed.set()
            raise StoreError("the disk is full")
        return append(self, *args)

    monkeypatch.setattr(Table, "append", fails_the_third_time)
    target = Target("ref", "logps/toy-1/x", None, {"fingerprint": "x"})
    with pytest.raises(StoreError, match="the disk is full"):
        fill_all(Request("score", tokens, str(model), [target], 4 * PAIR_TOKENS, EngineSettings()))
    assert WeightStore(tokens.store).table("logps/toy-1/x").num_rows() == 2 * 4
    assert len(num_calls) == 3


def test_nothing_but_poison_is_an_error(tmp_path, run):
    tokens = make_tokens(tmp_path / "store", **{f"row{i}": {"chosen_ids": [2000]} for i in range(NUM_PAIRS)})
    example = "for example row 0: a token id is outside the model's vocabulary of 1000 .*; see quarantine/toy-1"
    with pytest.raises(StageError, match=f"none of {NUM_PAIRS} pairs could be scored with .*, {example}"):
        run(tokens)


def test_a_model_that_gives_nothing_but_nan_is_named_before_all_pairs_are_tried(tmp_path, run, model):
    poisoned = {f"row{index}": {"chosen_ids": [999]} for index in range(NUM_PAIRS)}
    tokens = make_tokens(tmp_path / "store", **poisoned)
    with pytest.raises(StageError) as caught:
        run(tokens, bad_id=999)
    text = str(caught.value).partition("exit code 1: ")[2]
    start = rf"the model {model} gives no finite log-probs: none for the first 3\d pairs, for example pair "
    assert re.match(start, text)
    assert "chosen: response token 0: log-prob is nan, expected a finite number; its weights hold NaN or" in text
    assert 0 < WeightStore(tokens.store).table("quarantine/toy-1").num_rows() < 32


def test_many_pairs_without_finite_log_probs_after_a_good_one_go_to_quarantine(tmp_path, run):
    tokens = make_tokens(tmp_path / "store", **{f"row{index}": {"chosen_ids": [999]} for index in range(1, NUM_PAIRS)})
    scored = run(tokens, bad_id=999, chunk_tokens=NUM_PAIRS * PAIR_TOKENS)["ref"]
    assert (scored.num_pairs, scored.num_unscorable) == (1, NUM_PAIRS - 1)


def test_a_full_disk_stops_with_one_line_and_nothing_half_visible(disk, run):
    folder, _ = disk
    tokens = make_tokens(folder / "store")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    (folder / "filler").write_bytes(bytes((1 << 20) - size - (160 << 10)))
    with pytest.raises(StageError, match=r"cannot write logps/.*No space left on device.*nothing became visible"):
        run(tokens)
    (table,) = WeightStore(tokens.store).tables("logps")
    done = table.scan().collect()
    assert 0 < done.height < NUM_PAIRS
    assert done["pair_id"].n_unique() == done.height
    (folder / "filler").unlink()
    assert_whole(tokens, run(tokens, chunk_tokens=100 * PAIR_TOKENS)["ref"])


def test_a_scorer_ends_when_its_parent_is_killed(tokens, model, run, tmp_path):
    code = f"""
from pathlib import Path
from pipeline.recipe import ScoreSection
from pipeline.stages.score import Scorer, score
from weights_store import WeightStore
tokens = WeightStore({tokens.store!r}).table({tokens.table!r}).reference()
model, settings = Path({str(model)!r}), ScoreSection(python={str(interpreter(tmp_path))!r})
score(tokens, {{"ref": Scorer(model)}}, settings, model)
"""
    environment = {**os.environ, "MADE_UP": json.dumps({"log": str(run.folder), "call_s": 120})}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=SCRIPT.parents[2], env=environment)
    try:
        _wait_until(lambda: run.log("scored"))
    finally:
        parent.kill()
        parent.wait()
    child = int(run.log("pids")[0])
    _wait_until(lambda: not Path(f"/proc/{child}").exists())


def _wait_until(done, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_scorer_runs_in_the_interpreter_of_another_virtual_environment(tokens, run, tmp_path, monkeypatch):
    """The packages of this one are lent to it by a path file; what counts is who runs, and that ours needs no vLLM."""
    other = tmp_path / "other"
    venv.create(other, symlinks=True)
    (site,) = (other / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    monkeypatch.setitem(sys.modules, "vllm", None)
    scored = run(tokens, python=interpreter(tmp_path, other / "bin" / "python"))["ref"]
    assert_whole(tokens, scored)
    assert run.log("prefixes") == [str(other)]
    assert str(other) != sys.prefix


def test_an_interpreter_without_vllm_says_what_to_install(tokens, model, tmp_path):
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    (site,) = (bare / "lib").glob("python*/site-packages")
    lent = tmp_path / "lent"
    lent.mkdir()
    for here in {path for path in sys.path if path.endswith("site-packages")}:
        for entry in Path(here).iterdir():
            if not entry.name.lower().startswith(("vllm", "__pycache__")):
                (lent / entry.name).symlink_to(entry)
    (site / "lent.pth").write_text(str(lent))
    settings = ScoreSection(python=str(bare / "bin" / "python"))
    with pytest.raises(StageError, match=r"scoring needs the package 'vllm'.*tokenweights\[score\]"):
        score(tokens, {"ref": Scorer(model)}, settings, model)


def test_log_probs_lie_beside_their_pairs(tokens, run):
    """Sorted by pair_id within each commit, as joins by ranges need it."""
    scored = run(tokens)["ref"]
    table = WeightStore(tokens.store).table(scored.output.table)
    for record in table.records():
        ids = table.scan_shards([record]).select("pair_id").collect().to_series()
        assert ids.equals(ids.sort())
        assert ids.len() == pl.Series(ids).n_unique()
