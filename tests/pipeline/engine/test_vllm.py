"""The real engine against transformers in float32, and its way with prompts that two responses share.

The contract in every way is in test_engine_ways.py.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.source.columns import Columns
from pipeline.source.pairs import read_pair

# A process of its own: the engine binds threads and memory for good.
_SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from pipeline.engine.vllm_engine import EngineSettings, ScoredSequence, VllmEngine
request = json.loads(Path(sys.argv[1]).read_text())
engine = VllmEngine(Path(request["model"]), EngineSettings(dtype=request["dtype"], kv_cache_gib=1.0))
sequences = [ScoredSequence(*ids) for ids in request["sequences"]]
likeliest = [replace(sequence, top_k=request["top_k"]) for sequence in sequences]

def score():
    top = engine.score(likeliest)
    return {
        "way": engine.way,
        "top": [[reply.logps.tolist(), reply.top_ids.tolist(), reply.top_logps.tolist()] for reply in top],
        "replies": [reply.logps.tolist() for reply in engine.score(sequences)],
    }

result = [score()]
engine.way, engine._top_k = "flat", None
result.append(score())
Path(sys.argv[2]).write_text(json.dumps(result))
"""


TOP_K = 5


def _score(model, dtype, sequences, tmp_path):
    """What the engine says by the fast way, which it must have chosen, and by the flat one, its cache warm by then.

    Each is the log-probs, and those of another pass with the ids and log-probs of the likeliest tokens.
    """
    request = {"model": str(model), "dtype": dtype, "sequences": sequences, "top_k": TOP_K}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "request.json"), str(tmp_path / "reply.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    fast, flat = json.loads((tmp_path / "reply.json").read_text())
    assert (fast["way"] != "flat", flat["way"]) == (True, "flat")
    return [([np.array(reply) for reply in by["replies"]], by["top"]) for by in (fast, flat)]


@torch.no_grad()
def _transformers(model, sequences):
    """Log-probs `[T]` of the response and `[T, V]` of all tokens, by transformers in float32, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    result = []
    for prompt_ids, response_ids in sequences:
        ids = torch.tensor([prompt_ids + response_ids])
        all_logps = policy(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        logps = all_logps.gather(-1, ids[0, len(prompt_ids) :, None]).squeeze(-1)
        result.append((logps.numpy(), all_logps.numpy()))
    return result


def _check_likeliest(top, sequences, all_logps, max_nats):
    """The stored lists against a top-k of all log-probs by transformers."""
    for (logps, top_ids, top_logps), (_, response_ids), full in zip(top, sequences, all_logps, strict=True):
        ids, listed = np.array(top_ids), np.array(top_logps)
        assert ids.shape == listed.shape == (len(response_ids), TOP_K)
        np.testing.assert_allclose(listed, torch.tensor(full).topk(TOP_K).values, atol=max_nats)
        np.testing.assert_allclose(listed, np.take_along_axis(full, ids, 1), atol=max_nats)
        is_token = ids == np.array(response_ids)[:, None]
        np.testing.assert_array_equal(listed[is_token], np.array(logps)[is_token.any(1)])  # from the same pass


def _sequences(model, pairs):
    tokenizer, columns = ChatTokenizer(model), Columns()
    sequences = []
    for row in pairs:
        tokens = tokenizer.tokenize_pair(read_pair(row, columns), 1000, 1000, cut_response=False)
        sequences += [(tokens.prompt_ids, tokens.chosen_ids), (tokens.prompt_ids, tokens.rejected_ids)]
    return sequences


def _with_long_shared_parts(sequences, min_tokens=150):
    """Pairs whose responses begin alike for several cache blocks of 32 tokens, and one that repeats another whole."""
    prompt_ids, response_ids = sequences[0]
    long_prompt = (prompt_ids * (1 + min_tokens // len(prompt_ids)))[:min_tokens]
    begin = (response_ids * (1 + min_tokens // len(response_ids)))[:min_tokens]
    shared = [(long_prompt, begin + sequences[i][1]) for i in (2, 3)]
    return [*sequences, *shared, shared[0]]


@pytest.mark.parametrize(("dtype", "mean_nats", "max_nats"), [("float32", 1e-3, 1e-2), ("bfloat16", 2e-2, 0.5)])
def test_engine_agrees_with_transformers(toy_model, toy_pairs, tmp_path, dtype, mean_nats, max_nats):
    sequences = _with_long_shared_parts(_sequences(toy_model, toy_pairs[:20]))
    expected = _transformers(toy_model, sequences)
    logps, all_logps = zip(*expected, strict=True)
    for got, top in _score(toy_model, dtype, sequences, tmp_path):
        assert [len(reply) for reply in got] == [len(response_ids) for _, response_ids in sequences]
        difference = np.abs(np.concatenate(logps) - np.concatenate(got))
        assert difference.mean() < mean_nats
        assert difference.max() < max_nats
        _check_likeliest(top, sequences, all_logps, max_nats)


def test_engine_agrees_with_transformers_on_a_real_model(shared_folder, tmp_path):
    with (shared_folder / "data" / "hh_harmless.jsonl").open(encoding="utf-8") as file:
        pairs = [json.loads(line) for line, _ in zip(file, range(12), strict=False)]
    model = shared_folder / "models" / "tiny-chat"
    sequences = _sequences(model, pairs)
    expected = np.concatenate([logps for logps, _ in _transformers(model, sequences)])
    for got, _ in _score(model, "bfloat16", sequences, tmp_path):
        assert np.abs(expected - np.concatenate(got)).mean() < 2e-2
