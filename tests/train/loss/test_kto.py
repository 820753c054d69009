"""KTO: numbers by hand, a loop over tokens, TRL's own code, and what unpaired rows may not change."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from train.loss.config import LossSection
from train.loss.kto import kto, reference_point, tis_kto
from train.loss.metrics import MetricWindow
from train.loss.objective import compute_pair_losses
from train.loss.terms import ResponseLogps

LENGTH = 12
SPANS = [(3, 12), (4, 5), (1, 6), (2, 5)]
LABELS = [True, False, True, False]
Z0 = torch.tensor(0.25, dtype=torch.float64)


def make_side(seed: int, kept: list[bool] | None = None, **changed: Tensor) -> ResponseLogps:
    """Four responses of unequal length, one of them a single token, float64 `[4, 12]`; without tokens unless kept."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref, weights = (-3 * torch.rand(4, LENGTH, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(4, LENGTH, dtype=torch.bool)
    for row, (begin, end) in enumerate(SPANS):
        mask[row, begin:end] = kept is None or kept[row]
    side = ResponseLogps(policy.requires_grad_(), mask, ref, -weights / 2)
    return side._replace(**changed)


def one_token(policy: float, ref: float, weight: float = 1.0) -> ResponseLogps:
    policy_logps, ref_logps, weights = (torch.tensor([[value]], dtype=torch.float64) for value in (policy, ref, weight))
    return ResponseLogps(policy_logps.requires_grad_(), torch.tensor([[True]]), ref_logps, weights)


def unpaired() -> tuple[ResponseLogps, ResponseLogps]:
    """Rows 0 and 2 are desirable, 1 and 3 undesirable."""
    return make_side(1, LABELS), make_side(2, [not label for label in LABELS])


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_the_losses_of_two_responses_by_hand() -> None:
    chosen, rejected = one_token(-1.0, -1.5, 2.0), one_token(-2.0, -2.4, 0.5)
    # r = 0.5 and 0.4; 1 - sigmoid(2 (0.5 - 0.25)) = 0.37754; 1 - sigmoid(2 (0.25 - 0.4)) = 0.57444
    found = kto(chosen, rejected, z0=Z0, beta=2.0)
    assert found.losses.item() == pytest.approx(0.37754067 + 0.57444252, abs=1e-8)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx((1.0, 0.8))
    weighted = kto(chosen, rejected, z0=Z0, beta=2.0, desirable_weight=3.0, undesirable_weight=0.5)
    assert weighted.losses.item() == pytest.approx(3 * 0.37754067 + 0.57444252 / 2, abs=1e-8)
    # weighted sums 2 * 0.5 and 0.5 * 0.4: 1 - sigmoid(2 (1 - 0.25)) = 0.18243; 1 - sigmoid(2 (0.25 - 0.2)) = 0.47502
    by_tokens = tis_kto(chosen, rejected, z0=Z0, beta=2.0)
    assert by_tokens.losses.item() == pytest.approx(0.18242552 + 0.47502081, abs=1e-8)


@pytest.mark.parametrize(("loss", "is_weighted"), [(kto, False), (tis_kto, True)])
def test_value_and_gradient_equal_a_loop_over_tokens(loss, is_weighted) -> None:
    """d/dr of 1 - sigmoid(beta (r - z0)) is -beta v (1 - v), and r is linear in the log-probs; z0 is data."""
    chosen, rejected, beta, weights = *unpaired(), 0.7, (1.5, 0.5)
    z0 = Z0.clone().requires_grad_()
    found = loss(chosen, rejected, z0=z0, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    found.losses.sum().backward()
    assert z0.grad is None
    for row, label in enumerate(LABELS):
        side, sign, factor = (chosen, 1, weights[0]) if label else (rejected, -1, weights[1])
        begin, end = SPANS[row]
        reward = 0.0
        for t in range(begin, end):
            weight = side.token_weights[row, t].item() if is_weighted else 1.0
            reward += weight * (side.policy_logps[row, t] - side.ref_logps[row, t]).item()
        value = sigmoid(beta * sign * (reward - 0.25))
        assert found.losses[row].item() == pytest.approx(factor * (1 - value), rel=1e-12)
        for t in range(LENGTH):
            is_inside = begin <= t < end
            weight = side.token_weights[row, t].item() if is_weighted else 1.0
            expected = -factor * sign * beta * value * (1 - value) * weight if is_inside else 0.0
            assert side.policy_logps.grad[row, t].item() == pytest.approx(expected, rel=1e-10, abs=1e-15)
    assert not chosen.policy_logps.grad[[1, 3]].any()
    assert not rejected.policy_logps.grad[[0, 2]].any()


def test_all_ones_weights_reduce_to_plain_kto() -> None:
    ones = torch.ones(4, LENGTH, dtype=torch.float64)
    sides = tuple(side._replace(token_weights=ones) for side in unpaired())
    plain, weighted = (loss(*sides, z0=Z0, beta=0.3) for loss in (kto, tis_kto))
    assert all(map(torch.equal, plain, weighted))


def test_a_pair_is_two_unpaired_rows() -> None:
    chosen, rejected = make_side(1), make_side(2)
    nothing = torch.zeros(4, LENGTH, dtype=torch.bool)
    pairs = kto(chosen, rejected, z0=Z0, beta=0.3).losses
    first = kto(chosen, rejected._replace(completion_mask=nothing), z0=Z0, beta=0.3).losses
    second = kto(chosen._replace(completion_mask=nothing), rejected, z0=Z0, beta=0.3).losses
    assert torch.equal(pairs, first + second)
    # Labels the other way round: v and 1 - v.
    swapped = kto(rejected, chosen, z0=Z0, beta=0.3).losses
    assert torch.allclose(pairs + swapped, torch.full_like(pairs, 2.0))


def test_the_loss_before_the_first_step_is_one_half_for_each_response() -> None:
    sides = [side._replace(policy_logps=side.ref_logps) for side in unpaired()]
    assert kto(*sides, z0=torch.zeros(()), beta=0.1).losses.tolist() == [0.5] * 4


def test_the_reference_point_is_a_sum_over_responses_however_they_are_cut() -> None:
    # Log-ratios of the rows: 0.5, -0.2, 0.3
    sides = [one_token(-1.0, -1.5), one_token(-1.2, -1.0), one_token(-0.7, -1.0)]
    total, number = reference_point(sides).tolist()
    assert (total, number) == pytest.approx((0.6, 3))
    both = ResponseLogps(*(torch.cat(fields) for fields in zip(*(side[:4] for side in sides[:2]), strict=True)))
    assert reference_point([both, sides[2]]).tolist() == pytest.approx([0.6, 3])
    assert sum(reference_point([side])[0].item() for side in sides) == pytest.approx(0.6)


class GivenLogps(nn.Module):
    """Stands for a model with TRL's fused output layer: returns log-probs that were worked out already, call by call."""

    is_gradient_checkpointing = False

    def __init__(self, *calls: Tensor) -> None:
        """Take `[B, T]` of each call, 0 outside the response; TRL's entry t belongs to token t + 1."""
        super().__init__()
        self.calls = [logps[:, 1:] for logps in calls]

    def forward(self, **_: Any) -> SimpleNamespace:
        logps = self.calls.pop(0)
        return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps))


def trl_kto_loss(
    sides: tuple[ResponseLogps, ResponseLogps], other: ResponseLogps, settings: dict
) -> tuple[Tensor, dict]:
    """What `KTOTrainer._compute_loss` makes of the log-probs of unpaired rows, and its metrics."""
    pytest.importorskip("trl")
    from trl.trainer.kto_trainer import KTOTrainer

    def only(field: str) -> Tensor:
        rows = (torch.where(side.completion_mask, getattr(side, field), 0.0) for side in sides)
        return sum(rows)

    masked = [torch.where(other.completion_mask, values, 0.0) for values in (other.policy_logps, other.ref_logps)]
    policy, ref = (GivenLogps(kl, only(field)) for kl, field in zip(masked, ("policy_logps", "ref_logps"), strict=True))
    keep = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda values: values)
    trainer = KTOTrainer.__new__(KTOTrainer)
    fixed = {
        "model": policy,
        "ref_model": ref,
        "accelerator": keep,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "calculate_KL": True,
        "loss_type": "kto",
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in (fixed | settings).items():
        setattr(trainer, name, value)
    mask = (sides[0].completion_mask | sides[1].completion_mask).long()
    ones = torch.ones_like(mask)
    batch = {
        **dict.fromkeys(("input_ids", "attention_mask", "KL_input_ids", "KL_attention_mask"), ones),
        "completion_mask": mask,
        "KL_completion_mask": other.completion_mask.long(),
        "label": torch.tensor(LABELS),
    }
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("seed", [3, 4])  # z0 above 0, and cut at 0
def test_loss_gradients_and_metrics_equal_those_of_trl(seed) -> None:
    sides, other = unpaired(), make_side(seed)
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    wanted, metrics = trl_kto_loss(sides, other, settings)
    total, number = reference_point([other])
    z0 = (total / number).clamp(min=0)
    assert (z0 > 0) == (seed == 3)
    result, values = compute_pair_losses(
        TypeAdapter(LossSection).validate_python({"name": "kto", **settings}), *sides, z0=z0
    )
    ours = result.losses.mean()
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-12)
    inputs = [side.policy_logps for side in sides]
    for mine, theirs in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert theirs.abs().max() > 1e-6
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-15)
    window = MetricWindow()
    window.add(values, total_loss=result.losses.sum(), num_units=4)
    means = window.pop_means()
    names = [f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")]
    for name in (*names, "rewards/margins", "kl"):
        assert means[name] == pytest.approx(metrics[name], rel=1e-6), name
    assert "rewards/accuracies" not in means


def test_metrics_of_a_side_are_means_over_the_rows_that_have_it() -> None:
    sides = unpaired()
    config = TypeAdapter(LossSection).validate_python({"name": "tis_kto", "beta": 2.0})
    result, values = compute_pair_losses(config, *sides, z0=Z0)
    window = MetricWindow()
    window.add(values, total_loss=result.losses.sum(), num_units=4)
    means = window.pop_means()
    logratios = (sides[0].policy_logps - sides[0].ref_logps).masked_fill(~sides[0].completion_mask, 0).sum(1)
    assert means["rewards/chosen"] == pytest.approx(2 * logratios[[0, 2]].mean().item())
    assert means["weighted_rewards/chosen"] == pytest.approx(result.chosen_rewards[[0, 2]].mean().item())
    only_chosen = {name: value[[0, 2]] for name, value in values.items()}
    window.add(only_chosen, total_loss=torch.zeros(()), num_units=2)
    names = {"loss", "kl", "logps/chosen", "rewards/chosen", "weighted_rewards/chosen"}
    assert window.pop_means().keys() == names


def test_nll_lambda_is_sft_on_the_desirable_responses() -> None:
    """Added to the loss of a row with such a response, whatever its factor, and to no other one."""
    settings = {"name": "kto", "beta": 0.3, "desirable_weight": 1.5}
    plain, with_nll = (
        compute_pair_losses(TypeAdapter(LossSection).validate_python(settings | more), *unpaired(), z0=Z0)
        for more in ({}, {"nll_lambda": 0.2})
    )
    logps = unpaired()[0].policy_logps
    nll = [-logps[row, begin:end].mean().item() for row, (begin, end) in enumerate(SPANS)]
    added = (with_nll[0].losses - plain[0].losses).tolist()
    assert added == pytest.approx([0.2 * nll[0], 0, 0.2 * nll[2], 0], abs=1e-12)
    assert with_nll[1].keys() - plain[1].keys() == {"nll"}
    window = MetricWindow()
    window.add(with_nll[1], total_loss=with_nll[0].losses.sum(), num_units=4)
    means = window.pop_means()
    assert means["nll"] == pytest.approx((nll[0] + nll[2]) / 2)  # of the two that have one
    assert means["loss"] == pytest.approx((plain[0].losses.sum().item() + 0.2 * (nll[0] + nll[2])) / 4)


def test_a_missing_reference_point_is_refused() -> None:
    config = TypeAdapter(LossSection).validate_python({"name": "kto", "beta": 0.1})
    with pytest.raises(ValueError, match="kto needs the z0 of the step; none was given"):
        compute_pair_losses(config, *unpaired())
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        kto(*unpaired(), z0=Z0, beta=0)
