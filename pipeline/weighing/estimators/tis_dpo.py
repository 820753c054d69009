"""TIS-DPO's weights, and what they are compared with: the pair swapped, random log-ratios, and 1."""

from typing import Literal

import numpy as np

from pipeline.weighing.estimators.registry import SideScores, SideWeights, estimator
from pipeline.weighing.keys import Calibrated, K, Lower, Mu, Scale, Seed, Spread, Upper
from weights_store.schemas import Side


@estimator("tis", "TIS-DPO, 2410.04350", "contrastive pair")
def tis(
    scores: SideScores,
    *,
    scale: Scale = 1.0,
    spread: Spread = "none",
    k: K = 1.0,
    mu: Mu = 1.0,
    lower: Lower = -0.5,
    upper: Upper = 1.5,
) -> SideWeights:
    """Return k * exp(mu * clamp(scale * (log pi+ - log pi-), lower, upper)), mu < 0 on rejected tokens.

    TIS-DPO, arXiv 2410.04350, eq. 19 of the submission; mu multiplies the clamped value. The paper has scale = k = 1 and mu =
    +1 / -1; lower = -0.5 and upper = 1.5 are the values of SWIFT (NeurIPS 2025, appendix B.2), which are often quoted.
    """
    return clamped(scores.side, scaled(scores.logratios(), scale, spread), k, mu, lower, upper)


@estimator("reversed", "ablation", "contrastive pair", token_scores=lambda scores: -scores.logratios())
def reversed_tis(
    scores: SideScores,
    *,
    scale: Scale = 1.0,
    spread: Spread = "none",
    k: K = 1.0,
    mu: Mu = 1.0,
    lower: Lower = -0.5,
    upper: Upper = 1.5,
) -> SideWeights:
    """Return `tis` with pi+ and pi- swapped: an ablation that should hurt."""
    return clamped(scores.side, scaled(-scores.logratios(), scale, spread), k, mu, lower, upper)


@estimator("random", "ablation", "token keys")
def random(
    scores: SideScores, *, k: K = 1.0, mu: Mu = 1.0, lower: Lower = -0.5, upper: Upper = 1.5, seed: Seed = 0
) -> SideWeights:
    """Return `tis` of log-ratios drawn from U(lower, upper). A draw depends only on the token and the seed."""
    drawn = (lower + (upper - lower) * scores.draws(seed)).astype(np.float32)
    return clamped(scores.side, drawn, k, mu, lower, upper)


@estimator("uniform", "ablation")
def uniform(scores: SideScores) -> SideWeights:
    """Return 1: plain DPO."""
    return SideWeights(np.ones(scores.num_tokens, dtype=np.float32))


def scaled(values: np.ndarray, scale: float | Calibrated, spread: float | Literal["none"]) -> np.ndarray:
    """Scale token scores in place."""
    assert scale != "calibrated", "measure the scale over the whole dataset first, see `fits.py`"
    assert spread == "none", "measure the spread over the whole dataset first, see `fits.py`"
    if scale != 1:
        values *= np.float32(scale)
    return values


def clamped(side: Side, values: np.ndarray, k: float, mu: float, lower: float, upper: float) -> SideWeights:
    """Return k * exp(mu * clamp(values, lower, upper)), with -mu on rejected tokens."""
    token_weights = np.clip(values, np.float32(lower), np.float32(upper))
    token_weights *= np.float32(mu if side == "chosen" else -mu)  # in place: memory traffic is the cost
    np.exp(token_weights, out=token_weights)
    token_weights *= np.float32(k)
    return SideWeights(token_weights, *at_ends(values, lower, upper))


def at_ends(values: np.ndarray, lower: float, upper: float) -> tuple[int, int]:
    """Return how many tokens are at or beyond the lower and the upper end of a clamp."""
    return int(np.count_nonzero(values <= lower)), int(np.count_nonzero(values >= upper))
