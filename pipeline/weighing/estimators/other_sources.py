"""Weights from other sources than the contrastive pair: gradients, labels, positions, and the reference alone."""

import numpy as np

from pipeline.weighing.estimators.registry import SideScores, SideWeights, estimator
from pipeline.weighing.estimators.tis_dpo import clamped, scaled, uniform
from pipeline.weighing.keys import (
    DecayGamma,
    Features,
    K,
    Lower,
    Mu,
    Scale,
    SigmaDivisor,
    Span,
    Spread,
    TiLambda,
    Upper,
)
from pipeline.weighing.transforms import decay as decay_transform
from pipeline.weighing.transforms import mean_one, means
from train.model.hybrid import hybrid_weights


@estimator("ti", "TI-DPO, 2505.19653", "attributions", zero_at={"ti_lambda": 1})
def ti(
    scores: SideScores, *, ti_lambda: TiLambda = 0.7, sigma_divisor: SigmaDivisor = 4.0, span: Span = "response"
) -> SideWeights:
    """Return ti_lambda * attribution + (1 - ti_lambda) * Gaussian prior, each scaled to mean one.

    TI-DPO, arXiv 2505.19653, eq. 8; see `hybrid.hybrid_weights`.

    Raises:
        ValueError: An attribution is negative or not finite.
    """
    assert scores.attributions is not None, "no attributions"
    whole = span == "sequence"
    weighed = hybrid_weights(
        scores.attributions,
        scores.lengths,
        mix=ti_lambda,
        sigma_divisor=sigma_divisor,
        prompt_lengths=scores.prompt_lengths if whole else None,
        prompt_attributions=scores.prompt_attributions if whole else None,
    )
    return SideWeights(weighed.token_weights, num_without_mass=weighed.num_without_mass)


@estimator("head", "ours", "labels", token_scores=lambda scores: scores.fitted_rewards())
def head(
    scores: SideScores,
    *,
    features: Features = "tokens",  # noqa: ARG001 - what the rewards were fitted on, see `head.py`
    scale: Scale = 1.0,
    spread: Spread = 0.3,
    k: K = 1.0,
    mu: Mu = 1.0,
    lower: Lower = -1.5,
    upper: Upper = 1.5,
) -> SideWeights:
    """Return `tis` of token rewards that a ridge Bradley-Terry regression on the labels finds, out of fold.

    The labels are those of other prompts than the pair's own, see `head.py`.
    """
    return clamped(scores.side, scaled(scores.fitted_rewards().copy(), scale, spread), k, mu, lower, upper)


@estimator("decay", "D2PO, 2502.14340")
def decay(scores: SideScores, *, decay_gamma: DecayGamma = 0.98) -> SideWeights:
    """Return gamma^t, t from 1."""
    return SideWeights(decay_transform(uniform(scores).token_weights, scores.lengths, decay_gamma))


@estimator("surprise", "ours", "reference", zero_at={})
def surprise(scores: SideScores) -> SideWeights:
    """Return -log ref(y_t) divided by its mean in the response: unlikely tokens weigh more."""
    assert scores.ref_logps is not None, "no log-probs of the reference"
    return _relative(-scores.ref_logps, scores.lengths)


@estimator("confidence", "after ConfPO, 2506.08712", "reference", zero_at={})
def confidence(scores: SideScores) -> SideWeights:
    """Return 1 where ref(y_t) is at most its mean in the response, else 0: what the model was confident of is left alone.

    ConfPO, arXiv 2506.08712, selects by the policy's own probabilities at each step; here they are the starting policy's, so
    the selection stays that of step 0. Its release takes what is below the mean, and drops pairs in which that is nothing; "at
    most" always selects a token. ConfPO trains by the mean log-prob of selected tokens, as loss `sepo` does, but with a beta
    and a margin.
    """
    assert scores.ref_logps is not None, "no log-probs of the reference"
    probs = np.exp(scores.ref_logps)
    thresholds = np.repeat(means(probs, scores.lengths), scores.lengths)
    return SideWeights((probs <= thresholds).astype(np.float32))


@estimator("entropy", "ours", "reference top k", zero_at={})
def entropy(scores: SideScores) -> SideWeights:
    """Return the entropy of the reference at each position (`score.top_k`), divided by its mean in the response.

    H = -sum p_i log p_i - r log r over the stored k most likely tokens, with the rest r = 1 - sum p_i as one outcome. It is at
    most the entropy over the vocabulary, because merging outcomes never adds entropy.
    """
    assert scores.top_logps is not None, "no top k of the reference"
    logps = scores.top_logps.reshape(scores.num_tokens, -1)
    probs = np.exp(logps)
    rest = np.maximum(0, 1 - probs.sum(axis=1))  # stored log-probs are rounded
    of_rest = rest * np.log(rest, out=np.zeros_like(rest), where=rest > 0)
    return _relative(np.maximum(0, -np.einsum("nk,nk->n", probs, logps) - of_rest), scores.lengths)


@estimator("activation", "ours, after SparsePO, 2410.05102", "activations")
def activation(scores: SideScores) -> SideWeights:
    """Return the size of the hidden state that predicts a token (`attribute.activations`), divided by its mean in the response.

    Inspired by the activation masks of SparsePO (MaPO, arXiv 2410.05102). We have not seen their exact form; this definition is
    ours.
    """
    assert scores.activations is not None, "no activations"
    return _relative(scores.activations, scores.lengths)


def _relative(values: np.ndarray, lengths: np.ndarray) -> SideWeights:
    """Return values divided by their mean in each response; 1 where all are 0, which is counted."""
    is_empty = means(values, lengths) <= 0
    token_weights = mean_one(values, lengths)
    token_weights[np.repeat(is_empty, lengths)] = 1
    return SideWeights(token_weights, num_without_mass=int(np.count_nonzero(is_empty)))
