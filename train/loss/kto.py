"""KTO: losses of single responses, desirable (chosen) or undesirable (rejected), and the reference point of a step.

The losses are functions like those of `losses.py`, which offers them too.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from train.loss.terms import (
    PairLosses,
    ResponseLogps,
    has_tokens,
    masked,
    sum_logratios,
    sum_weighted_logratios,
)


def kto(
    chosen: ResponseLogps,
    rejected: ResponseLogps,
    *,
    z0: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PairLosses:
    """Sum of the KTO losses of the responses of each row, `[B]`; token weights are ignored.

    A response without tokens, as unpaired rows have one, adds nothing, and its reward is 0.

    Args:
        chosen: The desirable responses.
        rejected: The undesirable ones.
        z0: The reference point, nats, a scalar >= 0, see `reference_point`; no gradient flows into it.
        beta: > 0.
        desirable_weight: Factor of the loss of a desirable response, which is between 0 and 1.
        undesirable_weight: Likewise.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306 (ICML 2024), in the form of the official release (HALOs, train/trainers.py) and
        of TRL's `KTOTrainer` (1.16), which names Eq. 7. The paper's text could not be read.
    """
    weights = (desirable_weight, undesirable_weight)
    return _kto((chosen, rejected), (sum_logratios(chosen), sum_logratios(rejected)), z0, beta, weights)


def tis_kto(
    chosen: ResponseLogps,
    rejected: ResponseLogps,
    *,
    z0: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PairLosses:
    """Sum of the KTO losses of the responses of each row, `[B]`, on weighted sums of log-ratios. Arguments as for `kto`.

    With all weights 1 it equals `kto` bit for bit. z0 has no weights.

    References:
        After TKTO, arXiv 2510.05799 (ACL 2026), which weighs tokens as TIS-DPO does. Its abstract and summaries of it could be
        read, its equations not. Departure, by what the summaries say: TKTO has a value for each token, and adds them up with
        weights; here a response has one value, as TIS-DPO compares one sum.
    """
    weights = (desirable_weight, undesirable_weight)
    sums = (sum_weighted_logratios(chosen), sum_weighted_logratios(rejected))
    return _kto((chosen, rejected), sums, z0, beta, weights)


def reference_point(mismatched: Iterable[ResponseLogps]) -> Tensor:
    """Return sum and number of the log-ratios of responses to other prompts, `[2]`; z0 is max(0, sum / number) over all ranks.

    It estimates KL(pi‖ref). TRL and the official release take the mean over one micro-batch of all ranks; here it is that of
    the whole step, so that it does not depend on how a step is cut.
    """
    logratios = torch.cat([sum_logratios(side) for side in mismatched])
    return torch.stack([logratios.sum(), torch.full_like(logratios.sum(), len(logratios))])


def _kto(
    sides: tuple[ResponseLogps, ResponseLogps],
    sums: tuple[Tensor, Tensor],
    z0: Tensor,
    beta: float,
    weights: tuple[float, float],
) -> PairLosses:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    z0 = z0.detach()
    desirable = weights[0] * torch.sigmoid(beta * (z0 - sums[0]))  # 1 - sigmoid(beta (r - z0)), Eq. 7
    undesirable = weights[1] * torch.sigmoid(beta * (sums[1] - z0))  # 1 - sigmoid(beta (z0 - r))
    losses = masked(desirable, has_tokens(sides[0])) + masked(undesirable, has_tokens(sides[1]))
    return PairLosses(losses, beta * sums[0].detach(), beta * sums[1].detach())
