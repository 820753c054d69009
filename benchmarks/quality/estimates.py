"""Token scores made of the constructions: cross-fitted, bagged, stacked, iterated, and a model that was given.

Every score of a pair comes from models and fits that have not seen its label, except where its name says so.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.quality.scores import Scorers, Scores, as_pairs, difference, head_of, margins_of, weights_of
from benchmarks.quality.worlds import Row
from train.data.stored_pairs import Pair
from weights_store.tables.checksums import mix

NUM_FOLDS = 4
DPO_LOSS = {"name": "dpo", "beta": 0.1}


def out_of_fold(num_pairs: int, score: Callable[[np.ndarray, np.ndarray], Scores], seed: int = 0) -> Scores:
    """Return scores of all pairs; `score` takes the indices of kept pairs and of those left out, and scores the latter.

    Folds are drawn by `seed`, not by order: in some worlds prompts come in turns.
    """
    folds = mix(np.arange(num_pairs, dtype=np.uint64) + np.uint64(seed << 32)) % np.uint64(NUM_FOLDS)
    found: dict[int, np.ndarray] = {}
    for fold in range(NUM_FOLDS):
        kept, left_out = (np.flatnonzero(which) for which in (folds != fold, folds == fold))
        found |= zip((2 * left_out[:, None] + np.arange(2)).ravel().tolist(), score(kept, left_out), strict=True)
    return [found[i] for i in range(2 * num_pairs)]


def cross_fitted(scorers: Scorers, num_rounds: int = 1) -> Scores:
    """Return log-ratios of construction D by models that have not seen the pair.

    Each round has other folds and another order of the pairs; the result is the mean over rounds.
    """

    def one_round(seed: int) -> Scores:
        def score(kept: np.ndarray, left_out: np.ndarray) -> Scores:
            rows, pairs = _part(scorers, left_out), _pairs(scorers, kept)
            plus, minus = (scorers.logps_after(pairs, rows, DPO_LOSS, swap=swap, seed=seed) for swap in (False, True))
            return difference(plus, minus)

        return out_of_fold(len(scorers.world.rows), score, seed)

    rounds = [scorers.known(("cross_fitted", seed), lambda seed=seed: one_round(seed)) for seed in range(num_rounds)]
    return [np.mean(of_rounds, axis=0) for of_rounds in zip(*rounds, strict=True)]


def given(scorers: Scorers) -> Scores:
    """Return log-ratios of a model that DPO has trained on other pairs to the base: an aligned model against its base."""
    return difference(scorers.of_side("dpo", False, on_other=True, num_epochs=1), scorers.ref_logps)


def stacked(scorers: Scorers) -> Scores:
    """Return sums of the scores of `head`, cross-fitted D and P, with factors that predict the labels of other pairs best."""
    members = [scorers.head(), cross_fitted(scorers)]
    if scorers.world.behind is not None:
        members.append(scorers.prompted())
    return stack(members)


def stack(members: Sequence[Scores]) -> Scores:
    """Return sums of several scores; the factors of a pair are fitted on the labels of the other folds."""
    margins = np.stack([margins_of(scores) for scores in members], axis=1)

    def score(kept: np.ndarray, left_out: np.ndarray) -> Scores:
        factors = fit_factors(margins[kept])
        places = (2 * left_out[:, None] + np.arange(2)).ravel()
        return [sum(a * scores[i] for a, scores in zip(factors, members, strict=True)) for i in places]

    return out_of_fold(len(margins), score)


def fit_factors(margins: np.ndarray) -> np.ndarray:
    """Return the a >= 0, `[k]`, that maximise the mean log sigmoid(sum_k a_k m_k) of margins `[n, k]`, nats.

    Newton's method for one factor after the other; the problem is convex. A weak ridge keeps factors finite.
    """
    scale = np.sqrt(np.mean(margins**2, axis=0)).clip(1e-12)
    x, factors = margins / scale, np.zeros(margins.shape[1])
    for _ in range(200):
        before = factors.copy()
        for k in range(len(factors)):
            wrong = 1 / (1 + np.exp(np.clip(x @ factors, -500, 500)))
            slope = np.mean(x[:, k] * wrong) - 1e-4 * factors[k]
            curvature = np.mean(x[:, k] ** 2 * wrong * (1 - wrong)) + 1e-4
            factors[k] = max(0.0, factors[k] + np.clip(slope / curvature, -1, 1))
        if np.abs(factors - before).max() < 1e-8:
            break
    return factors / scale


def iterated(scorers: Scorers) -> Scores:
    """Return the mean of `head` and of the log-ratios of construction D trained with its weights, at equal spread.

    Such models may find rewards that depend on the context, which `head` cannot express, with less noise than those of plain
    DPO. Head and models are trained without the fold that they score. Both models are needed: the log-ratio of one policy to
    the reference is below 0 on average, because DPO lowers the likelihood of both responses.
    """
    loss: Mapping[str, object] = {"name": "tis_dpo", "beta": 0.1}

    def score(kept: np.ndarray, left_out: np.ndarray) -> Scores:
        weights = weights_of(head_of(_part(scorers, kept)), spread=0.3, lower=-1.5, upper=1.5)
        rows, pairs = _part(scorers, left_out), _pairs(scorers, kept, weights)
        return difference(*(scorers.logps_after(pairs, rows, loss, swap=swap) for swap in (False, True)))

    rewards, head = out_of_fold(len(scorers.world.rows), score), scorers.head()
    spreads = [float(np.concatenate(each).std()) for each in (rewards, head)]
    return [left / spreads[0] + right / spreads[1] for left, right in zip(rewards, head, strict=True)]


def _part(scorers: Scorers, indices: np.ndarray) -> list[Row]:
    return [scorers.world.rows[i] for i in indices]


def _of_pairs(scores: Scores, indices: np.ndarray) -> Scores:
    return [scores[2 * i + side] for i in indices for side in range(2)]


def _pairs(scorers: Scorers, indices: np.ndarray, weights: Scores | None = None) -> list[Pair]:
    return as_pairs(_part(scorers, indices), _of_pairs(scorers.ref_logps, indices), weights)
