"""Score no token twice: the common beginning of responses to one prompt is scored once and copied.

Preference data repeat themselves. Chosen and rejected often begin alike, and one response may be part of many pairs. The
engine's prefix cache shares the computation of whole blocks only; this shares the results of every token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from weights_store.errors import ScoringError


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """One response behind its prompt, as ids. Log-probs are wanted for the response's tokens from `start` on.

    If `top_k` > 0, the k most likely ids at each of these positions and their log-probs are wanted too.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    start: int = 0
    top_k: int = 0

    @property
    def first_row(self) -> int:
        """The row of the model's output that predicts the first wanted token."""
        return len(self.prompt_ids) - 1 + self.start

    @property
    def num_wanted(self) -> int:
        """How many log-probs are wanted."""
        return len(self.response_ids) - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Log-probs of consecutive tokens under one model, in nats; a row is of the distribution that predicts its token.

    `logps` are those of the tokens themselves, float32 `[N]`; `top_ids` and `top_logps` are the most likely ids at each
    position, in falling order, int32 `[N, k]`, and their log-probs, float32. k is 0 if nobody asked for them.
    """

    logps: np.ndarray
    top_ids: np.ndarray
    top_logps: np.ndarray

    @classmethod
    def of(cls, logps: np.ndarray) -> "Scores":
        """Return scores without the most likely ids."""
        return cls(logps, np.empty((len(logps), 0), np.int32), np.empty((len(logps), 0), np.float32))

    @classmethod
    def of_none(cls, top_k: int) -> "Scores":
        """Return the scores of no tokens."""
        return cls(np.empty(0, np.float32), np.empty((0, top_k), np.int32), np.empty((0, top_k), np.float32))

    def first(self, num_tokens: int) -> "Scores":
        """Return the scores of the first tokens."""
        return Scores(self.logps[:num_tokens], self.top_ids[:num_tokens], self.top_logps[:num_tokens])

    def then(self, other: "Scores") -> "Scores":
        """Return these scores followed by those of the next tokens."""
        return Scores(
            np.concatenate([self.logps, other.logps]),
            np.concatenate([self.top_ids, other.top_ids]),
            np.concatenate([self.top_logps, other.top_logps]),
        )


Reply = Scores | ScoringError
"""The scores of one sequence's wanted tokens, or why there are none."""


def score_once(
    sequences: Sequence[ScoredSequence], score: Callable[[list[ScoredSequence]], list[Reply]]
) -> list[Reply]:
    """Return the scores of all tokens of all responses; `score` gets each distinct token once, see `Shared`."""
    shared = Shared(sequences)
    return shared.replies(score(shared.wanted), score)


class Shared:
    """Sequences in lexicographic order, each from the first token on in which it differs from its predecessor.

    The log-prob of a token depends on the ids before it alone. In this order a response shares its longest beginning with its
    predecessor, and copies its values. `wanted` are those that have tokens of their own, in that order, which suits a prefix
    cache. The sequences given have `start` 0 and one `top_k`.
    """

    def __init__(self, sequences: Sequence[ScoredSequence]) -> None:
        self._sequences = sequences
        self._order = sorted(range(len(sequences)), key=lambda i: (sequences[i].prompt_ids, sequences[i].response_ids))
        in_order = [sequences[index] for index in self._order]
        starts = [0, *(_num_shared(*neighbours) for neighbours in pairwise(in_order))]
        self._jobs = [
            replace(sequence, start=start) if start else sequence
            for sequence, start in zip(in_order, starts, strict=False)
        ]
        self.wanted = [job for job in self._jobs if job.num_wanted]

    def replies(self, of_wanted: Sequence[Reply], score: Callable[[list[ScoredSequence]], list[Reply]]) -> list[Reply]:
        """Return the scores of all tokens of each sequence, from those of `wanted`.

        `score` gets the sequences whose predecessor has no scores to copy.
        """
        fresh = iter(of_wanted)
        replies: dict[int, Reply] = {}
        alone: list[int] = []
        last: Reply = ScoringError("nothing has been scored yet")
        for index, job in zip(self._order, self._jobs, strict=True):
            own = next(fresh) if job.num_wanted else Scores.of_none(job.top_k)
            if isinstance(own, ScoringError) or not job.start:
                last = own
            elif isinstance(last, ScoringError):  # there is nothing to copy
                alone.append(index)
            else:
                last = last.first(job.start).then(own)
            replies[index] = last
        if alone:
            replies |= zip(alone, score([self._sequences[i] for i in alone]), strict=True)
        return [replies[index] for index in range(len(self._sequences))]


def _num_shared(one: ScoredSequence, other: ScoredSequence) -> int:
    if one.prompt_ids != other.prompt_ids:
        return 0
    both = list(zip(one.response_ids, other.response_ids, strict=False))
    return next((place for place, (a, b) in enumerate(both) if a != b), len(both))
