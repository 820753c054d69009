"""Anchors with a made-up engine: one per prompt, the same whatever stands beside it; and once with the real one."""

import json
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from pipeline.engine.contract import EngineSettings, Sampling
from pipeline.engine.score_once import ScoredSequence
from pipeline.recipe import Recipe, ScoreSection
from pipeline.stage_sections import AnchorsSection
from pipeline.stages.anchors import anchors_identity, sample_anchors
from pipeline.workers.anchors.mismatched import MismatchedAnchors, OtherResponses
from pipeline.workers.anchors.sampler import (
    AnchorSampler,
    config_stop_ids,
    dataset_stop_ids,
    longest_response,
    seed_of,
)
from pipeline.workers.on_ray import Chunk, ChunkScorer, replies
from pipeline.workers.pair_row import read_pairs
from pipeline.workers.process import fill
from pipeline.workers.request import AnchorOptions, Executor, MismatchOptions, Request, Target
from tests.pipeline import made_up_scorer
from tests.pipeline.made_up_scorer import MadeUpEngine, continuation, logps
from weights_store import WeightStore
from weights_store.checks.verify import verify
from weights_store.errors import EngineError, InputError, ScoringError, SettingsError
from weights_store.fingerprint import explain_difference
from weights_store.schemas import TOKENS
from weights_store.settings import parse_settings

NUM_PROMPTS, PAIRS_PER_PROMPT = 8, 3
NUM_PAIRS = NUM_PROMPTS * PAIRS_PER_PROMPT
EOS, TURN_END = 2, 7
CONFIG = {"dtype": "float32", "eos_token_id": EOS}
SETTINGS = AnchorsSection(max_new_tokens=6)


def make_tokens(uri, **changed):
    """Three pairs of 5 + 2 tokens or so for each of eight prompts; all responses end with `TURN_END`."""
    draw = random.Random(0)
    rows = []
    for index in range(NUM_PAIRS):
        prompt_idx = index // PAIRS_PER_PROMPT
        row = {
            "prompt_ids": [10 + prompt_idx, *range(20, 20 + prompt_idx)],
            "chosen_ids": [*(draw.randrange(30, 900) for _ in range(2 + index % 4)), TURN_END],
            "rejected_ids": [draw.randrange(30, 900), TURN_END],
        }
        row |= {"pair_id": f"{index:032x}", "prompt": "[]", "source_row": index, "split": "train"}
        rows.append({**row, "chosen_score": None, "rejected_score": None, **changed.get(f"row{index}", {})})
    store = WeightStore(uri)
    reference = store.table("tokens/toy-1").replace(pa.Table.from_pylist(rows, TOKENS), {"fingerprint": "tokens"})
    quarantine = store.table("quarantine/toy-1")
    quarantine.append(pa.Table.from_pylist([], quarantine.schema), {"fingerprint": "quarantine"})
    return reference


@pytest.fixture
def tokens(tmp_path):
    return make_tokens(tmp_path / "store")


@pytest.fixture
def policy(model):
    """The model folder, with what ends a text in its config."""
    (model / "config.json").write_text(json.dumps(CONFIG))
    return model


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Return a function that puts the made-up engine in place of vLLM here; its `log(name)` reads what that did."""
    folder = tmp_path / "log"
    folder.mkdir()
    monkeypatch.setattr("pipeline.engine.vllm_engine.VllmEngine", MadeUpEngine)

    def settings(**settings):
        monkeypatch.setattr(made_up_scorer, "SETTINGS", {"log": str(folder), **settings})
        monkeypatch.setenv("MADE_UP", json.dumps({"log": str(folder), **settings}))

    settings()
    settings.log = lambda name: [int(number) for number in (folder / name).read_text().split()]
    return settings


def request_of(tokens, policy, settings=SETTINGS, chunk_tokens=10_000, table="anchors/toy-1/x"):
    target = Target(
        "ref", table, None, {"fingerprint": "made up", "scorer": anchors_identity(policy, settings, ScoreSection())}
    )
    options = AnchorOptions(settings.sampling, settings.seed)
    return Request("anchors", tokens, str(policy), [target], chunk_tokens, EngineSettings(), options=options)


def sampled(request):
    """Fill the table of a request in this process; return its rows with those of the pairs, by pair_id."""
    fill(request, request.targets[0], AnchorSampler(request))
    return rows_of(request)


def rows_of(request):
    store = WeightStore(request.tokens.store)
    pairs = store.table(request.tokens.table).scan(request.tokens.version)
    return store.table(request.targets[0].table).scan().join(pairs, on="pair_id").sort("pair_id").collect()


def expected_ids(prompt_ids, settings=SETTINGS, stop_ids=(EOS, TURN_END)):
    options = asdict(settings.sampling)
    return continuation(prompt_ids, Sampling(**options, stop_ids=stop_ids), seed_of(prompt_ids, settings.seed))


def test_pairs_of_one_prompt_share_one_anchor_and_its_log_probs_are_those_of_scoring_it(tokens, policy, made_up):
    rows = sampled(request_of(tokens, policy))
    assert rows.height == NUM_PAIRS
    assert made_up.log("continued") == [NUM_PROMPTS]
    assert rows["anchor_ids"].n_unique() == NUM_PROMPTS
    for row in rows.iter_rows(named=True):
        assert row["anchor_ids"] == expected_ids(row["prompt_ids"])
        expected = logps(ScoredSequence(row["prompt_ids"], row["anchor_ids"]))
        np.testing.assert_allclose(row["anchor_logps"], expected, rtol=2e-4)
    assert list(verify(WeightStore(tokens.store), ["anchors/toy-1/x"], rows=True)) == []


def test_an_anchor_ends_with_the_end_of_a_turn_or_has_all_the_tokens_it_may_have(tokens, policy, made_up):
    anchors = sampled(request_of(tokens, policy))["anchor_ids"].to_list()
    ended = [ids for ids in anchors if ids[-1] == TURN_END]
    cut = [ids for ids in anchors if ids[-1] != TURN_END]
    assert ended
    assert cut
    assert {len(ids) for ids in cut} == {6}
    assert all(TURN_END not in ids[:-1] for ids in anchors)


def test_anchors_are_the_same_whatever_the_chunks_and_the_order(tokens, policy, made_up):
    whole = sampled(request_of(tokens, policy))
    single = sampled(request_of(tokens, policy, chunk_tokens=1, table="anchors/toy-1/y"))
    assert made_up.log("continued") == [NUM_PROMPTS, *[1] * NUM_PAIRS]
    assert whole.equals(single)
    request = request_of(tokens, policy)
    backwards = WeightStore(tokens.store).table(tokens.table).scan().collect().reverse()
    filled, unscorable = AnchorSampler(request).fill_in(read_pairs(backwards), request.targets[0])
    assert filled["anchor_ids"].to_pylist() == whole["anchor_ids"].reverse().to_list()
    assert unscorable == []


def test_sampling_goes_on_after_a_failure_as_if_nothing_had_been(tokens, policy, made_up):
    whole = sampled(request_of(tokens, policy))
    request = request_of(tokens, policy, chunk_tokens=40, table="anchors/toy-1/y")
    made_up(dies_after=5)  # a chunk takes two calls: the third is continued, and not scored
    with pytest.raises(EngineError, match="made up"):
        sampled(request)
    num_done = WeightStore(tokens.store).table("anchors/toy-1/y").num_rows()
    assert 0 < num_done < NUM_PAIRS
    made_up()
    assert sampled(request).equals(whole)


def test_the_seed_of_an_anchor_is_its_prompts_and_the_recipes_and_nothing_elses():
    seeds = {seed_of(prompt, seed) for prompt in ([1, 2], [1, 2, 3], [12], [2, 1]) for seed in (0, 1, 2**70)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of([1, 2], 0) == seed_of([1, 2], 0)


def test_the_share_of_continued_prompts_is_told(tokens, policy, made_up):
    request, shares = request_of(tokens, policy), []
    rows = WeightStore(tokens.store).table(tokens.table).scan().collect()
    AnchorSampler(request).fill_in(read_pairs(rows), request.targets[0], shares.append)
    assert shares == [place / NUM_PROMPTS for place in range(1, NUM_PROMPTS + 1)]


# --- the stage ---------------------------------------------------------------------------------------------------------


def test_the_stage_fills_a_table_once_records_its_seed_and_keeps_another_seeds_apart(
    tokens, policy, made_up, tmp_path, logged
):
    python = tmp_path / "interpreter"
    script = Path(made_up_scorer.__file__)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    engine = ScoreSection(chunk_tokens=100, python=str(python))

    def run(settings, **made_up_settings):
        made_up(**made_up_settings)
        return sample_anchors(tokens, policy, settings, engine)

    first = run(SETTINGS, dies_after=3)
    in_process = sampled(request_of(tokens, policy))
    rows = WeightStore(tokens.store).table(first.output.table).scan().sort("pair_id").collect()
    assert rows.equals(in_process.select(rows.columns))
    # Three chunks of two calls each, and three calls from each engine.
    assert (first.num_pairs, first.num_unscorable, len(first.restarts)) == (NUM_PAIRS, 0, 2)
    assert (logged.progress[-1].name, logged.progress[-1].percent) == ("anchors ref", 100.0)
    assert "anchors ref: " in str(logged.progress[-1])
    commit = WeightStore(tokens.store).table(first.output.table).metadata()
    release = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
    assert commit["scorer"]["sampling"] == {**release, "max_new_tokens": 6, "seed": 0, "stop_ids": [EOS]}
    assert commit["engine"]["stop_ids"] == [EOS, TURN_END]
    again = run(SETTINGS)
    assert (again.output, again.num_pairs) == (first.output, 0)

    other = run(SETTINGS.model_copy(update={"seed": 1}))
    assert other.output.table != first.output.table
    assert any(line.endswith(f"unlike {first.output.table}: sampling.seed: 0 -> 1") for line in logged.lines)
    others = WeightStore(tokens.store).table(other.output.table).scan().sort("pair_id").collect()
    assert others["anchor_ids"].to_list() != rows["anchor_ids"].to_list()


def test_an_actor_on_ray_brings_the_same_anchors(tokens, policy, made_up):
    whole = sampled(request_of(tokens, policy))
    request = replace(request_of(tokens, policy, table="anchors/toy-1/y"), executor=Executor("ray"))
    batch = pa.Table.from_pylist([asdict(Chunk(0, "", "", NUM_PAIRS, 100))])
    (brought,) = replies(SimpleNamespace(iter_batches=lambda **_: [ChunkScorer(request)(batch)]))
    rows = WeightStore(tokens.store).table("anchors/toy-1/y").scan_shards(brought.shards).sort("pair_id").collect()
    assert rows.equals(whole.select(rows.columns))
    assert brought.engine["stop_ids"] == [EOS, TURN_END]


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_prompt_without_room_for_an_anchor_goes_to_quarantine_and_one_with_a_little_gets_a_short_one(
    tmp_path, policy, made_up
):
    tokens = make_tokens(
        tmp_path / "bad",
        row0={"prompt_ids": [3] * 100},
        row1={"prompt_ids": [3] * 99},
        row5={"prompt_ids": [1000, 4]},
        row6={"prompt_ids": [-1, 4]},
        row7={"prompt_ids": []},
    )
    rows = sampled(request_of(tokens, policy))
    assert rows["source_row"].to_list() == sorted(set(range(NUM_PAIRS)) - {0, 5, 6, 7})
    (short,) = rows.filter(pl.col("source_row") == 1)["anchor_ids"].to_list()
    assert len(short) == 1
    quarantine = WeightStore(tokens.store).table("quarantine/toy-1").scan().sort("source_row").collect()
    assert dict(zip(quarantine["source_row"], quarantine["detail"].str.extract(r": ([^:]*) \(pair "), strict=True)) == {
        0: "the prompt has 100 tokens, the model takes 100 with its anchor",
        5: "a token id is outside the model's vocabulary of 1000",
        6: "a token id is outside the model's vocabulary of 1000",
        7: "the prompt has no tokens",
    }
    assert set(quarantine["reason"]) == {"unscorable"}


def test_an_anchor_that_cannot_be_scored_sends_the_pairs_of_its_prompt_to_quarantine(tokens, policy, made_up):
    bad = expected_ids([14, 20, 21, 22, 23])
    made_up(bad_id=bad[0])
    rows = sampled(request_of(tokens, policy))
    assert set(range(NUM_PAIRS)) - set(rows["source_row"]) == {12, 13, 14}
    quarantine = WeightStore(tokens.store).table("quarantine/toy-1").scan().collect()
    problem = "anchors/toy-1/x: anchor: response token 0: log-prob is nan, expected a finite number"
    assert set(quarantine["detail"]) == {f"{problem} (pair {pair_id})" for pair_id in quarantine["pair_id"]}


def test_nothing_but_prompts_without_room_is_an_error(tmp_path, policy, made_up):
    tokens = make_tokens(tmp_path / "bad", **{f"row{i}": {"prompt_ids": [3] * 100} for i in range(NUM_PAIRS)})
    problem = "for example row 0: the prompt has 100 tokens, .*; see quarantine/toy-1"
    with pytest.raises(ScoringError, match=f"none of {NUM_PAIRS} pairs could be given an anchor with .*, {problem}"):
        sampled(request_of(tokens, policy))


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("max_new_tokens", 0, "greater than or equal to 1"),
        ("temperature", 0, "greater than or equal to 0.01"),
        ("temperature", 2.5, "less than or equal to 2"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.5, "less than or equal to 1"),
        ("top_k", -1, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
    ],
)
def test_settings_that_no_sampler_takes_are_refused_by_name(setting, value, problem):
    sections = {
        "dataset": {"name": "toy", "source": "pairs.jsonl"},
        "model": {"path": "model"},
        "weights": {"name": "toy/ti"},
        "store": {"uri": "store"},
        "anchors": {setting: value},
    }
    with pytest.raises(SettingsError, match=rf"anchors\.{setting}.*{problem}"):
        parse_settings(Recipe, sections, "test")


def test_settings_of_the_sampler_have_no_effect_on_responses_to_other_prompts():
    assert AnchorsSection(source="mismatched").result_settings() == {"source": "mismatched"}
    assert "source" not in AnchorsSection(seed=3).result_settings()  # so that sampled ones keep their tables
    with pytest.raises(ValueError, match=r"anchors.seed has no effect with anchors.source 'mismatched': leave it out"):
        AnchorsSection(source="mismatched", seed=3)


# --- responses to other prompts ----------------------------------------------------------------------------------------


def test_a_response_to_another_prompt_is_scored_behind_its_own(tmp_path, policy, made_up):
    """Of a pair it is the one that the last digit says; pairs of one prompt share it."""
    ids = {f"row{index}": {"pair_id": f"{index // 3:012x}{index:020x}"} for index in range(NUM_PAIRS)}
    tokens = make_tokens(tmp_path / "store", **ids)
    made_up()
    request = replace(request_of(tokens, policy), options=MismatchOptions(longest_response(tokens)))
    assert request.options.longest == 6
    fill(request, request.targets[0], MismatchedAnchors(request))
    rows = rows_of(request).to_dicts()
    by_id = {row["pair_id"]: row for row in rows}
    for index, row in enumerate(rows):
        other = by_id[ids[f"row{(index // 3 + 1) % NUM_PROMPTS * 3}"]["pair_id"]]
        wanted = other["rejected_ids" if int(other["pair_id"][-1], 16) % 2 else "chosen_ids"]
        assert row["anchor_ids"] == wanted
        expected = logps(ScoredSequence(row["prompt_ids"], wanted))
        np.testing.assert_allclose(row["anchor_logps"], expected, rtol=2**-12)


def test_one_prompt_has_no_other_one(tokens):
    with pytest.raises(
        InputError, match="all pairs have one prompt, and anchors.source 'mismatched' takes responses to"
    ):
        OtherResponses(tokens)  # the pair_ids of these begin alike


# --- where an anchor ends ----------------------------------------------------------------------------------------------


def test_the_ends_of_a_text_are_read_from_every_config_that_names_them(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": null, "text_config": {"eos_token_id": 5}}')
    assert config_stop_ids(tmp_path) == {5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    assert config_stop_ids(tmp_path) == {5, 6, 7}
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert config_stop_ids(tmp_path) == {0, 6, 7}


def test_another_end_of_a_text_makes_other_anchors(policy):
    before = anchors_identity(policy, SETTINGS, ScoreSection())
    (policy / "generation_config.json").write_text('{"eos_token_id": 9}')
    after = anchors_identity(policy, SETTINGS, ScoreSection())
    assert explain_difference(before, after) == ["sampling.stop_ids: [2] -> [2, 9]"]


def test_the_end_of_a_turn_is_what_responses_end_with_that_were_not_cut(tmp_path):
    assert dataset_stop_ids(make_tokens(tmp_path / "a")) == {TURN_END}
    # Cut at 6 tokens, all of them alike; every other response is shorter.
    cut = {f"row{i}": {"chosen_ids": [1, 2, 3, 4, 5, 99]} for i in range(20)}
    assert dataset_stop_ids(make_tokens(tmp_path / "b", **cut)) == {TURN_END}
    assert (
        dataset_stop_ids(make_tokens(tmp_path / "c", **{f"row{i}": {"rejected_ids": [i]} for i in range(24)})) == set()
    )


# --- the real engine ---------------------------------------------------------------------------------------------------

_SCRIPT = """
import json, sys
from pathlib import Path
from pipeline.engine.contract import EngineSettings, Sampling
from pipeline.engine.score_once import ScoredSequence
from pipeline.engine.vllm_engine import VllmEngine
request = json.loads(Path(sys.argv[1]).read_text())
prompts, seeds = request["prompts"], request["seeds"]
engine = VllmEngine(Path(request["model"]), EngineSettings(dtype="float32", kv_cache_gib=1.0, batch_tokens=256))
sampling = Sampling(max_new_tokens=24, temperature=0.8, top_k=4, top_p=0.95, stop_ids=tuple(request["stop_ids"]))
greedy = Sampling(max_new_tokens=24, temperature=0.01, top_k=0, top_p=1.0, stop_ids=tuple(request["stop_ids"]))
sampled = engine.generate(prompts, sampling, seeds)
alone = [engine.generate([prompt], sampling, [seed])[0] for prompt, seed in reversed(list(zip(prompts, seeds)))]
result = {
    "sampled": sampled,
    "alone": alone[::-1],
    "reseeded": engine.generate(prompts, sampling, [seed + 1 for seed in seeds]),
    "greedy": engine.generate(prompts, greedy, seeds),
    "logps": [s.logps.tolist() for s in engine.score([ScoredSequence(p, a) for p, a in zip(prompts, sampled)])],
    "max_tokens": engine.max_tokens,
}
Path(sys.argv[2]).write_text(json.dumps(result))
"""


@torch.no_grad()
def _all_logps(policy, prompt_ids, response_ids):
    """Log-probs `[T, V]` of every token at each place of the response, by transformers."""
    logits = policy(torch.tensor([prompt_ids + response_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1)


@pytest.mark.slow
def test_the_real_engine_samples_by_seed_and_scores_what_it_samples_as_transformers_does(
    toy_model, toy_pairs, tmp_path
):
    """More prompts than fit into a step of 256 tokens, one of them longer than that, and one with room for three tokens."""
    from transformers import AutoModelForCausalLM

    from pipeline.chat.tokenizer import ChatTokenizer
    from pipeline.source.columns import Columns
    from pipeline.source.pairs import read_pair

    tokenizer, columns = ChatTokenizer(toy_model), Columns()
    pairs = [read_pair(row, columns) for row in toy_pairs[:24]]
    prompts = [tokenizer.tokenize_pair(pair, 1000, 1000, cut_response=False).prompt_ids for pair in pairs]
    policy = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    limit = policy.config.max_position_embeddings - 1
    prompts += [(prompts[0] * 300)[:num_tokens] for num_tokens in (300, limit - 3)]
    stop_ids = sorted(config_stop_ids(toy_model))
    request = {"model": str(toy_model), "prompts": prompts, "stop_ids": stop_ids}
    request["seeds"] = [seed_of(prompt, 0) for prompt in prompts]
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "request.json"), str(tmp_path / "reply.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    reply = json.loads((tmp_path / "reply.json").read_text())

    assert reply["max_tokens"] == limit
    assert reply["alone"] == reply["sampled"] != reply["reseeded"]
    assert len(reply["sampled"][-1]) <= 3
    for prompt, ids, logps_ in zip(prompts, reply["sampled"], reply["logps"], strict=True):
        assert ids[-1] in stop_ids or len(ids) == min(24, limit - len(prompt))
        assert not set(ids[:-1]) & set(stop_ids)
        all_logps = _all_logps(policy, prompt, ids)
        own = all_logps.gather(-1, torch.tensor(ids)[:, None])
        np.testing.assert_allclose(logps_, own[:, 0], atol=1e-2)
        assert (own >= all_logps.topk(4).values[:, 3:] - 1e-3).all()  # top_k
    for prompt, ids in zip(prompts, reply["greedy"], strict=True):
        all_logps = _all_logps(policy, prompt, ids)
        behind = all_logps.max(-1).values - all_logps.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        # At a temperature of 0.01 a token that is 0.3 nats less likely has odds of e^-30.
        assert behind.max() < 0.3
