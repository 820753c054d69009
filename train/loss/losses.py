"""Preference losses as pure functions of per-token log-probabilities.

Called through `objective.py`; usable alone. In every loss, `chosen` and `rejected` are the two sides with the fields that the
loss reads (`needs.py`; `config.py` describes the settings), `beta` is > 0, and a missing field or a setting out of its range is
a `ValueError`. Weights, reference log-probs and annotator scores are data: no gradient flows into them. The
end-of-text token counts like any other.

Not here: the sums over a response (`terms.py`), the triplet of TI-DPO (`triplet.py`), KTO (`kto.py`), distillation
(`distill.py`), the next-token shift (`logps.py`), the per-token KL (`divergence.py`), and the reduction over pairs, which is
the caller's.

Notation in comments: w chosen, l rejected, m(y) = sum_t log pi/ref, a(y) = mean_t log pi, K(y) = sum_t KL_t, sg stops
gradients.
"""
# ruff: noqa: D417  (the docstring above describes what all losses take)

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from train.loss.distill import distill as distill
from train.loss.kto import kto as kto
from train.loss.kto import tis_kto as tis_kto
from train.loss.terms import (
    PairLosses,
    ResponseLogps,
    by_ordinal,
    decay_weights,
    masked,
    masked_kls,
    masked_logps,
    masked_logratios,
    masked_token_weights,
    mean_logps,
    mean_logratios,
    sum_kls,
    sum_logps,
    sum_logratios,
    sum_weighted_logratios,
    unlikely_tokens,
    weighted_sum,
)
from train.loss.triplet import triplet
from weights_store.errors import InputError

_MAX_LOG_RATIO = 30.0
"""Of a Bregman risk, as in TBPO's release: beyond it there is no gradient, and below it R^2 fits into float32."""


def dpo(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, label_smoothing: float = 0.0) -> PairLosses:
    """Per-pair DPO loss, `[B]` nats. Token weights are ignored.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; label smoothing ("conservative DPO") as in the authors' release,
        trainers.py.
    """
    return _logistic(sum_logratios(chosen), sum_logratios(rejected), beta, label_smoothing=label_smoothing)


def ipo(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float) -> PairLosses:
    """Per-pair IPO loss, `[B]` (nats per token, squared); beta is tau of the paper.

    References:
        Azar et al. 2023, arXiv 2310.12036, Eq. 17. Departure, the same as TRL's: the paper writes sums of log-ratios;
        here they are means over the tokens of each response, so that the target does not depend on the length. According to
        TRL (1.16, `DPOTrainer`) the authors confirmed that their results used means.
    """
    _check_beta(beta)
    chosen_means, rejected_means = mean_logratios(chosen), mean_logratios(rejected)
    losses = (chosen_means - rejected_means - 1 / (2 * beta)) ** 2  # Eq. 17
    return PairLosses(losses, beta * chosen_means.detach(), beta * rejected_means.detach())


def tdpo1(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float) -> PairLosses:
    """Per-pair TDPO1 loss, `[B]` nats, with KL(ref‖pi).

    References:
        Zeng et al. 2024, arXiv 2404.11999, the loss named TDPO1; rewards beta (m + K) as the official release logs them.
    """
    # beta [m(w) - m(l) - (K(l) - K(w))]
    return _logistic(sum_logratios(chosen) + sum_kls(chosen), sum_logratios(rejected) + sum_kls(rejected), beta)


def tdpo2(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, alpha: float) -> PairLosses:
    """Per-pair TDPO2 loss, `[B]` nats, with KL(ref‖pi): the KL of the chosen side takes no gradient.

    With `alpha` 0 it is `dpo`; with 1 it has the value of `tdpo1`, not its gradient.

    References:
        Zeng et al. 2024, arXiv 2404.11999, the loss named TDPO2. Departure: the official release logs beta (m + K) as
        rewards here too; ours are beta (m + alpha K), whose difference is the margin of the loss.
    """
    # beta [m(w) - m(l) - alpha (K(l) - sg K(w))]
    chosen_sums = sum_logratios(chosen) + alpha * sum_kls(chosen).detach()
    return _logistic(chosen_sums, sum_logratios(rejected) + alpha * sum_kls(rejected), beta)


def tis_dpo(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, eta_scale: float = 0.0) -> PairLosses:
    """Per-pair TIS-DPO loss, `[B]` nats. Rewards are the weighted sums that the loss compares, eta included.

    With all weights 1 and without eta it equals `dpo` bit for bit, value and gradient: the end-of-text token has a weight
    too, where the official release gives it 0. With eta, `kls` are KL(pi‖ref).

    References:
        Liu et al. 2024, arXiv 2410.04350 (ICLR 2025); u and eta as in the official release, trainers.py, which switches
        eta by `token_level` (false) and multiplies it by alpha (0.5). As there, gradients flow through eta on both
        sides. TDPO's KL term has the opposite sign and the other direction.
    """
    chosen_sums, rejected_sums = sum_weighted_logratios(chosen), sum_weighted_logratios(rejected)
    if eta_scale:  # u - eta; eta = beta [sum_t w_t KL_t(w) - sum_t w_t KL_t(l)]
        chosen_sums = chosen_sums - eta_scale * weighted_sum(masked_kls(chosen), chosen)
        rejected_sums = rejected_sums - eta_scale * weighted_sum(masked_kls(rejected), rejected)
    return _logistic(chosen_sums, rejected_sums, beta)


def ti_dpo(
    chosen: ResponseLogps,
    rejected: ResponseLogps,
    anchor: ResponseLogps | None = None,
    *,
    beta: float,
    alpha: float = 0.0,
    triplet_gamma: float = 0.0,
    triplet_margin: float = 0.0,
) -> PairLosses:
    """Per-pair TI-DPO loss, `[B]` nats: DPO or TDPO2 on weighted log-ratios, plus `triplet_gamma` times the `triplet` loss.

    Without the triplet, which alone needs `anchor`, it equals `tis_dpo` bit for bit if `alpha` is 0, and `tdpo2` if all weights
    are 1. With `alpha` above 0, `kls` are KL(ref‖pi). Rewards do not contain the triplet.

    References:
        arXiv 2505.19653 (ICLR 2026), Eq. 11, 12, 14; beta is inside the sigmoid as in Algorithm 1; Eq. 12 leaves it
        out. The KL term is that of the official release: TDPO2's, without token weights. The paper only names its factor.
    """
    chosen_sums, rejected_sums = sum_weighted_logratios(chosen), sum_weighted_logratios(rejected)  # Eq. 11
    if alpha:  # beta [m_w(w) - m_w(l) - alpha (K(l) - sg K(w))]
        chosen_sums = chosen_sums + alpha * sum_kls(chosen).detach()
        rejected_sums = rejected_sums + alpha * sum_kls(rejected)
    result = _logistic(chosen_sums, rejected_sums, beta)
    if not triplet_gamma:
        return result
    if anchor is None:
        raise ValueError("ti_dpo with triplet_gamma above 0 needs an anchor; none was given")
    triplets = triplet(chosen, rejected, anchor, margin=triplet_margin).losses
    return result._replace(losses=result.losses + triplet_gamma * triplets)  # Eq. 14


def treg(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, reg_alpha: float) -> PairLosses:
    """Per-pair T-REG loss, `[B]` nats: DPO, and `reg_alpha` times a regulariser towards the token rewards r in the weights.

    r_t = w_t - 1 on chosen and 1 - w_t on rejected tokens, as estimator `treg` makes them. With all weights 1, or `reg_alpha`
    0, it equals `dpo` bit for bit. At token t its gradient is 1 + reg_alpha (w_t - 1) times that of `dpo`. Rewards are DPO's.

    References:
        Zhou et al. 2024, arXiv 2412.02685 (ACL 2025), DPO-REG, as a summary gives it; we could read neither paper nor code.
        It is L_DPO + alpha sigmoid(-u) sum_y sum_t -beta r_t log pi(y_t). That sigmoid(-u), taken from the gradient of DPO,
        gets no gradient itself is our reading. Departure: log pi/ref in place of log pi, which changes the value, not the
        gradient. So the loss is log 2 while policy and reference are equal.
    """
    result = dpo(chosen, rejected, beta=beta)
    assert result.chosen_rewards is not None
    assert result.rejected_rewards is not None
    pair_weights = torch.sigmoid(result.rejected_rewards - result.chosen_rewards)  # sg sigmoid(-u)
    alignments = sum_weighted_logratios(chosen) - sum_logratios(chosen)  # sum_t r_t log pi/ref
    alignments = alignments - (sum_weighted_logratios(rejected) - sum_logratios(rejected))
    return result._replace(losses=result.losses - reg_alpha * pair_weights * beta * alignments)


def bpo(
    chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, bregman_lambda: float, min_ratio: float
) -> PairLosses:
    """Per-pair BPO loss, `[B]`: the risk of R = exp(-u), u the margin of DPO, under the scaled Basu divergence.

    While policy and reference are equal the loss is 0, and its gradient that of `dpo`. Rewards are DPO's.

    References:
        Kim et al. 2025, arXiv 2505.19601 (NeurIPS 2025), Eq. 10 with the h of section 3.3 (SBA), and appendix C.
    """
    _check_beta(beta)
    chosen_rewards, rejected_rewards = beta * sum_logratios(chosen), beta * sum_logratios(rejected)
    losses = _bregman_risk(rejected_rewards - chosen_rewards, bregman_lambda, math.log(min_ratio))
    return PairLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())


def tbpo_a(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, bregman_lambda: float) -> PairLosses:
    """Per-pair TBPO-A loss, `[B]`: the risk of `bpo` at each position that both responses have, with KL(ref‖pi); their mean.

    Token t of chosen is compared with token t of rejected; tokens beyond the shorter response are not trained on. Rewards are
    means of beta (log pi/ref + KL) over the compared positions. While policy and reference are equal the loss is 0.

    References:
        arXiv 2605.12288 (ICML 2026), in the form of the official release, trainers.py and h_function.py:
        log R_t = beta [log pi/ref(l) - log pi/ref(w) + KL_t(l) - KL_t(w)]. The paper's text could not be read, nor the lambda
        of its runs; an independent port (hai-align) has 0.2.
    """
    _check_beta(beta)
    (ours, our_mask), (theirs, their_mask) = (
        by_ordinal(beta * (masked_logratios(side) + masked_kls(side)), side.completion_mask)
        for side in (chosen, rejected)
    )
    length = min(ours.shape[-1], theirs.shape[-1])
    mask = our_mask[:, :length] & their_mask[:, :length]
    ours, theirs = masked(ours[:, :length], mask), masked(theirs[:, :length], mask)
    counts = mask.sum(-1).clamp(min=1)
    losses = _bregman_risk(theirs - ours, bregman_lambda).sum(-1) / counts  # the risk is 0 where nothing is compared
    return PairLosses(losses, ours.detach().sum(-1) / counts, theirs.detach().sum(-1) / counts)


def simpo(
    chosen: ResponseLogps,
    rejected: ResponseLogps,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Per-pair SimPO loss, `[B]` nats. No reference: rewards are beta times the mean log-prob.

    TRL's `simpo_gamma` is `gamma_beta_ratio` times beta.

    References:
        Meng et al. 2024, arXiv 2405.14734, Eq. 6; label smoothing as in the official release, simpo_trainer.py.
    """
    chosen_means, rejected_means = mean_logps(chosen), mean_logps(rejected)
    target = beta * gamma_beta_ratio
    return _logistic(chosen_means, rejected_means, beta, label_smoothing=label_smoothing, target=target)


def confpo(
    chosen: ResponseLogps,
    rejected: ResponseLogps,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Per-pair ConfPO loss, `[B]` nats: `simpo` on the tokens with pi(y_t) at most its mean in the response.

    The policy selects at every step anew, and no gradient flows through that. Estimator `confidence` selects once, by the
    reference.

    References:
        Yoon et al. 2025, arXiv 2506.08712 (ICML 2025), in the form of the official release, cpo_trainer.py. Departure: it
        selects what is below the mean, and drops a pair if that is nothing on one side, as with a single token; "at most" is
        how a summary gives the paper's threshold, and always selects a token.
    """
    sides = (side._replace(token_weights=unlikely_tokens(side)) for side in (chosen, rejected))
    chosen_means, rejected_means = (
        weighted_sum(masked_logps(side), side) / masked_token_weights(side).sum(-1) for side in sides
    )
    target = beta * gamma_beta_ratio
    return _logistic(chosen_means, rejected_means, beta, label_smoothing=label_smoothing, target=target)


def sepo(chosen: ResponseLogps, rejected: ResponseLogps) -> PairLosses:
    """Per-pair SePO loss, `[B]` nats: mean log-prob over selected tokens, no reference, no beta.

    Token weights are 1 on selected tokens and 0 elsewhere, or any weights >= 0 for a weighted mean. With all weights 1 it is
    `simpo` with beta 1 and no margin. The weights are checked, which waits for the device once.

    Raises:
        InputError: A weight is negative or NaN, or a response has no weight above 0, so that its mean is unknown.

    References:
        Yang et al. 2024, arXiv 2408.13518 (EMNLP 2024); the form of the official release, utils_selective.py, which
        ignores its --beta. Departure: there the first response token can never be selected, here any can.
    """
    return _logistic(_selected_means(chosen, "chosen"), _selected_means(rejected, "rejected"), 1.0)


def d2po(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float, gamma: float) -> PairLosses:
    """Per-pair D2PO loss, `[B]` nats: `tis_dpo` with the weights of `decay_weights`; stored token weights are ignored.

    With `gamma` 1 it is `dpo`.

    References:
        arXiv 2502.14340; t counts from 1 as in the official release, trainer_utils.py.
    """
    sides = (side._replace(token_weights=decay_weights(side, gamma)) for side in (chosen, rejected))
    return tis_dpo(*sides, beta=beta)


def uni_dpo(
    chosen: ResponseLogps,
    rejected: ResponseLogps,
    *,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float,
    quality_eta: float,
    tau_ref: float,
    focal_gamma: float,
    nll_lambda: float,
    tau_good: float,
) -> PairLosses:
    """Per-pair Uni-DPO loss, `[B]` nats: length-normalised DPO, weighted by quality and by the policy's own margin.

    Args:
        chosen_scores: Annotator scores, `[B]`.
        rejected_scores: Likewise.
        quality_eta: Slope of w_qual in the difference of scores; 0 makes it 1/2 everywhere.
        tau_ref: Margin at which the sigmoid of w_perf is 1/2.
        focal_gamma: Exponent of w_perf.
        nll_lambda: Factor of the c-NLL term.
        tau_good: Score from which the c-NLL term acts.

    References:
        arXiv 2506.10054 (ICLR 2026), in the form of the official release, uni_dpo_trainer.py: w_perf depends on the
        policy only and is not detached, so its gradient counts; the c-NLL term is a mean over tokens.
    """
    chosen_means, rejected_means = mean_logps(chosen), mean_logps(rejected)  # a_pi
    chosen_logratios, rejected_logratios = mean_logratios(chosen), mean_logratios(rejected)
    preference = _logistic(chosen_logratios, rejected_logratios, beta)
    quality_weights = torch.sigmoid(quality_eta * (chosen_scores - rejected_scores).detach())
    # (1 - sigmoid(x))^gamma = exp(gamma log sigmoid(-x)), whose gradient stays finite as the probability goes to 0
    policy_margins = beta * (chosen_means - rejected_means)
    focal_weights = torch.exp(focal_gamma * F.logsigmoid(tau_ref - policy_margins))
    falls_behind = (chosen_scores >= tau_good) & (chosen_logratios < 0)  # good, but less likely than under ref
    nll = torch.where(falls_behind, -nll_lambda * chosen_means, 0.0)
    return preference._replace(losses=quality_weights * focal_weights * preference.losses + nll)


def sft(chosen: ResponseLogps, rejected: ResponseLogps | None = None, *, beta: float = 1.0) -> PairLosses:
    """Negative log-likelihood of each chosen response, `[B]` nats summed over its tokens.

    The trainer divides by the number of response tokens of a step, not by pairs. `beta` scales the rewards only, which need
    `ref_logps`; `rejected` serves its rewards alone.
    """
    rewards = (
        None if side is None or side.ref_logps is None else beta * sum_logratios(side).detach()
        for side in (chosen, rejected)
    )
    return PairLosses(-sum_logps(chosen), *rewards)  # -sum_t log pi(y_t | x, y_<t)


def add_nll(result: PairLosses, chosen: ResponseLogps, *, nll_lambda: float) -> PairLosses:
    """Add `nll_lambda` times the negative log-likelihood of chosen, nats per token, to the losses; rewards stay as they are.

    Nothing is added where there is no chosen response, as in unpaired rows. While policy and reference are equal it adds
    `nll_lambda` times the mean of the stored -log ref of the chosen tokens.

    References:
        `pref_ftx` of LLaMA-Factory, read in its code; for DPO the idea of Pang et al. 2024, arXiv 2404.19733, whose equation we
        have not read. TRL's loss "sft" differs: it is a mean over all chosen tokens of a batch.
    """
    return result._replace(losses=result.losses - nll_lambda * mean_logps(chosen))


def _bregman_risk(log_ratios: Tensor, bregman_lambda: float, min_log_ratio: float = -_MAX_LOG_RATIO) -> Tensor:
    """h'(R) R - h(R) - h'(1/R), elementwise, for h(R) = (R^(1 + lambda) - R) / (4 lambda (1 + lambda)); 0 at R = 1.

    Eq. 10 of BPO; the scale 4 makes its slope in log R at R = 1 that of DPO, 1/2. Releases leave additive constants out.
    """
    if not -1 < bregman_lambda <= 1:
        raise ValueError(f"bregman_lambda must be above -1 and at most 1, got {bregman_lambda}")
    z = log_ratios.clamp(min_log_ratio, _MAX_LOG_RATIO)
    rising = torch.expm1((1 + bregman_lambda) * z) / (4 * (1 + bregman_lambda))
    falling = -z if bregman_lambda == 0 else torch.expm1(-bregman_lambda * z) / bregman_lambda  # the limit: KLIEP
    return rising - falling / 4


def _logistic(
    chosen: Tensor, rejected: Tensor, beta: float, *, label_smoothing: float = 0.0, target: float = 0.0
) -> PairLosses:
    """-log sigmoid(margin), `[B]`, margin = beta (chosen - rejected) - target; of -margin for the share of label smoothing."""
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
    margins = beta * (chosen - rejected) - target  # u of TIS-DPO; Eq. 7 of DPO for weights 1
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")


def _selected_means(side: ResponseLogps, name: str) -> Tensor:
    """sum_t w_t log pi_t / sum_t w_t, `[B]`."""
    token_weights = masked_token_weights(side)
    total_weights = token_weights.sum(-1)
    bad = ~((token_weights >= 0).all(-1) & (total_weights > 0))
    if bad.any():
        raise InputError(
            f"sepo, {name} response {int(bad.int().argmax())} of the batch: expected token weights >= 0, at least one of "
            "them above 0; build the dataset with weights.estimator='sepo', which always selects a token"
        )
    return weighted_sum(masked_logps(side), side) / total_weights
