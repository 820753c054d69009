"""What losses are made of: one side of a batch of pairs, and sums and means over its response tokens.

The mean of a response without any token is 0, as its sum is. A missing field of a side is a `ValueError`. Not here: the losses
(`losses.py`), which also say what is data without a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ResponseLogps(NamedTuple):
    """One side of a batch of pairs, aligned to tokens: position t holds values of token t. Shapes `[B, T]`."""

    policy_logps: Tensor
    """log pi(y_t | x, y_<t), nats, with gradient."""
    completion_mask: Tensor
    """bool, True on response tokens; nothing else counts, whatever the other fields hold there."""
    ref_logps: Tensor | None = None
    """log ref(y_t | x, y_<t), nats."""
    token_weights: Tensor | None = None
    """w_t >= 0, unitless."""
    kls: Tensor | None = None
    """KL of the two next-token distributions at position t, nats, with gradient; in the direction that the loss names."""

    def first(self, num_rows: int) -> "ResponseLogps":
        """Return the first rows."""
        return ResponseLogps(*(field if field is None else field[:num_rows] for field in self))  # type: ignore[arg-type]


class PairLosses(NamedTuple):
    """What a loss returns, `[B]` each; rewards are detached, and None if they cannot be known."""

    losses: Tensor
    chosen_rewards: Tensor | None
    """What the loss compares, beta included: it is a function of chosen - rejected. Nats, for means nats per token."""
    rejected_rewards: Tensor | None


def has_tokens(side: ResponseLogps) -> Tensor:
    """Return which rows have a response on this side, `[B]` bool; an unpaired row has one on one side only."""
    return side.completion_mask.any(-1)


def sum_logps(side: ResponseLogps) -> Tensor:
    """Return log pi(y | x), `[B]` nats, summed over response tokens."""
    return masked_logps(side).sum(-1)


def mean_logps(side: ResponseLogps) -> Tensor:
    """Return log pi(y | x) / |y|, `[B]` nats per token."""
    return _mean(masked_logps(side), side)


def mean_logratios(side: ResponseLogps) -> Tensor:
    """Return (log pi(y | x) - log ref(y | x)) / |y|, `[B]` nats per token."""
    return _mean(masked_logratios(side), side)


def sum_logratios(side: ResponseLogps) -> Tensor:
    """Return log pi(y | x) - log ref(y | x), `[B]` nats."""
    return masked_logratios(side).sum(-1)


def sum_weighted_logratios(side: ResponseLogps) -> Tensor:
    """Return sum_t w_t (log pi - log ref), `[B]` nats."""
    return weighted_sum(masked_logratios(side), side)


def sum_kls(side: ResponseLogps) -> Tensor:
    """Return the KL of a response, `[B]` nats, summed over its tokens."""
    return masked_kls(side).sum(-1)


def decay_weights(side: ResponseLogps, gamma: float) -> Tensor:
    """Return gamma^t on response token t = 1, 2, ..., `[B, T]`; 0 elsewhere."""
    mask = side.completion_mask
    return masked(gamma ** mask.cumsum(-1).to(side.policy_logps.dtype), mask)


def unlikely_tokens(side: ResponseLogps) -> Tensor:
    """Return 1 on response tokens with pi(y_t) at most its mean in the response, 0 elsewhere, `[B, T]`, without a gradient."""
    probs = masked(side.policy_logps.detach().exp(), side.completion_mask)
    least = probs.masked_fill(~side.completion_mask, torch.inf).amin(-1)
    thresholds = _mean(probs, side).maximum(least)  # a mean of equal numbers may be rounded below them
    return ((probs <= thresholds[:, None]) & side.completion_mask).to(probs.dtype)


def by_ordinal(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return `values` and `mask`, `[B, T]`, with the first response token of every row in column 0."""
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
    return values.gather(-1, order), mask.gather(-1, order)


def masked_logps(side: ResponseLogps) -> Tensor:
    """Return log pi, `[B, T]`, 0 outside the response."""
    return masked(side.policy_logps, side.completion_mask)


def masked_logratios(side: ResponseLogps) -> Tensor:
    """Return log pi - log ref, `[B, T]`, 0 outside the response."""
    return masked(side.policy_logps - _given(side, "ref_logps").detach(), side.completion_mask)


def masked_kls(side: ResponseLogps) -> Tensor:
    """Return the KL per token, `[B, T]`, 0 outside the response."""
    return masked(_given(side, "kls"), side.completion_mask)


def masked_token_weights(side: ResponseLogps) -> Tensor:
    """Return the token weights, `[B, T]`, 0 outside the response."""
    return masked(_given(side, "token_weights").detach(), side.completion_mask)


def _given(side: ResponseLogps, field: str) -> Tensor:
    values: Tensor | None = getattr(side, field)
    if values is None:
        raise ValueError(f"this loss needs {field}; none were given")
    return values


def weighted_sum(values: Tensor, side: ResponseLogps) -> Tensor:
    """Return sum_t w_t v_t, `[B]`, of `values` `[B, T]` that are 0 outside the response."""
    return (masked_token_weights(side) * values).sum(-1)


def _mean(values: Tensor, side: ResponseLogps) -> Tensor:
    """Return the mean over response tokens, `[B]`, of `values` that are 0 elsewhere."""
    return values.sum(-1) / side.completion_mask.sum(-1).clamp(min=1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with 0 outside the mask, where a NaN reaches neither value nor gradient (a product with 0 keeps it)."""
    return torch.where(mask, values, values.new_zeros(()))
