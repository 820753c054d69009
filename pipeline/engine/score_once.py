"""Score no token twice: what responses behind the same prompt have in common is scored once and copied.

Preference data repeat themselves. Chosen and rejected often begin alike, and where several pairs come from one set of responses
the same response stands in many of them. The engine's prefix cache shares only the computation of whole blocks; this shares
the results, to the token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weights_store.errors import ScoringError


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """One response behind its prompt, as ids; log-probs are wanted of the response's tokens from `start` on.

    With `top_k` > 0 those of the likeliest ids at each of these places are wanted as well.
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
    """What one model says of tokens that follow each other, in nats; a row comes from the distribution that predicts its token.

    Args:
        logps: Of the tokens themselves, float32 `[N]`.
        top_ids: The likeliest ids at each place, likeliest first, int32 `[N, k]`; k is 0 where nobody asked for them.
        top_logps: Their log-probs, float32 `[N, k]`.
    """

    logps: np.ndarray
    top_ids: np.ndarray
    top_logps: np.ndarray

    @classmethod
    def of(cls, logps: np.ndarray) -> "Scores":
        """Return scores without likeliest ids."""
        return cls(logps, np.empty((len(logps), 0), np.int32), np.empty((len(logps), 0), np.float32))

    @classmethod
    def of_none(cls, top_k: int) -> "Scores":
        """Return the scores of no tokens."""
        return cls(np.empty(0, np.float32), np.empty((0, top_k), np.int32), np.empty((0, top_k), np.float32))

    def first(self, num_tokens: int) -> "Scores":
        """Return those of the first tokens."""
        return Scores(self.logps[:num_tokens], self.top_ids[:num_tokens], self.top_logps[:num_tokens])

    def then(self, other: "Scores") -> "Scores":
        """Return these and, behind them, those of the tokens that follow."""
        return Scores(
            np.concatenate([self.logps, other.logps]),
            np.concatenate([self.top_ids, other.top_ids]),
            np.concatenate([self.top_logps, other.top_logps]),
        )


Reply = Scores | ScoringError
"""Of the wanted tokens of one sequence, `num_wanted` of them, or why there are none."""


def score_once(
    sequences: Sequence[ScoredSequence], score: Callable[[list[ScoredSequence]], list[Reply]]
) -> list[Reply]:
    """Return the scores of all tokens of all responses, handing each distinct one to `score` once.

    What the model says of a token depends on nothing but the ids before it. In lexicographic order a response shares its
    longest beginning with the one before it, so that one is where the values come from. `score` gets the sequences in that
    order, those of one prompt side by side, as a prefix cache likes it.

    Args:
        sequences: With `start` 0, and one `top_k`.
        score: Returns the scores of `num_wanted` tokens for each sequence, or an error in their place.
    """
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].prompt_ids, sequences[i].response_ids))
    jobs: list[ScoredSequence] = []
    for before, index in zip([None, *order], order, strict=False):
        jobs.append(replace(sequences[index], start=_num_shared(sequences, before, index)))
    wanted = [job for job in jobs if job.num_wanted]
    fresh = iter(score(wanted))
    replies: dict[int, Reply] = {}
    alone: list[int] = []
    last: Reply = ScoringError("nothing has been scored yet")
    for index, job in zip(order, jobs, strict=True):
        own = next(fresh) if job.num_wanted else Scores.of_none(job.top_k)
        if isinstance(own, ScoringError) or not job.start:
            last = own
        elif isinstance(last, ScoringError):  # what it would have taken over is not there
            alone.append(index)
        else:
            last = last.first(job.start).then(own)
        replies[index] = last
    for index, reply in zip(alone, score([sequences[i] for i in alone]) if alone else [], strict=True):
        replies[index] = reply
    return [replies[index] for index in range(len(sequences))]


def _num_shared(sequences: Sequence[ScoredSequence], before: int | None, index: int) -> int:
    if before is None or sequences[before].prompt_ids != sequences[index].prompt_ids:
        return 0
    one, other = sequences[before].response_ids, sequences[index].response_ids
    both = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))
