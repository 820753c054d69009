"""The scoring contract against made-up engine replies; the real engine is in test_vllm.py."""

import numpy as np
import pytest

from pipeline.engine import _read_flat
from pipeline.sharing import ScoredSequence
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


def _read(*positions):
    return _read_flat(_Flat(*positions), SEQUENCE)


def test_log_probs_are_those_of_the_response_ids_looked_up_by_id():
    # The asked id stands first, or second behind the most likely one: its place must not matter.
    logps = _read([], [(12, -9.0)], [(99, -0.1), (13, -1.5)], [(11, -0.25), (98, -4.0)])
    np.testing.assert_array_equal(logps, np.array([-1.5, -0.25], np.float32))


def test_rounding_above_zero_becomes_zero():
    assert _read([], [(12, -9.0)], [(13, 5e-4)], [(11, -0.25)]).tolist() == [0.0, -0.25]


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
    problem = _read(*positions)
    assert isinstance(problem, ScoringError)
    assert message in str(problem)


def test_no_reply_at_all():
    assert "got none" in str(_read_flat(None, SEQUENCE))


def test_a_runner_that_is_not_the_known_one_is_told_of_without_killing_the_engine():
    """What vLLM calls goes on; the failure comes out where the answers are fetched."""
    from types import SimpleNamespace

    from pipeline.response_rows import KEY, ResponseRows

    request = SimpleNamespace(sampling_params=SimpleNamespace(extra_args={KEY: [0, 1]}))  # without prompt_token_ids
    worker = ResponseRows()
    worker.model_runner = SimpleNamespace(
        _get_prompt_logprobs_dict=lambda hidden, scheduled: {"own": scheduled}, requests={"a": request}
    )
    worker.tokenweights_install()
    assert worker.model_runner._get_prompt_logprobs_dict(None, {"a": 4}) == {"own": {"a": 4}}
    with pytest.raises(AttributeError, match="prompt_token_ids"):
        worker.tokenweights_take()
