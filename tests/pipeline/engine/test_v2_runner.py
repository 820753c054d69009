"""The runner of GPUs, V2, for real: it runs on the CPU, its Triton kernels in Triton's interpreter.

The interpreter is slow and shows no numbers of a GPU's kernels. It does show that vLLM takes our requests, that our hook finds
the rows of every step, and what becomes of cache hits. One process does all of it, and the tests look at what it wrote.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import triton.backends
# vLLM leaves Triton alone on a CPU unless there is a backend of that name. The interpreter needs none, so it is never called.
triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
from vllm.model_executor.models.llama import LlamaForCausalLM
from pipeline.engine.contract import EngineSettings
from pipeline.engine.vllm_engine import VllmEngine
from weights_store.messages import collect_lines
from pipeline.engine.score_once import ScoredSequence, Scores
from weights_store.errors import EngineError

model, sequences = Path(sys.argv[1]), [ScoredSequence(*each) for each in json.loads(Path(sys.argv[2]).read_text())]
reports = []
collect_lines(reports)
engine = VllmEngine(model, EngineSettings(dtype="float32", kv_cache_gib=1.0, batch_tokens=256))
step, lm_head, seen, rows = engine._engine.step, LlamaForCausalLM.compute_logits, [], []

def watched_step():
    rows.append([])
    outputs = step()
    for output in outputs:
        flat = output.prompt_logprobs
        seen.append({
            "finished": output.finished, "num_cached": output.num_cached_tokens,
            "num_flat": None if flat is None else len(flat),
        })
    return outputs

def watched_lm_head(self, hidden_states):
    rows[-1].append(len(hidden_states))
    return lm_head(self, hidden_states)

engine._engine.step, LlamaForCausalLM.compute_logits = watched_step, watched_lm_head

def score(what):
    return [reply.logps.tolist() if isinstance(reply, Scores) else str(reply) for reply in engine.score(what)]

def score_likeliest():
    replies = engine.score([replace(sequence, top_k=4) for sequence in sequences])
    return [[each.logps.tolist(), each.top_ids.tolist(), each.top_logps.tolist()] for each in replies]

result = {"chosen": score(sequences), "way": engine.way, "seen": seen[:], "rows": rows[:3]}
result["likeliest"] = score_likeliest()
result["likeliest_way"], result["reports"] = engine.way, reports
engine.way, engine._top_k = "flat", None
result["flat"] = score(sequences)
engine.way, engine._top_k = "response_rows", None
engine._room = engine.max_tokens + 2  # so that vLLM refuses it, not we
try:
    engine.score([sequences[0], ScoredSequence([1] * (engine.max_tokens + 1), [1])])
except EngineError as error:
    result["refused"] = str(error)
result["left_behind"] = engine._engine.has_unfinished_requests()
result["after"] = score(sequences[:1])
Path(sys.argv[3]).write_text(json.dumps(result))
"""


def _why_not():
    """Return why this runner cannot be tried on this machine, or None."""
    vllm = find_spec("vllm")
    if vllm is None or find_spec("triton") is None:
        return "vLLM's V2 runner needs vllm and triton"
    if torch.cuda.is_available():
        return "a GPU takes this runner by itself, in test_vllm.py"
    if not (Path(vllm.submodule_search_locations[0]) / "v1" / "worker" / "cpu" / "model_runner.py").exists():
        return "this vLLM has no V2 runner for CPUs"
    return None


def _make_model(folder):
    """A tiny Llama of random weights, large enough that log-probs lie far apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    return model


def _make_sequences():
    """Prompt, response, start; a block of the cache has 32 tokens."""
    ids = torch.randint(96, (4, 80), generator=torch.Generator().manual_seed(1)).tolist()
    long_prompt, odd, begin, short = ids[0][:70], ids[1][:33], ids[2][:40], ids[3][:20]
    return [
        (long_prompt, ids[3][:6], 0),
        (long_prompt, ids[2][:5], 0),  # takes two blocks of its prompt from the one before
        (short, [*begin, 1, 2, 3], 0),
        (short, [*begin, 4, 5], 0),  # takes a block that reaches into its response
        (odd, ids[3][40:44], 0),
        (odd, ids[3][44:47], 0),  # takes a block up to the row of its first response token
        (short[:10], begin[:8], 3),
        (ids[0][70:75], ids[0] + ids[2], 0),  # 17 of its tokens fit into the first step
    ]


@torch.no_grad()
def _transformers(model, sequences):
    """Log-probs `[T]` of the wanted tokens and `[T, V]` of all, of each sequence."""
    result = []
    for prompt_ids, response_ids, start in sequences:
        ids = torch.tensor([prompt_ids + response_ids])
        first = len(prompt_ids) + start
        all_logps = model(ids).logits[0, first - 1 : -1].log_softmax(-1)
        result.append((all_logps.gather(-1, ids[0, first:, None]).squeeze(-1).numpy(), all_logps.numpy()))
    return result


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """What the process wrote, and what transformers has to say."""
    if reason := _why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("v2_runner")
    sequences = _make_sequences()
    expected = _transformers(_make_model(folder / "model"), sequences)
    (folder / "sequences.json").write_text(json.dumps(sequences))
    command = [
        sys.executable,
        "-c",
        _SCRIPT,
        *(str(folder / name) for name in ("model", "sequences.json", "result.json")),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=350, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text()), expected


def test_the_engine_chooses_response_rows_by_itself(scored):
    result, _ = scored
    assert (result["way"], result["likeliest_way"]) == ("response_rows", "response_rows")
    assert len(result["reports"]) == 2
    assert "scoring by response_rows: within" in result["reports"][0]
    assert result["reports"][1].endswith("on 8 sequences, 4 most likely tokens included")


@pytest.mark.parametrize("replies", ["chosen", "flat"])
def test_both_ways_agree_with_transformers_on_the_v2_runner(scored, replies):
    result, expected = scored
    assert [len(reply) for reply in result[replies]] == [6, 5, 43, 42, 4, 3, 5, 160]
    difference = np.abs(np.concatenate([logps for logps, _ in expected]) - np.concatenate(result[replies]))
    assert difference.mean() < 1e-3
    assert difference.max() < 1e-2


def test_the_likeliest_tokens_of_the_v2_runner_are_those_of_transformers(scored):
    result, expected = scored
    for (logps, top_ids, top_logps), (_, all_logps) in zip(result["likeliest"], expected, strict=True):
        assert np.shape(top_ids) == np.shape(top_logps) == (len(logps), 4)
        np.testing.assert_allclose(top_logps, torch.tensor(all_logps).topk(4).values, atol=1e-2)
        np.testing.assert_allclose(top_logps, np.take_along_axis(all_logps, np.array(top_ids), 1), atol=1e-2)


def test_the_output_layer_runs_once_a_step_for_all_wanted_rows(scored):
    """And once for the rows that vLLM samples from, before that."""
    result, _ = scored
    # The first step takes 256 tokens, so it ends in the last response. 32 tokens of the fourth sequence are in the cache, its
    # first wanted row is 19: 13 of 42 rows are missing, and it is scored again.
    first = 6 + 5 + 43 + (42 - 13) + 4 + 3 + 5 + (17 - 4)
    assert [calls[1:] for calls in result["rows"]] == [[first], [160 - (17 - 4)], [42]]


def test_cache_hits_are_what_the_contract_tests_take_them_for(scored):
    result, _ = scored
    # Behind a prompt of 70; of 20, beyond its first wanted row, so it was scored again at the end without the cache; and of 33,
    # up to that row.
    hits = [each["num_cached"] for each in result["seen"] if each["num_flat"] is None]
    assert hits[:9] == [0, 64, 0, 32, 0, 32, 0, 0, 0]
    # Flat replies leave out the rows of a hit.
    flat = [(each["num_cached"], each["num_flat"]) for each in result["seen"] if each["num_flat"] is not None]
    assert (64, 70 + 5 - 64) in flat
    assert all(each["finished"] for each in result["seen"])


def test_a_refused_request_leaves_nothing_behind(scored):
    result, expected = scored
    assert "the engine failed: VLLMValidationError" in result["refused"]
    assert result["left_behind"] is False
    np.testing.assert_allclose(result["after"][0], expected[0][0], atol=1e-2)
