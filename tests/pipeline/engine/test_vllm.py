"""The real engine against transformers in float32, and its way with prompts that two responses share.

The contract in every way is in test_engine_ways.py.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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
sequences = [ScoredSequence(*ids) for ids in request["sequences"]]
longest = max(len(sequence.prompt_ids + sequence.response_ids) for sequence in sequences)
settings = EngineSettings(dtype=request["dtype"], kv_cache_gib=1.0, longest=longest)
engine = VllmEngine(Path(request["model"]), settings)
likeliest = [replace(sequence, top_k=request["top_k"]) for sequence in sequences]

def score():
    top = engine.score(likeliest)
    return {
        "way": engine.way,
        "top": [[reply.logps.tolist(), reply.top_ids.tolist(), reply.top_logps.tolist()] for reply in top],
        "replies": [reply.logps.tolist() for reply in engine.score(sequences)],
    }

def own():
    return {"replies": [reply.logps.tolist() for reply in engine.score(sequences)], "way": engine.way}

result = [score()]
engine.way, engine._top_k = "flat", None
result.append(score())
exchanged = []
if "other" in request:
    engine.way = None
    engine._engine.reset_prefix_cache()
    exchanged.append(own())
    for model in (request["other"], request["model"]):
        engine.load(Path(model))
        exchanged.append(own())
room = engine._engine.model_config.max_model_len
try:
    engine.score([ScoredSequence([5] * room, [6])])
except Exception as error:
    refused = repr(error)
result += [exchanged, {"room": room, "max_tokens": engine.max_tokens, "refused": refused}]
Path(sys.argv[2]).write_text(json.dumps(result))
"""


TOP_K = 5


def _score(model, dtype, sequences, tmp_path, **other):
    """What the engine says by the fast way, which it must have chosen, and by the flat one, its cache warm by then.

    Each is the log-probs, and those of another pass with the ids and log-probs of the likeliest tokens. Then follow the
    log-probs of the model, of the `other` one in the same engine, and of the first one again; and how long it was started for.
    """
    request = {"model": str(model), "dtype": dtype, "sequences": sequences, "top_k": TOP_K, **other}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "request.json"), str(tmp_path / "reply.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    fast, flat, exchanged, size = json.loads((tmp_path / "reply.json").read_text())
    assert (fast["way"] != "flat", flat["way"]) == (True, "flat")
    assert all(each["way"] == fast["way"] for each in exchanged)  # chosen again
    by_way = [([np.array(reply) for reply in by["replies"]], by["top"]) for by in (fast, flat)]
    return by_way, [np.concatenate(each["replies"]) for each in exchanged], size


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


def _make_another(model, folder, tied, seed):
    """A copy with weights that are a little off, and its lm_head apart from its embeddings if it is not `tied`."""
    shutil.copytree(model, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["tie_word_embeddings"]
    torch.manual_seed(seed)
    if not tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    changed = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("dtype", "mean_nats", "max_nats", "tied"), [("float32", 1e-3, 1e-2, True), ("bfloat16", 2e-2, 0.5, False)]
)
def test_engine_agrees_with_transformers(toy_model, toy_pairs, tmp_path, dtype, mean_nats, max_nats, tied):
    """Also after its weights were exchanged for those of another model, and bit for bit after they were exchanged back."""
    sequences = _with_long_shared_parts(_sequences(toy_model, toy_pairs[:20]))
    model, other = (_make_another(toy_model, tmp_path / str(seed), tied, seed) for seed in (0, 1))
    expected = _transformers(model, sequences)
    logps, all_logps = zip(*expected, strict=True)
    by_way, (fresh, of_other, again), size = _score(model, dtype, sequences, tmp_path, other=str(other))
    np.testing.assert_array_equal(again, fresh)
    expected_of_other = np.concatenate([logps for logps, _ in _transformers(other, sequences)])
    assert np.abs(expected_of_other - of_other).mean() < mean_nats
    assert np.abs(expected_of_other - fresh).mean() > 2 * mean_nats
    longest = max(len(prompt_ids + response_ids) for prompt_ids, response_ids in sequences)
    assert size["room"] == -(-(longest + 1) // 256) * 256  # one position more, in steps of 256
    assert size["max_tokens"] == 2047
    assert f"SequenceLengthError('a sequence has {size['room'] + 1} tokens" in size["refused"]
    for got, top in by_way:
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
    for got, _ in _score(model, "bfloat16", sequences, tmp_path)[0]:
        assert np.abs(expected - np.concatenate(got)).mean() < 2e-2
