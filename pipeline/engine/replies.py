"""Read vLLM's replies to requests for scores into one form, and check them. Nothing here imports vLLM.

A reply that is not what was asked for raises; the caller puts the error in the place of that one sequence.
"""

from typing import Any

import numpy as np

from pipeline.engine.score_once import ScoredSequence, Scores
from weights_store.errors import ScoringError

NOT_FINITE = "expected a finite number"
"""Ends the error of a reply with NaN or an infinity."""
_ROUNDING_NATS = 1e-3
"""Log-probs above 0 by less than this are rounding of log-softmax and become 0; anything above is an error."""


def read_rows(answer: tuple[np.ndarray, np.ndarray, np.ndarray] | None, sequence: ScoredSequence) -> Scores:
    """Return the log-probs of an answer of `response_rows.py`.

    Raises:
        ScoringError: There is no answer.
    """
    if answer is None:
        raise ScoringError(f"expected log-probs for {sequence.num_wanted} response tokens, got none")
    return Scores(*answer)


def read_flat(output: Any, sequence: ScoredSequence) -> Scores:
    """Return the log-probs of flat prompt log-probs, looked up by token id.

    V1 returns rows for all tokens, and leaves those of the cache hit unwritten; V2 leaves those out. Each row has the token
    and then the k most likely ones, which may include it again. vLLM's rank of the token does not help: it counts equally
    likely tokens too.

    Raises:
        ScoringError: The number of rows is wrong, or an id is missing.
    """
    flat, num_cached = output.prompt_logprobs, output.num_cached_tokens or 0
    num_tokens = len(sequence.prompt_ids) + len(sequence.response_ids)
    num_left_out = num_tokens - (0 if flat is None else len(flat))
    if flat is None or num_left_out not in (0, num_cached):
        got = "none" if flat is None else str(len(flat))
        hit = f", or without the {num_cached} of them in the cache" if num_cached else ""
        raise ScoringError(f"expected log-probs for {num_tokens} tokens{hit}, got {got}")
    top_k = sequence.top_k
    logps = np.empty(sequence.num_wanted, np.float32)
    top_ids = np.empty((sequence.num_wanted, top_k), np.int32)
    top_logps = np.empty((sequence.num_wanted, top_k), np.float32)
    for row, token_id in enumerate(sequence.response_ids[sequence.start :]):
        position = sequence.first_row + 1 + row - num_left_out
        place = slice(flat.start_indices[position], flat.end_indices[position])
        entries = dict(zip(flat.token_ids[place], flat.logprobs[place], strict=True))
        where = f"response token {sequence.start + row}"
        if token_id not in entries:
            raise ScoringError(f"{where}: id {token_id} is missing from the reply, which has {list(entries)}")
        if len(entries) < top_k:
            raise ScoringError(f"{where}: expected the {top_k} most likely ids, got {len(entries)}")
        most_likely = sorted(entries, key=entries.__getitem__, reverse=True)[:top_k]
        logps[row], top_ids[row] = entries[token_id], most_likely
        top_logps[row] = [entries[each] for each in most_likely]
    return Scores(logps, top_ids, top_logps)


def checked(scores: Scores, sequence: ScoredSequence, vocab_size: int) -> Scores:
    """Return scores in float32, with rounding above 0 removed.

    Raises:
        ScoringError: They are not what was asked for, or not log-probs.
    """
    num_wanted, top_k = sequence.num_wanted, sequence.top_k
    if scores.logps.shape != (num_wanted,):
        raise ScoringError(f"expected log-probs for {num_wanted} response tokens, got {len(scores.logps)}")
    _check_logps(scores.logps, sequence, "log-prob")
    if top_k:
        if not scores.top_ids.shape == scores.top_logps.shape == (num_wanted, top_k):
            shapes = f"{list(scores.top_ids.shape)} and {list(scores.top_logps.shape)}"
            raise ScoringError(
                f"expected {top_k} most likely ids and log-probs for {num_wanted} response tokens, got {shapes}"
            )
        _check_most_likely(scores, sequence, vocab_size)
    logps, top_logps = (np.minimum(v, 0.0).astype(np.float32, copy=False) for v in (scores.logps, scores.top_logps))
    return Scores(logps, scores.top_ids, top_logps)


def _check_logps(logps: np.ndarray, sequence: ScoredSequence, what: str) -> None:
    """Refuse values that cannot be log-probs; `logps` is `[num_wanted]` or `[num_wanted, k]`."""
    for bad, expected in ((~np.isfinite(logps), NOT_FINITE), (logps > _ROUNDING_NATS, "expected at most 0")):
        if bad.any():
            place = tuple(np.argwhere(bad)[0])
            raise ScoringError(f"response token {sequence.start + place[0]}: {what} is {logps[place]}, {expected}")


def _check_most_likely(scores: Scores, sequence: ScoredSequence, vocab_size: int) -> None:
    """Refuse lists that are not the most likely ids in order, or disagree with the log-probs of the tokens themselves."""
    ids, logps = scores.top_ids, scores.top_logps
    _check_logps(logps, sequence, "log-prob of one of the most likely tokens")
    is_token = ids == np.array(sequence.response_ids[sequence.start :])[:, None]
    own = scores.logps[:, None]
    laws = (
        (((ids < 0) | (ids >= vocab_size)).any(1), f"one is outside the vocabulary of {vocab_size}"),
        ((np.diff(np.sort(ids)) == 0).any(1), "one is listed twice"),
        ((np.diff(logps) > 0).any(1), "they are not in the order of their log-probs"),
        ((is_token & (np.abs(logps - own) > _ROUNDING_NATS)).any(1), "the token itself has another log-prob there"),
        (~is_token.any(1) & (own > logps + _ROUNDING_NATS).any(1), "the token itself is more likely, and not listed"),
    )
    for bad, problem in laws:
        if bad.any():
            row = int(bad.argmax())
            raise ScoringError(f"response token {sequence.start + row}, most likely ids {ids[row].tolist()}: {problem}")
