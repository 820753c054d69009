"""Distillation: the student learns a teacher's stored distributions, token by token.

A function like those of `losses.py`, which offers it too. The teacher is the reference that the build scored; it is not run.
"""

from train.loss.terms import PairLosses, ResponseLogps, masked_kls, masked_logps, weighted_sum


def distill(
    chosen: ResponseLogps,
    rejected: ResponseLogps | None = None,  # noqa: ARG001  (not read; every loss is called with both sides)
    *,
    nll_lambda: float = 0.0,
) -> PairLosses:
    """sum_t w_t (KL_t(ref‖pi) + nll_lambda · -log pi_t) of each chosen response, `[B]` nats; `ref` is the teacher.

    The trainer divides by the number of response tokens of a step, as for `sft`, whatever their weights are.

    The KL at a position is that of k + 1 events: each of the teacher's k most likely tokens, and any other token
    (`divergence.top_k_kl`). It is a lower bound of the KL over the vocabulary, and 0 only if the student gives all of these
    events the teacher's probabilities. The top k alone would not say how likely "any other token" is: if only the teacher is
    renormalised, the best student never says one; if both are, their probability does not matter at all.

    References:
        Forward KL: Hinton et al. 2015, arXiv 1503.02531, at temperature 1, since one bucket cannot be tempered. The bucket: the
        default of TRL's experimental `ServerDistillationTrainer` (1.16, `loss_add_tail`).
    """
    token_losses = masked_kls(chosen)
    if nll_lambda:  # else a gradient of 0 into the log-probs of the tokens would cost a tensor over the vocabulary
        token_losses = token_losses - nll_lambda * masked_logps(chosen)
    return PairLosses(weighted_sum(token_losses, chosen), None, None)
