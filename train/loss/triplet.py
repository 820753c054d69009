"""The triplet loss of TI-DPO, a term of `losses.ti_dpo`."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from train.loss.terms import ResponseLogps, by_ordinal, masked, masked_logratios


class Triplet(NamedTuple):
    """The triplet loss and what it compares, `[B]` nats squared each."""

    losses: Tensor
    to_chosen: Tensor
    """Squared distance of the anchor from the chosen response; `to_rejected` likewise."""
    to_rejected: Tensor


def triplet(chosen: ResponseLogps, rejected: ResponseLogps, anchor: ResponseLogps, *, margin: float) -> Triplet:
    """Per-pair triplet loss, `[B]` nats squared: pulls the anchor nearer to chosen than to rejected.

    Distances are between per-token log-ratios; token weights play no part. As long as the policy equals the reference,
    all distances and their gradients are 0: the loss is the margin, and has no effect until another term moves the policy.

    Args:
        chosen: One side.
        rejected: The other.
        anchor: Responses sampled for the same prompts, with `ref_logps`. Gradients flow through its log-probs too.
        margin: How much nearer, nats squared, >= 0.

    References:
        arXiv 2505.19653, Eq. 13. Details that the paper leaves open follow the official release: token 1 is compared with
        token 1 of the other response, up to the shorter length; squares are summed, not averaged.
    """
    ours, good, bad = (by_ordinal(masked_logratios(side), side.completion_mask) for side in (anchor, chosen, rejected))
    to_chosen, to_rejected = _squared_distance(ours, good), _squared_distance(ours, bad)
    return Triplet(F.relu(to_chosen - to_rejected + margin), to_chosen, to_rejected)  # Eq. 13


def _squared_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Return sum_t (u_t - v_t)^2, `[B]`, over the places where both responses have a token."""
    length = min(first[0].shape[-1], second[0].shape[-1])
    (values, mask), (other_values, other_mask) = ((field[:, :length] for field in side) for side in (first, second))
    return masked(values - other_values, mask & other_mask).square().sum(-1)
