"""The hooks in vLLM's workers, on made-up runners whose hidden states and output layer are known.

The real runners are in test_vllm.py (V1) and test_v2_runner.py (V2).
"""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.engine import response_rows
from pipeline.engine.response_rows import KEY, ResponseRows

VOCAB_SIZE, WIDTH = 11, 4
# By request: ids, what is asked (key, first row, top k), tokens of its steps. The third asks for nothing of ours.
REQUESTS = {
    "a": ([1, 2, 3, 4, 5, 6, 7], [50, 2, 0], [4, 3]),  # its wanted rows 2 to 5 are computed in two steps
    "b": ([8, 9, 10, 0, 1], [51, 3, 2], [5, 1]),  # row 3 alone; the second step adds a token
    "c": ([3, 3, 3], None, [3, 0]),
    "d": ([5, 4, 3, 2], [52, 0, 3], [2, 2]),
}


def _hidden(request_id):
    """The hidden states of a request's prompt, `[tokens, width]`."""
    seed = ord(request_id)
    return torch.randn(len(REQUESTS[request_id][0]), WIDTH, generator=torch.Generator().manual_seed(seed))


class _Model:
    """Counts the calls of its output layer."""

    def __init__(self):
        self.weight = 3 * torch.randn(VOCAB_SIZE, WIDTH, generator=torch.Generator().manual_seed(0))
        self.num_rows = []

    def compute_logits(self, hidden):
        self.num_rows.append(len(hidden))
        return hidden @ self.weight.T


class _Step:
    """One engine step: which requests, how many of their tokens are done, and how many it computes."""

    def __init__(self, number):
        self.tokens = {name: steps[number] for name, (_, _, steps) in REQUESTS.items() if steps[number]}
        self.done = {name: sum(REQUESTS[name][2][:number]) for name in self.tokens}
        self.starts = np.cumsum([0, *self.tokens.values()])
        parts = []
        for name, num_tokens in self.tokens.items():
            rows = _hidden(name)[self.done[name] : self.done[name] + num_tokens]
            parts += [rows, torch.full((num_tokens - len(rows), WIDTH), 7.0)]  # a generated token
        self.hidden = torch.cat([*parts, torch.full((3, WIDTH), float("nan"))])  # padding


def _params(name):
    asked = REQUESTS[name][1]
    return SimpleNamespace(extra_args=None if asked is None else {KEY: asked})


def _worker(**parts):
    worker = ResponseRows()
    model_config = SimpleNamespace(get_vocab_size=lambda: VOCAB_SIZE)
    worker.model_runner = SimpleNamespace(model=_Model(), model_config=model_config, **parts)
    return worker


def _run_v1(worker, steps):
    runner = worker.model_runner
    for step in steps:
        runner.requests = {
            name: SimpleNamespace(
                prompt_token_ids=REQUESTS[name][0], num_computed_tokens=step.done[name], sampling_params=_params(name)
            )
            for name in step.tokens
        }
        runner.input_batch = SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(step.tokens)})
        runner.query_start_loc = SimpleNamespace(np=step.starts)
        assert runner._get_prompt_logprobs_dict(step.hidden, step.tokens) == {"of": "V1"}


def _run_v2(worker, steps):
    runner, slots = worker.model_runner, dict(zip(REQUESTS, (6, 1, 4, 0), strict=True))
    all_ids, lens = torch.full((8, 16), -1, dtype=torch.int32), np.zeros(8, np.int32)
    for name, slot in slots.items():
        ids = REQUESTS[name][0]
        all_ids[slot, : len(ids)], lens[slot] = torch.tensor(ids), len(ids)
        # Another request had this slot before.
        runner.prompt_logprobs_worker.add_request("before", slot, SimpleNamespace(extra_args={KEY: [99, 0, 0]}))
        assert runner.prompt_logprobs_worker.add_request(name, slot, _params(name)) == "added by V2"
    for step in steps:
        names = list(step.tokens)
        batch = SimpleNamespace(
            req_ids=names,
            idx_mapping_np=np.array([slots[name] for name in names]),
            num_computed_prefill_tokens_np=np.array([step.done[name] for name in names]),
            num_scheduled_tokens=np.array([step.tokens[name] for name in names]),
            query_start_loc_np=step.starts,
        )
        compute = runner.prompt_logprobs_worker.compute_prompt_logprobs
        assert compute(runner.model.compute_logits, step.hidden, batch, all_ids, None, lens) == {"of": "V2"}


def _worker_of(version):
    if version == "V1":
        return _worker(_get_prompt_logprobs_dict=lambda hidden, scheduled: {"of": "V1"}), _run_v1
    own = SimpleNamespace(
        add_request=lambda *request: "added by V2", compute_prompt_logprobs=lambda *step: {"of": "V2"}
    )
    return _worker(prompt_logprobs_worker=own), _run_v2


EVERY_RUNNER = pytest.mark.parametrize("version", ["V1", "V2"])


def _check(answers, model):
    for ids, asked, _ in [REQUESTS[name] for name in "abd"]:
        key, first_row, top_k = asked
        name = next(name for name, request in REQUESTS.items() if request[1] is asked)
        expected = (_hidden(name)[first_row:-1] @ model.weight.T).double().log_softmax(-1)
        logps, top_ids, top_logps = answers.pop(key)
        assert (logps.dtype, top_ids.dtype, top_logps.dtype) == (np.float32, np.int32, np.float32)
        wanted = expected.gather(-1, torch.tensor(ids[first_row + 1 :])[:, None])[:, 0]
        np.testing.assert_allclose(logps, wanted, rtol=1e-5)
        np.testing.assert_array_equal(top_ids, expected.topk(top_k).indices)
        np.testing.assert_allclose(top_logps, expected.topk(top_k).values, rtol=1e-5)
    assert answers == {}


@EVERY_RUNNER
def test_the_wanted_rows_of_all_requests_of_a_step_are_scored_in_one_call(version):
    worker, run = _worker_of(version)
    worker.tokenweights_install()
    run(worker, [_Step(0), _Step(1)])
    # First step: rows 2 and 3 of a, 3 of b, 0 and 1 of d. Second step: rows 4 and 5 of a, 2 of d.
    assert worker.model_runner.model.num_rows == [5, 3]
    _check(worker.tokenweights_take([50, 51, 52, 53]), worker.model_runner.model)
    assert worker.tokenweights_take([50, 51, 52]) == {}


@EVERY_RUNNER
def test_blocks_bound_the_memory_and_change_no_number(version, monkeypatch):
    monkeypatch.setattr(response_rows, "CPU_BLOCK_BYTES", 2 * 4 * VOCAB_SIZE)
    monkeypatch.setattr(response_rows, "_LEAST_ROWS", 1)
    worker, run = _worker_of(version)
    worker.tokenweights_install()
    run(worker, [_Step(0), _Step(1)])
    assert worker.model_runner.model.num_rows == [2, 2, 1, 2, 1]
    _check(worker.tokenweights_take([50, 51, 52]), worker.model_runner.model)


@EVERY_RUNNER
def test_rows_that_no_step_computed_are_nan(version):
    """A cache hit leaves them out."""
    worker, run = _worker_of(version)
    worker.tokenweights_install()
    run(worker, [_Step(1)])
    logps, top_ids, top_logps = worker.tokenweights_take([52])[52]
    assert np.isnan(logps).tolist() == [True, True, False]
    assert (top_ids < 0).all(1).tolist() == np.isnan(top_logps).all(1).tolist() == [True, True, False]


@EVERY_RUNNER
def test_rows_that_are_computed_again_after_a_preemption_count_once(version):
    worker, run = _worker_of(version)
    worker.tokenweights_install()
    run(worker, [_Step(0), _Step(0), _Step(1)])
    _check(worker.tokenweights_take([50, 51, 52]), worker.model_runner.model)


@EVERY_RUNNER
def test_a_runner_that_is_not_the_known_one_is_told_of_without_killing_the_engine(version):
    """What vLLM calls goes on; the failure comes out where the answers are fetched. It keeps no hidden states in memory."""
    worker, run = _worker_of(version)
    worker.tokenweights_install()
    worker.model_runner.model_config = None
    steps = [_Step(0), _Step(1)]
    memories = [weakref.ref(step.hidden) for step in steps]
    run(worker, steps)
    del steps
    assert [memory() for memory in memories] == [None, None]
    with pytest.raises(AttributeError, match="get_vocab_size"):
        worker.tokenweights_take([50])


@EVERY_RUNNER
def test_a_step_that_runs_out_of_memory_says_so_at_once(version):
    worker, run = _worker_of(version)
    worker.tokenweights_install()

    def fails(hidden):
        raise torch.OutOfMemoryError("CUDA out of memory")

    worker.model_runner.model.compute_logits = fails
    with pytest.raises(torch.OutOfMemoryError):
        run(worker, [_Step(0)])
