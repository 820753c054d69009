"""Weights that other papers than TIS-DPO make of the token rewards of a contrastive pair.

What was read: the releases of TGDPO and cDPO; of T-REG, whose repository holds no code that we could find, a summary with its
formulas. None of the papers' texts could be read.
"""

import numpy as np

from pipeline.weighing.estimators.registry import SideScores, SideWeights, estimator
from pipeline.weighing.keys import CriticalBeta, RewardFactor


@estimator(
    "tgdpo",
    "TGDPO, 2506.14574",
    "contrastive pair",
    "reference",
    zero_at={},
    token_scores=SideScores.implicit_rewards,
)
def tgdpo(scores: SideScores, *, reward_factor: RewardFactor = 0.05) -> SideWeights:
    """Return max(0, 1 + reward_factor * (log pi+ - log ref)), with - on rejected tokens; pi+ should be a DPO model.

    TGDPO, arXiv 2506.14574: f(r) = 1 + alpha r on chosen and 1 - alpha r on rejected tokens, with the reward r = beta log(pi+ /
    ref) that a DPO model implies; `reward_factor` is alpha beta. The paper asks for an alpha that keeps f above 0. Its release
    does not check that; here a negative f gives 0, and is counted at the lower end. pi- is not read.
    """
    token_weights = scores.implicit_rewards()
    token_weights *= np.float32(reward_factor if scores.side == "chosen" else -reward_factor)  # in place, as in `tis`
    token_weights += np.float32(1)
    return SideWeights(np.maximum(token_weights, np.float32(0)), num_at_lower=int(np.count_nonzero(token_weights <= 0)))


@estimator("treg", "T-REG, 2412.02685", "contrastive pair")
def treg(scores: SideScores) -> SideWeights:
    """Return sigmoid(z) + 1/2, from 1/2 to 3/2: 1 plus the token reward of T-REG, minus it on rejected tokens.

    T-REG, arXiv 2412.02685, has r = sigmoid(log pi+ - log pi-) - 1/2 with one model behind a prompt that asks for a better and
    one that asks for a worse response (`contrast.method = "prompt"`). Loss `treg` reads r back from these weights; with
    `tis_dpo` they are a bounded alternative to `tis`.
    """
    halves = scores.z()
    halves *= np.float32(0.5)
    np.tanh(halves, out=halves)  # sigmoid(z) = 1/2 + tanh(z / 2) / 2, which cannot overflow
    halves *= np.float32(0.5)
    halves += np.float32(1)
    return SideWeights(halves)


@estimator("critical", "after cDPO, 2411.19943", "contrastive pair", zero_at={})
def critical(scores: SideScores, *, critical_beta: CriticalBeta = 1.0) -> SideWeights:
    """Return 1 on chosen tokens, 1 - min(1, p+ (p+ / p-)^critical_beta) on rejected ones, with p = pi(y_t).

    cDPO, arXiv 2411.19943: tokens that the model of wrong answers finds likely and the model of right answers does not are
    critical. Its release divides p+^(1 + beta) / p-^beta by the sum Z of this over the vocabulary, which is not stored. Z is at
    least 1, and 1 if the models agree, so the weights are at most those of the release, and equal them there. Where the minimum
    is 1 the weight is 0, which is counted at the lower end. As in the release (`only_neg`), chosen tokens have weight 1.
    """
    assert scores.positive_logps is not None, "no log-probs of pi+"
    if scores.side == "chosen":
        return SideWeights(np.ones(scores.num_tokens, dtype=np.float32), num_at_lower=0)
    logs = scores.logratios()
    logs *= np.float32(critical_beta)
    logs += scores.positive_logps
    np.minimum(logs, np.float32(0), out=logs)
    num_at_lower = int(np.count_nonzero(logs == 0))
    np.expm1(logs, out=logs)
    return SideWeights(np.abs(logs, out=logs), num_at_lower=num_at_lower)
