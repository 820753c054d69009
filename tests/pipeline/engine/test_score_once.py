"""`score_once` against scoring each response alone, over made-up sequences that repeat each other in every way."""

import zlib
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.score_once import ScoredSequence, Scores, score_once
from weights_store.errors import ScoringError

# Two prompts and three ids: equal responses, common beginnings and responses that begin another are the rule. One prompt goes
# on where the other ends, so that equal ids behind different prompts are there as well.
PROMPTS = st.sampled_from([(7,), (7, 0)])
RESPONSES = st.lists(st.integers(0, 2), max_size=6).map(tuple)
TEXTS = st.lists(st.tuples(PROMPTS, RESPONSES), max_size=14)
EXAMPLES = settings(max_examples=300, deadline=None)


def _logp(prompt_ids, response_ids):
    """The made-up model: the last id's log-prob depends on it and every id before it."""
    return np.float32(-zlib.crc32(bytes([*prompt_ids, *response_ids])) / 2**30)


def _alone(text):
    prompt_ids, response_ids = text
    return [float(_logp(prompt_ids, response_ids[: i + 1])) for i in range(len(response_ids))]


def _top_alone(text, top_k):
    """Ids and log-probs that depend on every id before their place, like the model's."""
    prompt_ids, response_ids = text
    firsts = [_logp(prompt_ids, response_ids[:i]) for i in range(len(response_ids))]
    return [[(int(-1e6 * first) + place, float(first) - place) for place in range(top_k)] for first in firsts]


def _scores(text, top_k):
    pairs = np.array(_top_alone(text, top_k)).reshape(len(text[1]), top_k, 2)
    return Scores(np.array(_alone(text), np.float32), pairs[..., 0].astype(np.int32), pairs[..., 1].astype(np.float32))


def _sequences(texts, top_k=0):
    return [ScoredSequence(list(prompt_ids), list(response_ids), top_k=top_k) for prompt_ids, response_ids in texts]


class _Scorer:
    """Scores what it is handed, but the texts that it cannot; remembers all of it."""

    def __init__(self, unscorable=()):
        self.unscorable = set(unscorable)
        self.calls = []

    def __call__(self, sequences):
        self.calls.append(sequences)
        return [self._reply(sequence) for sequence in sequences]

    def _reply(self, sequence):
        assert sequence.num_wanted > 0
        text = (tuple(sequence.prompt_ids), tuple(sequence.response_ids))
        if text in self.unscorable:
            return ScoringError(f"cannot score {text}")
        scores, start = _scores(text, sequence.top_k), sequence.start
        return Scores(scores.logps[start:], scores.top_ids[start:], scores.top_logps[start:])

    def tokens(self):
        """Count the log-probs asked for: prompt, and response up to the token."""
        return Counter(
            (tuple(sequence.prompt_ids), tuple(sequence.response_ids[: place + 1]))
            for sequences in self.calls
            for sequence in sequences
            for place in range(sequence.start, len(sequence.response_ids))
        )


def _distinct_tokens(texts):
    return {(prompt_ids, response_ids[: i + 1]) for prompt_ids, response_ids in texts for i in range(len(response_ids))}


@EXAMPLES
@given(TEXTS)
def test_every_response_gets_the_log_probs_it_has_alone(texts):
    replies = score_once(_sequences(texts), _Scorer())
    assert [reply.logps.tolist() for reply in replies] == [_alone(text) for text in texts]
    assert all(reply.logps.dtype == np.float32 for reply in replies)


@EXAMPLES
@given(TEXTS)
def test_every_token_gets_the_likeliest_ids_of_its_place_whoever_it_is_taken_from(texts):
    replies = score_once(_sequences(texts, top_k=2), _Scorer())
    for text, reply in zip(texts, replies, strict=True):
        expected = _scores(text, 2)
        assert reply.logps.tolist() == expected.logps.tolist()
        assert reply.top_ids.tolist() == expected.top_ids.tolist()
        assert reply.top_logps.tolist() == expected.top_logps.tolist()
        assert reply.top_ids.shape == reply.top_logps.shape == (len(text[1]), 2)


@EXAMPLES
@given(TEXTS)
def test_each_distinct_token_is_scored_exactly_once(texts):
    scorer = _Scorer()
    score_once(_sequences(texts), scorer)
    assert scorer.tokens() == dict.fromkeys(_distinct_tokens(texts), 1)


@EXAMPLES
@given(TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing_but_the_order_of_the_output(texts, random):
    order = list(range(len(texts)))
    random.shuffle(order)
    plain, shuffled = _Scorer(), _Scorer()
    expected = score_once(_sequences(texts), plain)
    got = score_once(_sequences([texts[i] for i in order]), shuffled)
    assert [reply.logps.tolist() for reply in got] == [expected[i].logps.tolist() for i in order]
    assert shuffled.calls == plain.calls


@EXAMPLES
@given(TEXTS, st.data())
def test_an_error_reaches_nobody_else(texts, data):
    unscorable = {text for text in data.draw(st.sets(st.sampled_from(texts))) if text[1]} if texts else set()
    replies = score_once(_sequences(texts), _Scorer(unscorable))
    for text, reply in zip(texts, replies, strict=True):
        if isinstance(reply, ScoringError):
            assert text in unscorable
            assert str(reply) == f"cannot score {text}"
        else:
            assert reply.logps.tolist() == _alone(text)
    assert {text for text, reply in zip(texts, replies, strict=True) if isinstance(reply, ScoringError)} == unscorable


@EXAMPLES
@given(TEXTS)
def test_the_responses_of_a_prompt_stand_side_by_side_for_the_prefix_cache(texts):
    scorer = _Scorer()
    score_once(_sequences(texts), scorer)
    prompts = [tuple(sequence.prompt_ids) for sequence in scorer.calls[0]]
    assert prompts == sorted(prompts)


def test_what_is_shared_is_the_longest_beginning_with_any_other():
    # In order: a, ab, ab, abc, b. Behind the first, each lacks what the one before it does not have.
    scorer = _Scorer()
    score_once(_sequences([((7,), ids) for ids in [(0, 1, 2), (0, 1), (1,), (0,), (0, 1)]]), scorer)
    assert [(sequence.response_ids, sequence.start) for sequence in scorer.calls[0]] == [
        ([0], 0),
        ([0, 1], 1),
        ([0, 1, 2], 2),
        ([1], 0),
    ]


def test_what_depends_on_an_error_is_scored_alone():
    # The first cannot be scored; the second was to take its first log-prob from it, the third from the second.
    scorer = _Scorer({((7,), (0, 0))})
    replies = score_once(_sequences([((7,), (0, 0)), ((7,), (0, 1)), ((7,), (0, 1, 2))]), scorer)
    assert isinstance(replies[0], ScoringError)
    assert [reply.logps.tolist() for reply in replies[1:]] == [_alone(((7,), (0, 1))), _alone(((7,), (0, 1, 2)))]
    assert [sequence.start for sequence in scorer.calls[1]] == [0, 0]


def test_nothing_gives_nothing():
    assert score_once([], _Scorer()) == []
