"""The contract of `VllmEngine` in each of its ways, against a made-up engine that replies with vLLM's own classes.

What the made-up engine does at a cache hit is what vLLM 0.32 was seen to do; the real ones are in test_vllm.py (V1) and
test_v2_runner.py (V2).
"""

import os
from dataclasses import fields, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from pipeline.engine.contract import EngineSettings
from pipeline.engine.response_rows import KEY
from pipeline.engine.score_once import ScoredSequence
from pipeline.engine.vllm_engine import VllmEngine
from pipeline.engine.vllm_start import _gpu_arguments, own_length_counts
from pipeline.engine.ways import FLAT, RESPONSE_ROWS
from weights_store.errors import EngineError, InputError, OutOfMemoryError, ScoringError

# Prompts of 5, 3 and 2 ids, responses of 4, 2, 3 and 1; the third wants no log-prob of its first response id.
SEQUENCES = [
    ScoredSequence([11, 12, 13, 14, 15], [21, 22, 23, 24]),
    ScoredSequence([11, 12, 13], [25, 11]),
    ScoredSequence([16, 17], [26, 27, 28], start=1),
    ScoredSequence([16, 17], [29]),
]
EVERY_WAY = pytest.mark.parametrize("way", [RESPONSE_ROWS, FLAT])
EVERY_RUNNER = pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
VOCAB_SIZE = 100


def _logp(before, token_id):
    """The made-up model: depends on every id before the token and their order; exact in float32."""
    return -(1 + sum((place + 3) * one for place, one in enumerate([*before, token_id])) % 97) / 16


def _expected(sequence):
    ids = sequence.prompt_ids + sequence.response_ids
    first = len(sequence.prompt_ids) + sequence.start
    return [_logp(ids[:place], ids[place]) for place in range(first, len(ids))]


def _likeliest(before, top_k):
    """Ids and log-probs; of ids that are as likely the smaller comes first, as in no particular order of vLLM's."""
    logps = sorted((-_logp(before, token_id), token_id) for token_id in range(VOCAB_SIZE))[:top_k]
    return [(token_id, -logp) for logp, token_id in logps]


def _expected_top(sequence):
    """Log-probs of the likeliest at the places of the wanted tokens."""
    ids = sequence.prompt_ids + sequence.response_ids
    first = len(sequence.prompt_ids) + sequence.start
    return [[logp for _, logp in _likeliest(ids[:place], sequence.top_k)] for place in range(first, len(ids))]


def _ids(sequence):
    return tuple(sequence.prompt_ids + sequence.response_ids)


class _MadeUpEngine:
    """What `VllmEngine` uses of `vllm.LLMEngine`, with a prefix cache that holds what the test says.

    Args:
        v2: Whether it behaves like the V2 runner.
        hits: Number of cached tokens by the ids of a request.
        unwritten: What stands in rows that a cache hit left unwritten.
        spoil: What becomes of the rows of a request, by its ids: row i is the log-prob of token i + 1.
    """

    def __init__(self, v2, *, hits=None, unwritten=-0.5, spoil=None):
        self.vllm_config = SimpleNamespace(use_v2_model_runner=v2)
        self.model_config = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: VOCAB_SIZE)
        self.hits, self.unwritten, self.spoil = hits or {}, unwritten, spoil or {}
        self.heeds_skip = True
        self.refuses = lambda num_added, params: None
        self.fails = lambda num_steps: None
        self.lacks: set[str] = set()
        self.fast_shift = self.fast_top_shift = 0.0
        self.added, self.waiting, self.ran, self.answers = [], [], [], {}
        self.num_steps = 0

    # What VllmEngine calls.

    def add_request(self, request_id, prompt, params):
        if error := self.refuses(len(self.added), params):
            raise error
        request = (request_id, tuple(prompt["prompt_token_ids"]), params)
        self.added.append(request)
        self.waiting.append(request)

    def abort_request(self, request_ids, internal=False):
        self.waiting = [request for request in self.waiting if request[0] not in request_ids]

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        """Finish the last two requests, the last one first: replies come in any order."""
        self.num_steps += 1
        if error := self.fails(self.num_steps):
            raise error
        done, self.waiting = self.waiting[-2:], self.waiting[:-2]
        self.ran += done
        return [self._reply(*request) for request in reversed(done)]

    def collective_rpc(self, method, args=()):
        if method in self.lacks:
            raise AttributeError(f"no attribute {method!r}")
        if method == "tokenweights_install":
            self.installed = True
            return [None]
        assert method == "tokenweights_take"
        return [{key: self.answers.pop(key) for key in args[0] if key in self.answers}]

    # How it replies.

    def _reply(self, request_id, ids, params):
        from vllm import RequestOutput

        num_cached = 0 if params.skip_reading_prefix_cache and self.heeds_skip else self.hits.get(ids, 0)
        rows = np.array([_logp(ids[: i + 1], ids[i + 1]) for i in range(len(ids) - 1)], np.float32)
        flat = None
        if params.extra_args:
            self._answer(ids, rows, num_cached, *params.extra_args[KEY])
        elif params.prompt_logprobs is not None:
            flat = self._flat(ids, rows, num_cached, params)
        return RequestOutput(
            request_id,
            None,
            list(ids),
            outputs=[],
            finished=True,
            num_cached_tokens=num_cached,
            prompt_logprobs=flat,
        )

    def _answer(self, ids, rows, num_cached, key, first_row, top_k):
        assert self.installed
        spoilt = self._spoilt(ids, rows)
        if spoilt is not None and num_cached < len(rows):
            spoilt[:num_cached] = self.unwritten
            listed = [_likeliest(ids[: row + 1], top_k) for row in range(first_row, len(ids) - 1)]
            top = np.array(listed, np.float32).reshape(len(listed), top_k, 2)
            shifted = top[..., 1] + np.float32(self.fast_shift + self.fast_top_shift)
            self.answers[key] = (
                spoilt[first_row:] + np.float32(self.fast_shift),
                top[..., 0].astype(np.int32),
                shifted,
            )

    def _flat(self, ids, rows, num_cached, params):
        from vllm.logprobs import append_logprobs_for_next_position, create_prompt_logprobs

        spoilt = self._spoilt(ids, rows)
        if spoilt is None:
            return None
        flat = create_prompt_logprobs(params.flat_logprobs)
        spoilt[:num_cached] = self.unwritten
        first = num_cached if self.vllm_config.use_v2_model_runner else 0  # V2 leaves the rows of a hit out
        for row in range(first, len(spoilt)):
            top = _likeliest(ids[: row + 1], params.prompt_logprobs)
            top_ids, top_logps = [each[0] for each in top], [each[1] for each in top]
            names = [None] * (1 + len(top))
            append_logprobs_for_next_position(
                flat, [ids[row + 1], *top_ids], [float(spoilt[row]), *top_logps], names, 1, len(top)
            )
        return flat

    def _spoilt(self, ids, rows):
        return self.spoil.get(ids, lambda rows: rows)(rows)


@pytest.fixture(autouse=True)
def _environment():
    """Take back the variables that vLLM and the engine set for a process of their own."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Return a function that starts a `VllmEngine` on a made-up engine: `start(made_up, way)`."""
    import vllm

    def start(made_up, way=None, **settings):
        def from_engine_args(arguments):
            if isinstance(made_up, Exception):
                raise made_up
            return made_up

        monkeypatch.setattr(vllm.LLMEngine, "from_engine_args", from_engine_args)
        engine = VllmEngine(tmp_path, EngineSettings(**settings))
        engine.way = way
        return engine

    return start


def _values(replies):
    return [reply if isinstance(reply, ScoringError) else reply.logps.tolist() for reply in replies]


# --- what all of this takes for granted --------------------------------------------------------------------------------


def test_vllm_has_what_the_engine_uses_by_these_names():
    from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
    from vllm.config import CompilationMode, CUDAGraphMode, SchedulerConfig, VllmConfig
    from vllm.logprobs import create_prompt_logprobs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.worker.gpu_worker import Worker as GPUWorker

    asked = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
        "skip_reading_prefix_cache": False,
        "prompt_logprobs": 0,
        "flat_logprobs": True,
        "extra_args": {"tokenweights": [0, 3, 0]},
    }
    params = SamplingParams(**asked)
    assert {name: getattr(params, name) for name in asked} == asked
    sampled = {"temperature": 0.8, "seed": 7, "top_k": 50, "top_p": 0.95, "stop_token_ids": [2]}
    params = SamplingParams(**sampled)
    assert {name: getattr(params, name) for name in sampled} == sampled
    output = RequestOutput("7", None, [1, 2], prompt_logprobs=None, outputs=[], finished=True)
    read = {"request_id", "num_cached_tokens", "prompt_logprobs", "finished"}
    assert read <= vars(output).keys()
    assert {"start_indices", "end_indices", "token_ids", "logprobs"} <= vars(create_prompt_logprobs(True)).keys()
    called = ("from_engine_args", "add_request", "abort_request", "has_unfinished_requests", "step", "collective_rpc")
    called += ("reset_prefix_cache",)
    assert callable(getattr(GPUWorker, "reload_weights", None))
    assert callable(getattr(EngineArgs, "create_model_config", None))
    names = {"max_model_len", "compilation_config", "enforce_eager", "max_num_seqs", "block_size"}
    assert names <= {each.name for each in fields(EngineArgs)}
    assert CUDAGraphMode["FULL_DECODE_ONLY"]
    assert CompilationMode(0).name == "NONE"
    assert [name for name in called if not callable(getattr(LLMEngine, name, None))] == []
    assert isinstance(VllmConfig.use_v2_model_runner, property)
    assert {"enable_chunked_prefill", "max_num_batched_tokens"} <= {field.name for field in fields(SchedulerConfig)}


# --- what is asked, and what comes back --------------------------------------------------------------------------------


@EVERY_WAY
@EVERY_RUNNER
def test_replies_land_at_their_sequence_in_whatever_order_they_come(start, way, v2):
    made_up = _MadeUpEngine(v2)
    engine = start(made_up, way)
    replies = engine.score(SEQUENCES)
    assert [ids for _, ids, _ in made_up.ran] != [_ids(sequence) for sequence in SEQUENCES]
    assert _values(replies) == [_expected(sequence) for sequence in SEQUENCES]
    assert {reply.logps.dtype for reply in replies} == {np.dtype(np.float32)}


@EVERY_WAY
@EVERY_RUNNER
def test_every_request_reads_the_cache_and_generates_one_token(start, way, v2):
    made_up = _MadeUpEngine(v2)
    start(made_up, way).score(SEQUENCES)
    assert [ids for _, ids, _ in made_up.added] == [_ids(sequence) for sequence in SEQUENCES]
    for _, _, params in made_up.added:
        assert (params.max_tokens, params.temperature, params.detokenize) == (1, 0.0, False)
        assert params.skip_reading_prefix_cache is False  # None would mean True for requests that want log-probs


def test_response_rows_asks_under_a_key_of_its_own_from_the_first_wanted_row_on(start):
    made_up = _MadeUpEngine(v2=False)
    engine = start(made_up, RESPONSE_ROWS)
    engine.score(SEQUENCES)
    engine.score(SEQUENCES[:1])
    asked = [params.extra_args[KEY] for _, _, params in made_up.added]
    assert [first_row for _, first_row, _ in asked] == [4, 2, 2, 1, 4]
    assert len({key for key, _, _ in asked}) == 5
    assert [int(request_id) for request_id, _, _ in made_up.added] == [key for key, _, _ in asked]
    assert {top_k for _, _, top_k in asked} == {0}
    assert all(params.prompt_logprobs is None for _, _, params in made_up.added)


def test_flat_asks_for_no_more_than_the_tokens_themselves(start):
    made_up = _MadeUpEngine(v2=False)
    start(made_up, FLAT).score(SEQUENCES)
    for _, _, params in made_up.added:
        assert (params.prompt_logprobs, params.flat_logprobs) == (0, True)
        assert params.extra_args is None


@EVERY_WAY
@EVERY_RUNNER
def test_progress_hears_of_each_sequence_once(start, way, v2):
    heard = []
    hits = {_ids(SEQUENCES[0]): 8}
    start(_MadeUpEngine(v2, hits=hits), way).score(SEQUENCES, heard.append)
    assert sorted(heard) == [1, 2, 2, 4]


def test_no_sequences_choose_no_way(start, logged):
    made_up = _MadeUpEngine(v2=True)
    engine = start(made_up)
    assert engine.score([]) == []
    assert (engine.way, logged.lines, made_up.added) == (None, [], [])


# --- sequences that are begun before others have ended -----------------------------------------------------------------


@EVERY_WAY
@EVERY_RUNNER
def test_what_is_begun_next_fills_the_steps_in_which_the_first_ends(start, way, v2):
    made_up = _MadeUpEngine(v2, hits={_ids(SEQUENCES[0]): 8})
    engine = start(made_up, way)
    first, second = engine.begin(SEQUENCES[:3]), engine.begin(SEQUENCES[3:])
    assert made_up.added == []
    assert _values(first()) == [_expected(sequence) for sequence in SEQUENCES[:3]]
    # All four were in the engine before it ended any; the first was scored again without the cache.
    assert [ids for _, ids, _ in made_up.added] == [_ids(SEQUENCES[i]) for i in (0, 1, 2, 3, 0)]
    num_steps = made_up.num_steps
    assert _values(second()) == [_expected(SEQUENCES[3])]
    assert made_up.num_steps == num_steps
    assert _values(engine.begin(SEQUENCES)()) == [_expected(sequence) for sequence in SEQUENCES]


@pytest.mark.parametrize(
    ("sequences", "num_added"),
    [
        ([ScoredSequence([place] * 40, [5] * 10) for place in range(50)], 21),  # 20 * 50 < 4 * 256 <= 21 * 50
        (
            [ScoredSequence([1] * 40, [place] * 10) for place in range(150)],
            99,
        ),  # 40 + 98 * 10 < 4 * 256 <= 40 + 99 * 10
    ],
    ids=["apart", "one prompt"],
)
def test_requests_are_handed_over_as_four_steps_need_them_a_shared_prompt_once(start, sequences, num_added):
    made_up = _MadeUpEngine(v2=True)
    engine = start(made_up, RESPONSE_ROWS, batch_tokens=256)
    made_up.fails = lambda num_steps: ValueError("stop")
    with pytest.raises(EngineError, match="stop"):
        engine.score(sequences)
    assert len(made_up.added) == num_added


def test_requests_that_an_engine_loses_are_an_error(start):
    made_up = _MadeUpEngine(v2=True)
    engine = start(made_up, RESPONSE_ROWS)
    made_up.has_unfinished_requests = lambda: False
    with pytest.raises(EngineError, match="4 requests have no answer"):
        engine.score(SEQUENCES)


# --- cache hits --------------------------------------------------------------------------------------------------------


@EVERY_WAY
@EVERY_RUNNER
@pytest.mark.parametrize("num_cached", [5, 7])
@pytest.mark.parametrize("unwritten", [-0.5, float("nan")])
def test_a_hit_beyond_the_first_wanted_row_is_scored_again_without_the_cache(start, way, v2, num_cached, unwritten):
    # Row 4 of the first sequence predicts its first response id: a hit of 5 or more leaves it unwritten.
    made_up = _MadeUpEngine(v2, hits={_ids(SEQUENCES[0]): num_cached}, unwritten=unwritten)
    replies = start(made_up, way).score(SEQUENCES)
    assert _values(replies) == [_expected(sequence) for sequence in SEQUENCES]
    asked = [(ids, params.skip_reading_prefix_cache) for _, ids, params in made_up.added]
    assert asked == [*((_ids(sequence), False) for sequence in SEQUENCES), (_ids(SEQUENCES[0]), True)]


@EVERY_WAY
@EVERY_RUNNER
def test_a_hit_up_to_the_first_wanted_row_is_used(start, way, v2):
    # Rows 4, 2, 2 and 1 are the first that are wanted; the last sequence has no hit.
    hits = dict(zip(map(_ids, SEQUENCES), (4, 2, 2), strict=False))
    made_up = _MadeUpEngine(v2, hits=hits)
    replies = start(made_up, way).score(SEQUENCES)
    assert _values(replies) == [_expected(sequence) for sequence in SEQUENCES]
    assert len(made_up.added) == 4


@EVERY_WAY
@EVERY_RUNNER
def test_an_engine_that_takes_rows_from_its_cache_against_orders_is_refused(start, way, v2):
    made_up = _MadeUpEngine(v2, hits={_ids(SEQUENCES[1]): 3})
    made_up.heeds_skip = False
    replies = _values(start(made_up, way).score(SEQUENCES))
    assert "read rows from its cache that it was told to compute" in str(replies.pop(1))
    assert replies == [_expected(SEQUENCES[i]) for i in (0, 2, 3)]


# --- replies that break the contract -----------------------------------------------------------------------------------


def _changed(row, value):
    def change(rows):
        rows[row] = value
        return rows

    return change


# The first sequence: 9 ids, wanted are rows 4 to 7.
@EVERY_WAY
@EVERY_RUNNER
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: None, "expected log-probs for (4 response|9) tokens, got none"),
        (lambda rows: rows[:-1], "expected log-probs for (4 response|9) tokens, got (3|8)"),
        (_changed(6, float("nan")), "response token 2: log-prob is nan, expected a finite number"),
        (_changed(4, float("inf")), "response token 0: log-prob is inf, expected a finite number"),
        (_changed(7, float("-inf")), "response token 3: log-prob is -inf, expected a finite number"),
        (_changed(5, 0.25), "response token 1: log-prob is 0.25, expected at most 0"),
    ],
    ids=["none", "one short", "nan", "inf", "-inf", "above 0"],
)
def test_a_reply_that_breaks_the_contract_is_an_error_in_its_place_alone(start, way, v2, spoil, message):
    made_up = _MadeUpEngine(v2, spoil={_ids(SEQUENCES[0]): spoil})
    first, *others = start(made_up, way).score(SEQUENCES)
    assert isinstance(first, ScoringError)
    with pytest.raises(ScoringError, match=message):
        raise first
    assert _values(others) == [_expected(sequence) for sequence in SEQUENCES[1:]]


@EVERY_WAY
@EVERY_RUNNER
def test_an_error_names_the_place_in_the_whole_response(start, way, v2):
    # The third sequence wants its response tokens 1 and 2; row 3 is that of token 2.
    made_up = _MadeUpEngine(v2, spoil={_ids(SEQUENCES[2]): _changed(3, 7.0)})
    assert "response token 2: log-prob is 7.0" in str(start(made_up, way).score(SEQUENCES)[2])


@EVERY_WAY
@EVERY_RUNNER
def test_rounding_above_zero_becomes_zero(start, way, v2):
    made_up = _MadeUpEngine(v2, spoil={_ids(SEQUENCES[3]): _changed(1, 5e-4)})
    assert start(made_up, way).score(SEQUENCES)[3].logps.tolist() == [0.0]


def test_flat_refuses_a_reply_that_leaves_out_other_rows_than_those_in_the_cache(start):
    # V2 leaves out the rows of a hit, here 3 of 9; a reply with one row less again must not be read one place off.
    made_up = _MadeUpEngine(v2=True, hits={_ids(SEQUENCES[0]): 3}, spoil={_ids(SEQUENCES[0]): lambda rows: rows[:-1]})
    reply = start(made_up, FLAT).score(SEQUENCES)[0]
    assert str(reply) == "expected log-probs for 9 tokens, or without the 3 of them in the cache, got 5"


# --- choosing a way ----------------------------------------------------------------------------------------------------


@EVERY_RUNNER
def test_the_fast_way_of_the_runner_is_taken_where_it_agrees(start, v2, logged):
    made_up = _MadeUpEngine(v2)
    engine = start(made_up)
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == RESPONSE_ROWS
    assert logged.lines == ["scoring by response_rows: within 0.0e+00 nats of flat prompt log-probs on 4 sequences"]
    engine.score(SEQUENCES)
    assert len(logged.lines) == 1
    assert len(made_up.added) == 4 * 4  # fast and flat to choose, then twice the way chosen


def test_eight_sequences_choose_the_way(start, logged):
    sequences = [ScoredSequence([11, 12], [13, token_id]) for token_id in range(20, 31)]
    made_up = _MadeUpEngine(v2=True)
    engine = start(made_up)
    engine.score(sequences)
    assert logged.lines[0].endswith("on 8 sequences")
    assert len(made_up.added) == 8 + 8 + 11


@EVERY_RUNNER
def test_a_fast_way_that_differs_is_left(start, v2, logged):
    made_up = _MadeUpEngine(v2)
    made_up.fast_shift = -0.03125
    engine = start(made_up)
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == FLAT
    assert logged.lines == [
        "scoring by vLLM's flat prompt log-probs: response_rows differs from them by 0.031 nats in the mean on 4 sequences, "
        "expected at most 0.02"
    ]


@EVERY_RUNNER
def test_a_difference_that_rounding_explains_is_none(start, v2):
    made_up = _MadeUpEngine(v2)
    made_up.fast_shift = -0.015625
    engine = start(made_up)
    engine.score(SEQUENCES)
    assert engine.way == RESPONSE_ROWS


@EVERY_RUNNER
def test_a_fast_way_without_an_answer_where_flat_has_one_is_left(start, v2, logged):
    made_up = _MadeUpEngine(v2)
    made_up._answer = lambda *request: None
    engine = start(made_up)
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == FLAT
    assert "response_rows differs from them by inf nats" in logged.lines[0]


def test_a_fast_way_that_this_vllm_refuses_is_left_and_its_requests_never_run(start, logged):
    from vllm.exceptions import VLLMValidationError

    def refuses(num_added, params):  # the third request: two have been taken by then
        if params.extra_args is not None and num_added == 2:
            return VLLMValidationError("extra_args requires --moonlight")
        return None

    made_up = _MadeUpEngine(v2=True)
    made_up.refuses = refuses
    engine = start(made_up)
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == FLAT
    assert logged.lines == [
        "scoring by vLLM's flat prompt log-probs: response_rows failed with VLLMValidationError: extra_args requires "
        "--moonlight"
    ]
    assert [params.prompt_logprobs for _, _, params in made_up.ran] == [0] * 4


@pytest.mark.parametrize("method", ["tokenweights_install", "tokenweights_take"])
@EVERY_RUNNER
def test_a_runner_without_what_the_hook_needs_is_scored_the_flat_way(start, method, v2, logged):
    made_up = _MadeUpEngine(v2)
    made_up.lacks = {method}
    engine = start(made_up)
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == FLAT
    assert f"response_rows failed with AttributeError: no attribute '{method}'" in logged.lines[0]


def test_a_reply_that_cannot_be_read_leaves_the_fast_way_and_nothing_behind(start, logged):
    made_up = _MadeUpEngine(v2=True)
    made_up._answer = lambda ids, rows, num_cached, key, *asked: made_up.answers.update({key: 5})
    engine = start(made_up)
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == FLAT
    assert "response_rows failed with TypeError" in logged.lines[0]
    assert [params.prompt_logprobs for _, _, params in made_up.ran] == [None] * 4 + [0] * 4


# --- the likeliest tokens ----------------------------------------------------------------------------------------------

TOP = [replace(sequence, top_k=3) for sequence in SEQUENCES]


@EVERY_WAY
@EVERY_RUNNER
def test_the_likeliest_tokens_come_with_those_of_the_response(start, way, v2):
    made_up = _MadeUpEngine(v2, hits={_ids(TOP[0]): 5, _ids(TOP[1]): 2})  # the first is scored again without the cache
    engine = start(made_up, way)
    replies = engine.score(TOP)
    assert engine.way == way
    assert _values(replies) == [_expected(sequence) for sequence in TOP]
    assert [reply.top_logps.tolist() for reply in replies] == [_expected_top(sequence) for sequence in TOP]
    for sequence, reply in zip(TOP, replies, strict=True):
        ids = sequence.prompt_ids + sequence.response_ids
        for row, (top_ids, top_logps) in enumerate(zip(reply.top_ids, reply.top_logps, strict=True)):
            before = ids[: sequence.first_row + 1 + row]
            assert [_logp(before, token_id) for token_id in top_ids.tolist()] == top_logps.tolist()


def test_the_way_is_chosen_anew_for_scorers_that_store_no_likeliest_tokens(start, logged):
    made_up = _MadeUpEngine(v2=True)
    made_up.fast_top_shift = -0.03125
    engine = start(made_up)
    assert _values(engine.score(TOP)) == [_expected(sequence) for sequence in TOP]
    assert engine.way == FLAT
    assert _values(engine.score(SEQUENCES)) == [_expected(sequence) for sequence in SEQUENCES]
    assert engine.way == RESPONSE_ROWS
    assert logged.lines[1:] == ["scoring by response_rows: within 0.0e+00 nats of flat prompt log-probs on 4 sequences"]


def test_response_rows_is_taken_where_its_likeliest_tokens_agree_as_well(start, logged):
    engine = start(_MadeUpEngine(v2=False))
    engine.score(TOP)
    assert engine.way == RESPONSE_ROWS
    assert logged.lines == [
        "scoring by response_rows: within 0.0e+00 nats of flat prompt log-probs on 4 sequences, 3 most likely tokens included"
    ]


def test_a_way_is_left_whose_likeliest_tokens_alone_differ(start, logged):
    made_up = _MadeUpEngine(v2=False)
    made_up.fast_top_shift = -0.03125
    # Responses of tokens that are never among the likeliest.
    sequences = [ScoredSequence([11, 12], [_unlikely([11, 12], place)], top_k=3) for place in range(4)]
    engine = start(made_up)
    engine.score(sequences)
    assert engine.way == FLAT
    assert "response_rows differs from them by 0.031 nats in the mean on 4 sequences" in logged.lines[0]


def _unlikely(before, place):
    return _likeliest(before, VOCAB_SIZE)[-1 - place][0]


def test_a_response_whose_own_log_probs_contradict_the_likeliest_is_an_error_in_its_place_alone(start):
    # Row 5 is that of response token 1 of the first sequence; nothing is as likely as -0.03125.
    made_up = _MadeUpEngine(v2=False, spoil={_ids(TOP[0]): _changed(5, -0.03125)})
    first, *others = start(made_up, RESPONSE_ROWS).score(TOP)
    with pytest.raises(ScoringError, match="response token 1, .*: the token itself is more likely, and not listed"):
        raise first
    assert _values(others) == [_expected(sequence) for sequence in TOP[1:]]


# --- failures of the engine --------------------------------------------------------------------------------------------


def _dead():
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError()


FAILURES = pytest.mark.parametrize(
    ("make_failure", "kind", "message"),
    [
        (
            lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"),
            OutOfMemoryError,
            "the engine ran out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
            OutOfMemoryError,
            "the engine ran out of memory: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory",
        ),
        (MemoryError, OutOfMemoryError, "the engine ran out of memory: "),
        (lambda: ValueError("too bad\nat line 7"), EngineError, "the engine failed: ValueError: too bad"),
        (_dead, EngineError, "the engine failed: EngineDeadError: EngineCore encountered an issue"),
    ],
    ids=["cuda", "cpu", "python", "other", "dead"],
)


@FAILURES
@EVERY_WAY
@EVERY_RUNNER
def test_a_step_that_fails_is_an_error_of_the_engine(start, way, v2, make_failure, kind, message):
    made_up = _MadeUpEngine(v2)
    made_up.fails = lambda num_steps: make_failure() if num_steps == 2 else None
    with pytest.raises(EngineError) as caught:
        start(made_up, way).score(SEQUENCES)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@FAILURES
@EVERY_RUNNER
def test_a_step_that_fails_while_a_way_is_chosen_chooses_none(start, v2, make_failure, kind, message, logged):
    made_up = _MadeUpEngine(v2)
    made_up.fails = lambda num_steps: make_failure() if num_steps == 2 else None
    engine = start(made_up)
    with pytest.raises(EngineError) as caught:
        engine.score(SEQUENCES)
    assert type(caught.value) is kind
    assert (engine.way, logged.lines) == (None, [])


@EVERY_WAY
@EVERY_RUNNER
def test_a_refusal_of_the_chosen_way_is_an_error_of_the_engine_and_leaves_nothing_behind(start, way, v2):
    from vllm.exceptions import VLLMValidationError

    made_up = _MadeUpEngine(v2)
    made_up.refuses = lambda num_added, params: (
        VLLMValidationError("the prompt is too long") if num_added == 2 else None
    )
    engine = start(made_up, way)
    with pytest.raises(EngineError, match="the engine failed: VLLMValidationError: the prompt is too long"):
        engine.score(SEQUENCES)
    assert made_up.waiting == []
    made_up.refuses = lambda num_added, params: None
    assert _values(engine.score(SEQUENCES[2:])) == [_expected(sequence) for sequence in SEQUENCES[2:]]
    assert len(made_up.ran) == 2


def invalid(text):
    """The error of pydantic that vLLM's configs raise; its first line only counts problems."""
    lines = [{"type": PydanticCustomError("value_error", text), "input": None}]
    return ValidationError.from_exception_data("ModelConfig", lines)


@EVERY_RUNNER
def test_a_request_that_is_refused_while_a_way_is_chosen_takes_nothing_from_the_queue(start, v2, logged):
    """Scorers that store the most likely tokens choose the way again, ahead of what was begun before them."""
    from vllm.exceptions import VLLMValidationError

    made_up = _MadeUpEngine(v2)
    engine = start(made_up)
    engine.score(SEQUENCES)
    num_added = len(made_up.added)
    made_up.refuses = lambda num, params: (
        VLLMValidationError("no more") if params.extra_args and num == num_added + 2 else None
    )
    first = engine.begin(SEQUENCES)
    second = engine.begin([replace(sequence, top_k=3) for sequence in SEQUENCES])
    assert "response_rows failed with VLLMValidationError: no more" in logged.lines[1]
    made_up.refuses = lambda num, params: None
    assert _values(first()) == _values(second()) == [_expected(sequence) for sequence in SEQUENCES]
    # The two that were handed over before the refusal have been dropped.
    assert len(made_up.ran) == len(made_up.added) - 2


# --- starting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "counts"),
    [({"rope_type": "llama3", "factor": 8.0}, False), ({"type": "dynamic"}, True), ({"rope_type": "longrope"}, True)],
)
def test_models_whose_numbers_depend_on_it_are_started_for_their_own_length(rope, counts):
    assert own_length_counts({"model_type": "llama", "rope_scaling": rope}) is counts
    assert own_length_counts({"model_type": "llama4_text"})


def test_an_engine_knows_its_limits(start):
    engine = start(_MadeUpEngine(v2=True))
    assert (engine.max_tokens, engine.vocab_size) == (63, 100)  # one of the 64 positions is for the generated token


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            ValueError("No available memory for the cache blocks."),
            OutOfMemoryError,
            "no memory for the model .*: No avail",
        ),
        (RuntimeError("HIP out of memory"), OutOfMemoryError, "no memory for the model .* in vLLM: HIP out of memory"),
        (OSError("no config.json\nhere"), InputError, "vLLM cannot load the model .*: no config.json$"),
        (ValueError(), InputError, "vLLM cannot load the model .*: ValueError$"),
        (
            ValueError(
                "The repository x contains custom code.\nPlease pass the argument `trust_remote_code=True` to run it."
            ),
            InputError,
            r"vLLM cannot load the model .*: it needs Python code of its own \(auto_map\), which is never run; give a model",
        ),
        (
            invalid("Value error, Model architectures are not supported"),
            InputError,
            "model .*: Value error, Model arch",
        ),
        (KeyError("bug"), KeyError, "bug"),
    ],
    ids=["no cache", "no memory", "no file", "no text", "own code", "of pydantic", "bug"],
)
def test_an_engine_that_does_not_start_says_why(start, failure, kind, message):
    with pytest.raises(kind, match=message):
        start(failure)


@pytest.mark.parametrize(("step_tokens", "num_sequences"), [(16_384, 512), (256, 256)])
def test_a_step_has_no_more_sequences_than_tokens(step_tokens, num_sequences):
    """vLLM refuses to start otherwise, and halving after a lack of memory goes down to 256 tokens."""
    assert _gpu_arguments(EngineSettings(), step_tokens)["max_num_seqs"] == num_sequences
