"""Divergence of the policy from the reference at one position, from logits or from stored top-k log-probs.

Called on the rows of one chunk of the output layer (`logps.py`). Everything stays in logs: log(softmax(x)), as the official
TIS-DPO and TDPO releases write it, is -inf if a probability underflows, and 0 * -inf is NaN. Gradients flow into the policy
only. Not here: sums over a response (`terms.py`).
"""

import math

import torch
from torch import Tensor

from train.loss.needs import KlDirection

MIN_TAIL = 1e-6
"""Smallest probability outside the top k. Stored log-probs are rounded, so their probabilities may add up to more than 1."""
_LOG_MAX_TOP = math.log1p(-MIN_TAIL)


def exact_kl(policy_logits: Tensor, ref_logits: Tensor, direction: KlDirection) -> Tensor:
    """Per-row KL over the whole vocabulary, `[N]` nats, >= 0 up to rounding.

    Args:
        policy_logits: `[N, V]`, any floating type; computed in float32 at least.
        ref_logits: `[N, V]`, likewise. An id with -inf, which cannot occur, must have it on both sides, or the KL may be
            infinite.
        direction: `policy_ref` is KL(pi‖ref), `ref_policy` KL(ref‖pi).

    References:
        KL(pi‖ref): eta of TIS-DPO, arXiv 2410.04350. KL(ref‖pi): the sequential KL of TDPO, arXiv 2404.11999.
    """
    policy_logits, ref_logits = at_least_float32(policy_logits), at_least_float32(ref_logits.detach())
    return _kl(policy_logits.log_softmax(-1), ref_logits.log_softmax(-1), direction)


def top_k_kl(policy_log_probs_at_ids: Tensor, ref_top_logps: Tensor, direction: KlDirection) -> Tensor:
    """Per-row KL over K ids and one bucket for all others, `[N]` nats, >= 0 up to rounding.

    Never above the exact KL (up to `MIN_TAIL`), since merging outcomes loses information (data processing inequality); equal
    to it if the bucket holds at most one id. It misses how the two differ inside the bucket; `docs/training.md` has the share.

    If the K probabilities of a side add up to more than 1 - `MIN_TAIL`, their log-probs are lowered by the same number of nats
    until `MIN_TAIL` is left. So both sides are distributions, the KL is at least 0, and the tail is never empty. A policy that
    leaves less than that to its tail has no gradient towards a larger one.

    Args:
        policy_log_probs_at_ids: `[N, K]` log pi at the ids of the reference's top K, from log_softmax over the vocabulary.
        ref_top_logps: `[N, K]` log ref at these ids, as stored.
        direction: As in `exact_kl`.
    """
    return _kl(_with_tail(policy_log_probs_at_ids), _with_tail(ref_top_logps.detach()), direction)


def _kl(policy_logps: Tensor, ref_logps: Tensor, direction: KlDirection) -> Tensor:
    """sum_v p_v (log p_v - log q_v), p the first of `direction`, over the last dimension."""
    p, q = (policy_logps, ref_logps) if direction == "policy_ref" else (ref_logps, policy_logps)
    # 0 log 0 = 0: if p is exactly 0, both logs may be -inf and their difference NaN
    log_ratios = torch.where(torch.isneginf(p), 0.0, p - q)
    return (p.exp() * log_ratios).sum(-1)


def _with_tail(top_logps: Tensor) -> Tensor:
    """Return `[N, K + 1]`: the K log-probs and the log of the remaining probability."""
    top_logps = at_least_float32(top_logps)
    top_mass = top_logps.logsumexp(-1, keepdim=True)  # log of a probability
    excess = (top_mass - _LOG_MAX_TOP).clamp_min(0)
    # log(1 - e^m) through expm1: exact near m = 0; far below, right to one rounding of 1
    tail = (-torch.expm1(top_mass - excess)).log()
    return torch.cat([top_logps - excess, tail], -1)


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if they have it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
