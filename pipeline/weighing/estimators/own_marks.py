"""Estimators from what users or rules say of tokens: their own weights, patterns in the text, differences of two responses."""

import numpy as np

from pipeline.marks.patterns import pattern_weights
from pipeline.weighing.estimators.registry import SideScores, SideWeights, estimator
from pipeline.weighing.keys import DiffGamma, Patterns, Per, Rest, Roles


@estimator("column", "your own", "own weights")
def column(scores: SideScores, *, per: Per = "token") -> SideWeights:  # noqa: ARG001 - the annotation has one per token
    """Return the number that a column of the source has for the token, or the mean of those of its characters."""
    return _own(scores)


@estimator("spans", "your own", "own weights", zero_at={"rest": 0})
def spans(scores: SideScores, *, rest: Rest = 1.0) -> SideWeights:  # noqa: ARG001 - the annotation has them already
    """Return the mean over a token's characters: the weight of the last span around it that the source has, or `rest`."""
    return _own(scores)


def _own(scores: SideScores) -> SideWeights:
    assert scores.own_weights is not None, "no weights of the user's own: run stage annotate first"
    return SideWeights(scores.own_weights)


@estimator("pattern", "your own", "text", zero_at={"rest": 0})
def pattern(scores: SideScores, *, patterns: Patterns = (), roles: Roles = (), rest: Rest = 1.0) -> SideWeights:
    """Return the mean over a token's characters: the weight of the last pattern that matches it, of its role, or `rest`.

    Raises:
        ValueError: A pattern takes too long.
    """
    assert scores.texts is not None, "no texts"
    of_roles = _own(scores).token_weights if roles else np.full(scores.num_tokens, rest, np.float32)
    weights, num_matches = pattern_weights(scores.texts, patterns, of_roles)
    return SideWeights(weights, num_matches=tuple(num_matches.tolist()))


@estimator("diff", "DDPO of RLHF-V, 2312.00849", "other response", zero_at={"diff_gamma": 0})
def diff(scores: SideScores, *, diff_gamma: DiffGamma = 5.0) -> SideWeights:
    """Return diff_gamma for tokens that are not in the longest common subsequence of both responses, 1 for the others.

    DDPO, arXiv 2312.00849, divides the response's log-prob by the sum of these weights. We do not; transform `mean_one` does,
    and multiplies by the number of tokens.
    """
    assert scores.differs is not None, "no comparison with the other response"
    return SideWeights(np.where(scores.differs, np.float32(diff_gamma), np.float32(1)))
