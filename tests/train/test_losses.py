import math

import pytest
import torch
from torch import Tensor

from train.losses import ResponseLogps, dpo, sft, sum_logratios, tis_dpo


def response(policy: list[float], ref: list[float], token_weights: list[float] | None = None) -> ResponseLogps:
    """One unpadded response, [1, T], float64."""
    rows = [torch.tensor([values], dtype=torch.float64) for values in (policy, ref)]
    weights = None if token_weights is None else torch.tensor([token_weights], dtype=torch.float64)
    return ResponseLogps(rows[0].requires_grad_(), torch.ones_like(rows[0], dtype=torch.bool), rows[1], weights)


def random_side(seed: int, token_weights: Tensor | None = None) -> ResponseLogps:
    """Four responses of lengths 9, 1, 5, 3 behind prompts, [4, 12], float32; masked places hold rubbish."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref = -3 * torch.rand(4, 12, generator=generator), -3 * torch.rand(4, 12, generator=generator)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    for row, (begin, end) in enumerate([(3, 12), (4, 5), (1, 6), (2, 5)]):
        mask[row, begin:end] = True
    weights = torch.rand(4, 12, generator=generator) * 2 if token_weights is None else token_weights
    return ResponseLogps(policy.requires_grad_(), mask, ref, weights)


def oracle_loss(chosen: ResponseLogps, rejected: ResponseLogps, row: int, beta: float, weighted: bool) -> float:
    """The formula as a float64 loop over tokens."""
    margin = 0.0
    for sign, side in ((1, chosen), (-1, rejected)):
        for t in range(side.policy_logps.shape[1]):
            if side.completion_mask[row, t]:
                weight = float(side.token_weights[row, t]) if weighted else 1.0
                margin += sign * weight * (side.policy_logps[row, t].item() - float(side.ref_logps[row, t]))
    return math.log1p(math.exp(-beta * margin))


def test_tis_dpo_equals_the_sum_by_hand() -> None:
    # log-ratios: chosen 0.5, -0.2; rejected -0.4, 0.3, 0.1
    chosen = response([-1.0, -2.2], [-1.5, -2.0], [2.0, 1.0])
    rejected = response([-3.4, -0.7, -0.1], [-3.0, -1.0, -0.2], [0.5, 1.0, 2.0])
    result = tis_dpo(chosen, rejected, beta=0.1)
    # chosen 2*0.5 - 0.2 = 0.8; rejected -0.5*0.4 + 0.3 + 2*0.1 = 0.3; u = 0.1 * 0.5 = 0.05
    # loss = log(1 + exp(-0.05)) = log(1.951229) = 0.668460
    assert result.losses.item() == pytest.approx(0.668460, abs=1e-6)
    assert result.chosen_rewards.item() == pytest.approx(0.08)
    assert result.rejected_rewards.item() == pytest.approx(0.03)


def test_dpo_equals_the_sum_by_hand() -> None:
    chosen = response([-1.0, -2.2], [-1.5, -2.0])
    rejected = response([-3.4, -0.7, -0.1], [-3.0, -1.0, -0.2])
    result = dpo(chosen, rejected, beta=0.1)
    # chosen 0.5 - 0.2 = 0.3; rejected -0.4 + 0.3 + 0.1 = 0; u = 0.03
    # loss = log(1 + exp(-0.03)) = log(1.970446) = 0.678260
    assert result.losses.item() == pytest.approx(0.678260, abs=1e-6)
    assert (result.chosen_rewards.item(), result.rejected_rewards.item()) == pytest.approx((0.03, 0.0))


def test_sft_is_the_negative_log_likelihood_of_chosen() -> None:
    result = sft(response([-1.0, -2.2], [-1.5, -2.0]), beta=0.5)
    assert result.losses.item() == pytest.approx(3.2)  # 1.0 + 2.2
    assert result.chosen_rewards.item() == pytest.approx(0.15)  # 0.5 * (0.5 - 0.2)
    assert result.rejected_rewards is None
    assert sft(ResponseLogps(torch.tensor([[-1.0]]), torch.tensor([[True]]))).chosen_rewards is None


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_losses_equal_a_float64_loop_over_tokens(beta: float) -> None:
    chosen, rejected = random_side(1), random_side(2)
    for loss, weighted in ((dpo, False), (tis_dpo, True)):
        expected = [oracle_loss(chosen, rejected, row, beta, weighted) for row in range(4)]
        assert loss(chosen, rejected, beta=beta).losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_all_ones_weights_reduce_to_plain_dpo_bit_for_bit() -> None:
    ones = torch.ones(4, 12)
    chosen, rejected = random_side(1, ones), random_side(2, ones)
    weighted, plain = tis_dpo(chosen, rejected, beta=0.1), dpo(chosen, rejected, beta=0.1)
    for ours, theirs in zip(weighted, plain, strict=True):
        assert torch.equal(ours, theirs)
    inputs = (chosen.policy_logps, rejected.policy_logps)
    gradients = [torch.autograd.grad(result.losses.sum(), inputs) for result in (weighted, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_is_minus_beta_weight_sigmoid() -> None:
    """methods.md 1.2: dL/d log pi(y_t) = -beta w_t sigmoid(-u) on chosen tokens, with + on rejected ones."""
    chosen = response([-1.0, -2.2], [-1.5, -2.0], [2.0, 1.0])
    rejected = response([-3.4, -0.7, -0.1], [-3.0, -1.0, -0.2], [0.5, 1.0, 2.0])
    tis_dpo(chosen, rejected, beta=0.1).losses.sum().backward()
    scale = 0.1 / (1 + math.exp(0.05))  # u = 0.05, see above
    assert chosen.policy_logps.grad.tolist() == [pytest.approx([-2 * scale, -scale])]
    assert rejected.policy_logps.grad.tolist() == [pytest.approx([0.5 * scale, scale, 2 * scale])]


def test_policy_equal_to_reference_gives_log_2() -> None:
    chosen, rejected = (side._replace(policy_logps=side.ref_logps) for side in (random_side(1), random_side(2)))
    for loss in (dpo, tis_dpo):
        result = loss(chosen, rejected, beta=0.1)
        assert result.losses.tolist() == pytest.approx([math.log(2)] * 4)
        assert result.chosen_rewards.tolist() == [0.0] * 4


@pytest.mark.parametrize("loss", [dpo, tis_dpo])
def test_swapping_sides_negates_the_margin(loss) -> None:
    chosen, rejected = random_side(1), random_side(2)
    there, back = loss(chosen, rejected, beta=0.3), loss(rejected, chosen, beta=0.3)
    margins = there.chosen_rewards - there.rejected_rewards
    assert torch.equal(margins, -(back.chosen_rewards - back.rejected_rewards))
    # softplus(-u) - softplus(u) = -u
    assert torch.allclose(there.losses - back.losses, -margins, atol=1e-6)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_what_stands_outside_the_mask_changes_neither_value_nor_gradient(rubbish: float) -> None:
    clean = [random_side(1), random_side(2)]
    dirty = []
    for side in clean:
        fields = [field.detach().masked_fill(~side.completion_mask, rubbish) for field in (side[0], side[2], side[3])]
        dirty.append(ResponseLogps(fields[0].requires_grad_(), side.completion_mask, fields[1], fields[2]))
    results = [tis_dpo(*sides, beta=0.1) for sides in (clean, dirty)]
    assert torch.equal(results[0].losses, results[1].losses)
    for sides, result in zip((clean, dirty), results, strict=True):
        gradient = torch.autograd.grad(result.losses.sum(), sides[0].policy_logps)[0]
        assert torch.all(gradient[~sides[0].completion_mask] == 0)
        assert torch.all(gradient[sides[0].completion_mask] < 0)


def test_the_last_token_gets_gradient_like_any_other() -> None:
    """The official release gives EOS weight 0; here a weight of 1 is a weight of 1 on the last token as well."""
    chosen, rejected = response([-1.0, -1.0, -1.0], [-1.0] * 3, [1.0] * 3), response([-2.0], [-2.0], [1.0])
    tis_dpo(chosen, rejected, beta=0.1).losses.sum().backward()
    assert chosen.policy_logps.grad.tolist() == [pytest.approx([-0.05] * 3)]  # -0.1 * sigmoid(0)


def test_weights_and_reference_take_no_gradient() -> None:
    chosen, rejected = random_side(1), random_side(2)
    chosen.token_weights.requires_grad_()
    chosen.ref_logps.requires_grad_()
    tis_dpo(chosen, rejected, beta=0.1).losses.sum().backward()
    assert chosen.token_weights.grad is None
    assert chosen.ref_logps.grad is None


def test_huge_margins_stay_finite() -> None:
    chosen, rejected = response([0.0], [-1e4]), response([-1e4], [0.0])
    assert dpo(chosen, rejected, beta=1.0).losses.item() == 0.0
    assert dpo(rejected, chosen, beta=1.0).losses.item() == pytest.approx(2e4)


def test_missing_parts_are_refused() -> None:
    bare = ResponseLogps(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs ref_logps"):
        sum_logratios(bare)
    with pytest.raises(ValueError, match="needs token_weights"):
        tis_dpo(response([0.0], [0.0]), response([0.0], [0.0]), beta=0.1)
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        dpo(response([0.0], [0.0]), response([0.0], [0.0]), beta=0)
