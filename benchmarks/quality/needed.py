"""What losses read of pairs besides weights made of token scores: TI-DPO's weights and anchors, and Uni-DPO's scores."""

from dataclasses import replace

import numpy as np

from benchmarks.quality.scores import Scorers
from train.data.stored_pairs import Pair
from train.job.refresh import HybridSettings, Refresher
from train.model.sampling import AnchorSampling

TI_RECIPE = {
    "weights": {"estimator": "ti", "ti_lambda": 0.7, "sigma_divisor": 4.0, "span": "response"},
    "attribute": {"target": "max_logit"},
}
"""Settings of TI-DPO's paper (arXiv 2505.19653), as a dataset records them for trainings that refresh weights."""


def attributed(scorers: Scorers, pairs: list[Pair], mix: float = 0.7) -> list[Pair]:
    """Return pairs with the weights and anchors that a build stores for TI-DPO: of the starting model.

    Made as a training refreshes them, here once. `mix` is the share of the attribution, lambda of the paper: 1 for no prior.
    """
    base = scorers.base
    policy = base.fresh_policy()
    hybrid = HybridSettings("max_logit", mix, 4.0, with_prompts=False)
    refresher = Refresher(policy, policy.model, hybrid, AnchorSampling(), tuple(base.end_ids), dtype=base.dtype)
    return refresher.refresh(pairs, seed=0)


def scored(scorers: Scorers, pairs: list[Pair]) -> list[Pair]:
    """Return pairs with annotator scores for Uni-DPO: the true rewards of their responses, which no label tells so exactly."""
    sums = [float(rewards.sum(dtype=np.float64)) for rewards in scorers.world.true_rewards()]
    return [
        replace(pair, chosen_score=chosen, rejected_score=rejected)
        for pair, chosen, rejected in zip(pairs, sums[::2], sums[1::2], strict=True)
    ]


def unscored(_scorers: Scorers, pairs: list[Pair]) -> list[Pair]:
    """Return pairs with the same score for all responses, so that Uni-DPO has nothing but the labels."""
    return [replace(pair, chosen_score=0.0, rejected_score=0.0) for pair in pairs]
