"""How well token scores predict labels that they have not seen, in nats a pair, and the scale at which they do: pure functions.

A pair's margin is m = sum of the scores of its chosen minus of its rejected tokens. If scores estimate the tokens' rewards, the
Bradley-Terry model says that the label is right with probability sigmoid(a m), and a well-scaled estimate has a = 1. `measure`
fits a by folds, and gives the mean log-likelihood of the labels of the fold that was left out.

The scores themselves must not have seen these labels: models of a contrastive pair "predict" 94 to 100 % of the pairs that they
were trained on. `margins.py` leaves those out.

Where it fails: the log-likelihood orders kinds of scores much like the reward of their policies at equal KL (Spearman 0.75 in
a planted world, 0.67 in the demo's language, see docs/quality.md), but it sees sums over responses, so two sets of scores
with the same sums are the same to it, however their tokens differ; what is in the labels already, a policy can learn by plain
DPO; and figures of different datasets cannot be compared.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from weights_store.tables.checksums import mix

NUM_FOLDS = 5
MIN_PROMPTS = 10
"""With fewer prompts nothing is measured: two or so in each fold say nothing."""
CHANCE = -math.log(2)
"""Log-likelihood of a label by chance, in nats."""
Verdict = Literal["no better than chance", "wrong way round", "overconfident", "underconfident", "calibrated"]

_STANDARD_ERRORS = 2.0
_SAME_SCALE = 1.2
"""Scales that differ by less than this factor count as equal, however many pairs there are."""
_ZERO = 1e-100
"""Margins below this count as 0: their reciprocal would overflow."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What held-out labels say of scores; standard errors (`_se`) allow for pairs of one prompt being alike."""

    num_pairs: int
    num_prompts: int
    log_likelihood: float
    """Mean over the pairs, each held out of the fit of its multiplier, in nats; `CHANCE` if the scores say nothing."""
    log_likelihood_se: float
    accuracy: float
    """Share of the pairs with a margin above 0; a margin of 0 counts half."""
    multiplier: float
    """a, fitted on all pairs: 1 if the scores are log-odds, 0.07 if they are 14 times overconfident."""
    multiplier_se: float

    def verdict(self, scale: float = 1.0) -> Verdict:
        """Return what to make of the scores when they are multiplied by `scale`, which is above 0.

        Differences within two standard errors, and scales that differ by less than a fifth, do not count.
        """
        if self.log_likelihood - CHANCE <= _STANDARD_ERRORS * self.log_likelihood_se:
            return "no better than chance"
        if self.multiplier <= 0:
            return "wrong way round"
        error = _STANDARD_ERRORS * self.multiplier_se
        if self.multiplier + error < scale and self.multiplier * _SAME_SCALE < scale:
            return "overconfident"
        if self.multiplier - error > scale and self.multiplier > scale * _SAME_SCALE:
            return "underconfident"
        return "calibrated"


def measure(margins: np.ndarray, groups: np.ndarray) -> HeldOut | None:
    """Return how well margins predict the labels, None if there are fewer than `MIN_PROMPTS` prompts.

    Args:
        margins: Sum of scores over chosen minus over rejected tokens, `[n]` nats.
        groups: A hash of each pair's prompt, `[n]` uint64: pairs of one prompt are in one fold. Folds depend on nothing else.

    Raises:
        ValueError: A margin is not finite.
    """
    num_prompts = len(np.unique(groups))
    if num_prompts < MIN_PROMPTS:
        return None
    log_likelihoods = held_out_log_likelihoods(margins, groups)
    multiplier, multiplier_se = fit_multiplier(margins, groups)
    return HeldOut(
        num_pairs=len(margins),
        num_prompts=num_prompts,
        log_likelihood=float(log_likelihoods.mean()),
        log_likelihood_se=_mean_se(log_likelihoods, groups),
        accuracy=float(np.mean((np.sign(margins) + 1) / 2)),
        multiplier=multiplier,
        multiplier_se=multiplier_se,
    )


def compare(margins: np.ndarray, others: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return by how much margins predict labels better than other margins of the same pairs, and the standard error, in nats.

    It is the mean difference of the pairs' held-out log-likelihoods, so what makes a pair hard for both does not blur it.

    Raises:
        ValueError: A margin is not finite.
    """
    differences = held_out_log_likelihoods(margins, groups) - held_out_log_likelihoods(others, groups)
    return float(differences.mean()), _mean_se(differences, groups)


def held_out_log_likelihoods(margins: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return log sigmoid(a m) of each pair, `[n]` nats, with a fitted on the other folds.

    Raises:
        ValueError: A margin is not finite.
    """
    x, _ = _rescaled(margins)
    folds = folds_of(groups)
    found = np.empty(len(x))
    for fold in range(NUM_FOLDS):
        is_left_out = folds == fold
        rms, b = _fit(x[~is_left_out])
        found[is_left_out] = -np.logaddexp(0.0, -_multiply(b, rms, x[is_left_out]))
    return found


def folds_of(groups: np.ndarray) -> np.ndarray:
    """Return the fold of each pair, `[n]`, 0 to `NUM_FOLDS` - 1, by the hash of its prompt alone."""
    return (mix(groups.astype(np.uint64)) % np.uint64(NUM_FOLDS)).astype(np.int64)


def fit_multiplier(margins: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return the a that maximises the likelihood of all labels, and its standard error; 0 and 0 if all margins are 0.

    The likelihood has two more pairs, made up, with the root mean square of the margins: one labelled right and one wrong. With
    them a is finite if all labels are right: n equal margins m give a = log(n + 1) / m, the rule of succession.

    Raises:
        ValueError: A margin is not finite.
    """
    x, largest = _rescaled(margins)
    rms, b = _fit(x)
    if rms == 0:
        return 0.0, 0.0
    wrong = _sigmoid(-_multiply(b, rms, x))
    x = x / rms
    curvature = float(np.sum(x**2 * wrong * (1 - wrong))) + 2 * float(_sigmoid(b) * _sigmoid(-b))
    # The sandwich estimate allows for pairs of one prompt that are alike. It is too small where nearly all labels are right,
    # and there the curvature alone is not.
    variance = max(_sum_of_squares(x * wrong, groups) / curvature**2, 1 / curvature)
    return b / rms / largest, math.sqrt(variance) / rms / largest


def _rescaled(margins: np.ndarray) -> tuple[np.ndarray, float]:
    """Return margins over their largest size, `[n]` float64 within -1 and 1, and that size."""
    margins = np.asarray(margins, np.float64)
    if not np.isfinite(margins).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(margins))} of {len(margins)} margins are not finite")
    largest = float(np.abs(margins).max(initial=0.0))
    return (margins / largest, largest) if largest > _ZERO else (np.zeros(len(margins)), 1.0)


def _fit(x: np.ndarray) -> tuple[float, float]:
    """Return the root mean square r of x and the b that maximises sum of log sigmoid(b x / r), made-up pairs included.

    Newton's method on the slope, which falls in b; bisection where a step leaves the interval that holds the root. With n pairs
    b lies within -n and n, because y sigmoid(-b y) is below 0.28 / b and the made-up pairs pull with tanh(b / 2).
    """
    rms = math.sqrt(float(np.mean(x**2))) if len(x) else 0.0
    if rms == 0:
        return 0.0, 0.0
    y = x / rms
    low, high, b = -float(len(y)), float(len(y)), 0.0
    for _ in range(200):
        wrong = _sigmoid(-b * y)
        slope = float(np.sum(y * wrong)) - math.tanh(b / 2)
        curvature = float(np.sum(y**2 * wrong * (1 - wrong))) + 2 * float(_sigmoid(b) * _sigmoid(-b))
        low, high = (b, high) if slope > 0 else (low, b)
        step = b + slope / curvature if curvature > 0 else math.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - b) <= 1e-12 * max(1.0, abs(b)):
            return rms, following
        b = following
    return rms, b


def _multiply(b: float, rms: float, x: np.ndarray) -> np.ndarray:
    """Return b x / rms; 0 where nothing was fitted."""
    return b * (x / rms) if rms else np.zeros(len(x))


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(x) / 2))


def _mean_se(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the standard error of the mean, for pairs of one prompt that may all be alike."""
    return math.sqrt(_sum_of_squares(values - values.mean(), groups)) / len(values)


def _sum_of_squares(values: np.ndarray, groups: np.ndarray) -> float:
    """Return the sum over groups of squared sums over their values, corrected for few groups."""
    _, of_group = np.unique(groups, return_inverse=True)
    sums = np.bincount(of_group, values)
    return float(np.sum(sums**2)) * len(sums) / max(1, len(sums) - 1)
