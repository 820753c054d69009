"""The scoring contract against made-up engine replies; the real engine is in test_vllm.py."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.engine.replies import checked, read_flat
from pipeline.engine.score_once import ScoredSequence, Scores
from weights_store.errors import ScoringError

SEQUENCE = ScoredSequence(prompt_ids=[11, 12], response_ids=[13, 11])


class _Flat:
    """vLLM's flat log-probs: per position a run of (token id, log-prob); none for the first position."""

    def __init__(self, *positions):
        self.start_indices, self.end_indices, self.token_ids, self.logprobs = [], [], [], []
        for entries in positions:
            self.start_indices.append(len(self.token_ids))
            for token_id, logprob in entries:
                self.token_ids.append(token_id)
                self.logprobs.append(logprob)
            self.end_indices.append(len(self.token_ids))

    def __len__(self):
        return len(self.start_indices)


def _read(*positions, sequence=SEQUENCE):
    output = SimpleNamespace(prompt_logprobs=_Flat(*positions) if positions else None, num_cached_tokens=0)
    return checked(read_flat(output, sequence), sequence, vocab_size=100)


def test_log_probs_are_those_of_the_response_ids_looked_up_by_id():
    # The asked id stands first, or second behind the most likely one: its place must not matter.
    scores = _read([], [(12, -9.0)], [(99, -0.1), (13, -1.5)], [(11, -0.25), (98, -4.0)])
    np.testing.assert_array_equal(scores.logps, np.array([-1.5, -0.25], np.float32))
    assert scores.top_ids.shape == scores.top_logps.shape == (2, 0)


def test_rounding_above_zero_becomes_zero():
    assert _read([], [(12, -9.0)], [(13, 5e-4)], [(11, -0.25)]).logps.tolist() == [0.0, -0.25]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (([], [(12, -9.0)], [(13, -1.0)]), "expected log-probs for 4 tokens, got 3"),
        (([], [(12, -9.0)], [(99, -1.0)], [(11, -1.0)]), "response token 0: id 13 is missing"),
        (([], [(12, -9.0)], [(13, -1.0)], []), "response token 1: id 11 is missing"),
        (([], [(12, -9.0)], [(13, float("nan"))], [(11, -1.0)]), "response token 0: log-prob is nan"),
        (([], [(12, -9.0)], [(13, -1.0)], [(11, float("-inf"))]), "response token 1: log-prob is -inf"),
        (([], [(12, -9.0)], [(13, -1.0)], [(11, 0.5)]), "response token 1: log-prob is 0.5, expected at most 0"),
    ],
)
def test_a_reply_that_breaks_the_contract_says_how(positions, message):
    with pytest.raises(ScoringError, match=re.escape(message)):
        _read(*positions)


def test_no_reply_at_all():
    with pytest.raises(ScoringError, match="expected log-probs for 4 tokens, got none"):
        _read()


# --- the likeliest tokens ----------------------------------------------------------------------------------------------

TWO = replace(SEQUENCE, top_k=2)


def test_the_likeliest_are_taken_by_their_log_probs_and_the_token_itself_counts_once():
    # vLLM gives the token, then the two likeliest: the token is not among them, or stands there again.
    scores = _read(
        [], [(12, -9.0), (5, -1.0), (6, -2.0)], [(13, -3.5), (7, -0.5), (8, -1.5)], [(11, -2.0), (9, -0.25), (11, -2.0)],
        sequence=TWO,
    )  # fmt: skip
    assert scores.logps.tolist() == [-3.5, -2.0]
    assert scores.top_ids.tolist() == [[7, 8], [9, 11]]
    assert scores.top_logps.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
    assert (scores.top_ids.dtype, scores.top_logps.dtype) == (np.int32, np.float32)


def test_of_three_that_are_as_likely_two_are_the_likeliest_whatever_rank_vllm_gives_the_token():
    scores = _read([], [], [(13, -1.0), (7, -1.0), (8, -1.0)], [(11, -1.0), (9, -1.0), (11, -1.0)], sequence=TWO)
    assert scores.top_logps.tolist() == [[-1.0, -1.0], [-1.0, -1.0]]
    assert set(scores.top_ids[1]) == {9, 11}


def test_fewer_ids_than_asked_for_are_an_error():
    with pytest.raises(ScoringError, match="response token 1: expected the 2 most likely ids, got 1"):
        _read([], [], [(13, -1.0), (7, -1.0)], [(11, -1.0), (11, -1.0)], sequence=TWO)


def _top(ids=((7, 8), (9, 11)), logps=((-0.5, -1.5), (-0.25, -2.0)), own=(-3.5, -2.0)):
    return Scores(np.array(own, np.float32), np.array(ids, np.int32), np.array(logps, np.float32))


def test_likeliest_tokens_that_go_with_the_response_pass_and_rounding_above_zero_becomes_zero():
    assert checked(_top(), TWO, 100).top_logps.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
    rounded = checked(_top(logps=((5e-4, -9.0), (-0.25, -2.0)), own=(-9.5, -2.0)), TWO, 100)
    assert rounded.top_logps[0].tolist() == [0.0, -9.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (_top(ids=((7,), (9,))), "expected 2 most likely ids and log-probs for 2 response tokens, got [2, 1] and [2, 2]"),
        (_top(logps=((-0.5, float("nan")), (-0.25, -2.0))), "log-prob of one of the most likely tokens is nan"),
        (_top(logps=((-0.5, -1.5), (0.5, -2.0))), "response token 1: log-prob of one of the most likely tokens is 0.5"),
        (_top(ids=((7, 8), (100, 11))), "response token 1, most likely ids [100, 11]: one is outside the vocabulary of 100"),
        (_top(ids=((-1, 8), (9, 11))), "response token 0, most likely ids [-1, 8]: one is outside the vocabulary"),
        (_top(ids=((7, 7), (9, 11))), "response token 0, most likely ids [7, 7]: one is listed twice"),
        (_top(logps=((-1.5, -0.5), (-0.25, -2.0))), "response token 0, most likely ids [7, 8]: they are not in the order"),
        (_top(own=(-3.5, -1.0)), "response token 1, most likely ids [9, 11]: the token itself has another log-prob there"),
        (_top(own=(-1.0, -2.0)), "response token 0, most likely ids [7, 8]: the token itself is more likely, and not listed"),
        (_top(ids=((8, 7), (11, 9))), "response token 1, most likely ids [11, 9]: the token itself has another log-prob there"),
    ],
)  # fmt: skip
def test_likeliest_tokens_that_break_the_contract_say_how(scores, message):
    with pytest.raises(ScoringError, match=re.escape(message)):
        checked(scores, TWO, 100)
