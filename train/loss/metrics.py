"""What is logged about a batch, and its mean over a logging window.

TRL's names (`rewards/*`, `logps/*`) always mean unweighted sums, so that runs with and without token weights can be compared.
What a loss compares instead (weighted sums, means, with a KL) is `weighted_rewards/*`. A KL has its direction in the name,
since KL(pi‖ref) and KL(ref‖pi) are not comparable.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train.loss.needs import KlDirection
from train.loss.terms import PairLosses, ResponseLogps, has_tokens, masked, sum_kls, sum_logps, sum_logratios
from train.loss.triplet import triplet


@torch.no_grad()
def pair_metrics(
    chosen: ResponseLogps,
    rejected: ResponseLogps | None,
    *,
    beta: float,
    weighted: PairLosses | None = None,
    kl_direction: KlDirection | None = None,
) -> dict[str, Tensor]:
    """Return values `[B]` by name; without `rejected` only those of chosen, and no rewards without `ref_logps`.

    A value is NaN where the row has no such response, and a comparison where it has only one.

    Args:
        chosen: One side.
        rejected: The other, or None.
        beta: Scale of the rewards.
        weighted: The result of a loss whose rewards are not the plain ones, for `weighted_rewards/*`.
        kl_direction: Of the `kls`, for `kl_*`: unweighted sums over the response; None for no KL.
    """
    sides = {"chosen": chosen} if rejected is None else {"chosen": chosen, "rejected": rejected}
    metrics = {f"logps/{name}": sum_logps(side) for name, side in sides.items()}
    if all(side.ref_logps is not None for side in sides.values()):
        metrics |= _rewards("rewards", {name: beta * sum_logratios(side) for name, side in sides.items()})
    if weighted is not None and weighted.chosen_rewards is not None and weighted.rejected_rewards is not None:
        rewards = {"chosen": weighted.chosen_rewards, "rejected": weighted.rejected_rewards}
        metrics |= _rewards("weighted_rewards", rewards)
    if kl_direction is not None:
        metrics |= {f"kl_{kl_direction}/{name}": sum_kls(side) for name, side in sides.items()}
    is_there = {name: has_tokens(side) for name, side in sides.items()}
    is_pair = torch.stack(list(is_there.values())).all(0)
    return {
        name: torch.where(is_there.get(name.rpartition("/")[2], is_pair), values, torch.nan)
        for name, values in metrics.items()
    }


@torch.no_grad()
def triplet_metrics(
    chosen: ResponseLogps, rejected: ResponseLogps, anchor: ResponseLogps, *, margin: float
) -> dict[str, Tensor]:
    """Return values `[B]` by name: the triplet loss without its factor, whether it is above 0, and the anchor's distances."""
    found = triplet(chosen, rejected, anchor, margin=margin)
    return {
        "triplet": found.losses,
        "triplet/active": (found.losses > 0).float(),
        "triplet/to_chosen": found.to_chosen,
        "triplet/to_rejected": found.to_rejected,
    }


def _rewards(prefix: str, rewards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    metrics = {f"{prefix}/{name}": values for name, values in rewards.items()}
    if "rejected" in rewards:
        metrics[f"{prefix}/margins"] = rewards["chosen"] - rewards["rejected"]
        metrics[f"{prefix}/accuracies"] = (rewards["chosen"] > rewards["rejected"]).float()
    return metrics


class MetricWindow:
    """Sums and counts since the last `pop_means`; they stay on the device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], *, total_loss: Tensor, num_units: int) -> None:
        """Add one micro-batch.

        Args:
            values: `[B]` each; their means are over the pairs that have one: where it is not NaN.
            total_loss: Sum of the losses, a scalar.
            num_units: Pairs or tokens that the loss is averaged over.
        """
        loss = total_loss.detach().float()
        sums = {"loss": torch.stack([loss, torch.full_like(loss, num_units)])}
        for name, value in values.items():
            is_there = ~value.isnan()
            sums[name] = torch.stack([masked(value.detach(), is_there).sum().float(), is_there.sum().float()])
        for name, more in sums.items():
            self._sums[name] = self._sums.get(name, 0) + more

    def merge(self, other: "MetricWindow") -> None:
        """Add what another window holds."""
        for name, sums in other._sums.items():
            self._sums[name] = self._sums.get(name, 0) + sums

    def pop_means(self, reduce_over_ranks: Callable[..., Tensor] | None = None) -> dict[str, float]:
        """Return the mean of every value and start a new window; `reduce_over_ranks` is None for a single process.

        A value that no pair has is left out. Margins of unpaired rows are, as TRL has them, the difference of the mean rewards.
        """
        if not self._sums:
            return {}
        names, sums = sorted(self._sums), torch.stack([self._sums[name] for name in sorted(self._sums)])
        if reduce_over_ranks is not None:
            sums = reduce_over_ranks(sums, reduction="sum")
        self._sums = {}
        means = {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
        for kind in ("rewards", "weighted_rewards"):
            if {f"{kind}/chosen", f"{kind}/rejected"} <= means.keys():
                means.setdefault(f"{kind}/margins", means[f"{kind}/chosen"] - means[f"{kind}/rejected"])
        return means
