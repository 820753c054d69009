"""The two ways to ask vLLM for log-probs, and how they are compared.

* `response_rows`: log-probs of the wanted rows alone, through our worker extension `response_rows.py`. Fast;
* `flat`: vLLM's flat prompt log-probs, looked up by token id (their order has changed between versions). Uses nothing internal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.engine.replies import read_flat, read_rows
from pipeline.engine.score_once import Reply, ScoredSequence, Scores
from weights_store.errors import ScoringError

RESPONSE_ROWS, FLAT = WAYS = ("response_rows", "flat")
READERS: dict[str, Callable[[Any, ScoredSequence], Scores]] = {
    RESPONSE_ROWS: read_rows,
    FLAT: read_flat,
}
MEAN_TOLERANCE_NATS = 0.02
"""Mean difference of two ways that is rounding: bfloat16 moves by 2e-3 with the batch, a misplaced row by nats."""


def mean_difference(replies: Sequence[Reply], expected: Sequence[Reply]) -> float | None:
    """Return the mean |difference| in nats; None without any scores, infinite if only one of two replies has scores.

    Of the most likely tokens the log-probs are compared, not the ids: equally likely ones may come in any order. They have a
    mean of their own, because they outnumber the tokens themselves; the larger mean counts.
    """
    both = list(zip(replies, expected, strict=True))
    if any(isinstance(a, ScoringError) != isinstance(b, ScoringError) for a, b in both):
        return float("inf")
    scores = [(a, b) for a, b in both if isinstance(a, Scores) and isinstance(b, Scores)]
    if not scores:
        return None
    own = np.concatenate([np.abs(a.logps - b.logps) for a, b in scores])
    top = np.concatenate([np.abs(a.top_logps - b.top_logps).ravel() for a, b in scores])
    return max(float(gap.mean()) for gap in (own, top) if gap.size)
