"""Preference losses as pure functions of per-token log-probabilities.

Called by the trainer; usable alone. Weights and reference log-probs are data: no gradient flows into them. The end-of-text
token is a token like any other here, in every loss. Not here: the next-token shift (`logps.py`), reduction over pairs
(`trainer.py`), and the eta term of TIS-DPO.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    """w_t, unitless."""


class PairLosses(NamedTuple):
    """What a loss returns, `[B]` each; rewards are detached, in nats, and None where they cannot be known."""

    losses: Tensor
    chosen_rewards: Tensor | None
    rejected_rewards: Tensor | None


def dpo(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float) -> PairLosses:
    """Per-pair DPO loss, `[B]` nats. Token weights are ignored.

    Args:
        chosen: Preferred responses, with `ref_logps`.
        rejected: The others, with `ref_logps`.
        beta: > 0.

    Raises:
        ValueError: `ref_logps` are missing or `beta` is not positive.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, Eq. 7.
    """
    return _logistic(sum_logratios(chosen), sum_logratios(rejected), beta)


def tis_dpo(chosen: ResponseLogps, rejected: ResponseLogps, *, beta: float) -> PairLosses:
    """Per-pair TIS-DPO loss with eta off, `[B]` nats. Rewards are the weighted ones that the loss sees.

    With all weights 1 it equals `dpo` bit for bit, value and gradient: the end-of-text token is weighted too, where the
    official release gives it 0.

    Args:
        chosen: Preferred responses, with `ref_logps` and `token_weights`.
        rejected: The others, likewise.
        beta: > 0.

    Raises:
        ValueError: `ref_logps` or `token_weights` are missing or `beta` is not positive.

    References:
        Liu et al. 2024, arXiv 2410.04350 (ICLR 2025); u as in the official release, trainers.py, `token_level=false`.
    """
    return _logistic(sum_weighted_logratios(chosen), sum_weighted_logratios(rejected), beta)


def sft(chosen: ResponseLogps, rejected: ResponseLogps | None = None, *, beta: float = 1.0) -> PairLosses:
    """Negative log-likelihood of each chosen response, `[B]` nats summed over its tokens.

    The trainer divides by the number of response tokens of a step, not by pairs. Rewards are there for the sides that
    come with `ref_logps`; with the default beta they are plain log-ratios.

    Args:
        chosen: The responses to imitate.
        rejected: Only for its rewards.
        beta: Scale of the rewards, > 0; not part of the loss.
    """
    losses = -sum_logps(chosen)  # -sum_t log pi(y_t | x, y_<t)
    return PairLosses(losses, _rewards_if_known(chosen, beta), _rewards_if_known(rejected, beta))


def sum_logps(side: ResponseLogps) -> Tensor:
    """Return log pi(y | x), `[B]` nats, summed over response tokens."""
    return _masked(side.policy_logps, side.completion_mask).sum(-1)


def sum_logratios(side: ResponseLogps) -> Tensor:
    """Return log pi(y | x) - log ref(y | x), `[B]` nats.

    Raises:
        ValueError: `ref_logps` are missing.
    """
    return _per_token_logratios(side).sum(-1)


def sum_weighted_logratios(side: ResponseLogps) -> Tensor:
    """sum_t w_t (log pi - log ref), `[B]` nats.

    Raises:
        ValueError: `ref_logps` or `token_weights` are missing.
    """
    if side.token_weights is None:
        raise ValueError("this loss needs token_weights; none were given")
    return _masked(side.token_weights.detach() * _per_token_logratios(side), side.completion_mask).sum(-1)


def _logistic(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> PairLosses:
    """-log sigmoid(beta * (chosen - rejected)), `[B]`."""
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    margins = beta * (chosen_logratios - rejected_logratios)  # u of TIS-DPO; Eq. 7 of DPO for weights 1
    losses = -F.logsigmoid(margins)
    return PairLosses(losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach())


def _per_token_logratios(side: ResponseLogps) -> Tensor:
    if side.ref_logps is None:
        raise ValueError("this loss needs ref_logps; none were given")
    return _masked(side.policy_logps - side.ref_logps.detach(), side.completion_mask)


def _rewards_if_known(side: ResponseLogps | None, beta: float) -> Tensor | None:
    if side is None or side.ref_logps is None:
        return None
    return beta * sum_logratios(side).detach()


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zero outside the mask; a NaN there reaches neither value nor gradient (multiplying by 0 would keep it)."""
    return torch.where(mask, values, values.new_zeros(()))
