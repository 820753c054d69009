"""What is logged about a batch, and its mean over a logging window.

TRL's names (`rewards/*`, `logps/*`) always mean unweighted sums, so that runs with and without token weights compare;
what the weighted loss sees has names of its own (`weighted_rewards/*`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train.losses import PairLosses, ResponseLogps, sum_logps, sum_logratios


@torch.no_grad()
def pair_metrics(
    chosen: ResponseLogps, rejected: ResponseLogps | None, *, beta: float, weighted: PairLosses | None = None
) -> dict[str, Tensor]:
    """Values `[B]` by name; without `rejected` only those of the chosen side.

    Args:
        chosen: With `ref_logps`.
        rejected: Likewise, or None.
        beta: Scale of the rewards.
        weighted: What a weighted loss returned, for the `weighted_rewards/*`.
    """
    metrics = {"rewards/chosen": beta * sum_logratios(chosen), "logps/chosen": sum_logps(chosen)}
    if rejected is not None:
        metrics |= _rewards("rewards", metrics["rewards/chosen"], beta * sum_logratios(rejected))
        metrics["logps/rejected"] = sum_logps(rejected)
    if weighted is not None and weighted.chosen_rewards is not None and weighted.rejected_rewards is not None:
        metrics |= _rewards("weighted_rewards", weighted.chosen_rewards, weighted.rejected_rewards)
    return metrics


def _rewards(name: str, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/chosen": chosen_rewards,
        f"{name}/rejected": rejected_rewards,
        f"{name}/margins": chosen_rewards - rejected_rewards,
        f"{name}/accuracies": (chosen_rewards > rejected_rewards).float(),
    }


class MetricWindow:
    """Sums and counts since the last `pop_means`; nothing leaves the device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], *, total_loss: Tensor, num_units: int) -> None:
        """Add one micro-batch.

        Args:
            values: `[B]` each, averaged over pairs.
            total_loss: Sum of the losses, a scalar.
            num_units: Pairs or tokens that the loss is averaged over.
        """
        for name, value in values.items():
            self._add(name, value.sum(), len(value))
        self._add("loss", total_loss, num_units)

    def _add(self, name: str, total: Tensor, count: int) -> None:
        total = total.detach().float()
        entry = torch.stack([total, torch.full_like(total, count)])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def pop_means(self, reduce_over_ranks: Callable[..., Tensor] | None = None) -> dict[str, float]:
        """Return the mean of every value and start a new window.

        Args:
            reduce_over_ranks: accelerate's `reduce`; None where every rank has seen everything.
        """
        if not self._sums:
            return {}
        names, sums = sorted(self._sums), torch.stack([self._sums[name] for name in sorted(self._sums)])
        if reduce_over_ranks is not None:
            sums = reduce_over_ranks(sums, reduction="sum")
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True)}
