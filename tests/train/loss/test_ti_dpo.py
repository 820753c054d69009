"""TI-DPO's loss and its triplet. Log-ratios of the anchor are d, of chosen b, of rejected c, as in the paper."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from train.loss.losses import dpo, tdpo2, ti_dpo, tis_dpo
from train.loss.terms import ResponseLogps
from train.loss.triplet import Triplet, triplet

T = 14
BEGINS = (3, 4, 1, 2)
LENGTHS = {"chosen": (9, 1, 5, 3), "rejected": (4, 6, 5, 1), "anchor": (6, 3, 5, 11)}  # shorter, between, equal, longer
SIDES = ("chosen", "rejected", "anchor")
Sides = tuple[ResponseLogps, ResponseLogps, ResponseLogps]


def response(
    ratios: list[float], token_weights: list[float] | None = None, kls: list[float] | None = None
) -> ResponseLogps:
    """One unpadded response with these log-ratios, [1, T], float64; the reference's log-probs are -2."""
    policy = torch.tensor([ratios], dtype=torch.float64) - 2
    more = [None if values is None else torch.tensor([values], dtype=torch.float64) for values in (token_weights, kls)]
    ref = torch.full_like(policy, -2)
    return ResponseLogps(policy.requires_grad_(), torch.ones_like(policy, dtype=torch.bool), ref, *more)


def random_sides(token_weights: float | None = None, dtype: torch.dtype = torch.float64) -> Sides:
    """Four pairs with anchors behind prompts, [4, 14]; masked places hold rubbish."""
    generator = torch.Generator().manual_seed(1)
    sides = []
    for name in SIDES:
        mask = torch.zeros(4, T, dtype=torch.bool)
        for row, (begin, length) in enumerate(zip(BEGINS, LENGTHS[name], strict=True)):
            mask[row, begin : begin + length] = True
        policy, ref, weights, kls = torch.rand(4, 4, T, generator=generator).to(dtype).unbind()
        weights = 2 * weights if token_weights is None else torch.full_like(weights, token_weights)
        sides.append(ResponseLogps((-3 * policy).requires_grad_(), mask, -3 * ref, weights, kls.requires_grad_()))
    return tuple(sides)


def gradients(losses: Tensor, sides: Sides) -> list[Tensor]:
    """By policy log-probs of the three sides, then by their KLs; 0 where there are none."""
    inputs = [side.policy_logps for side in sides] + [side.kls for side in sides if side.kls is not None]
    found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


class Token(NamedTuple):
    policy: float
    ref: float
    weight: float
    kl: float


def tokens(side: ResponseLogps, row: int) -> list[Token]:
    fields = (side.policy_logps, side.ref_logps, side.token_weights, side.kls)
    return [Token(*(field[row, t].item() for field in fields)) for t in range(T) if side.completion_mask[row, t]]


def loop_over_tokens(b: list[Token], c: list[Token], d: list[Token], held: list[Token], alpha: float) -> float:
    """Oracle with beta 0.3, gamma 0.2, margin 0.7; `held` are the chosen tokens whose KL takes no gradient."""
    logit = hinge = 0.0
    for token in b:
        logit += token.weight * (token.policy - token.ref)
    for token in c:
        logit -= token.weight * (token.policy - token.ref) + alpha * token.kl
    for token in held:
        logit += alpha * token.kl
    for ours, theirs, sign in ((d, b, 1), (d, c, -1)):
        for t in range(min(len(ours), len(theirs))):
            hinge += sign * (ours[t].policy - ours[t].ref - theirs[t].policy + theirs[t].ref) ** 2
    return math.log(1 + math.exp(-0.3 * logit)) + 0.2 * max(0.0, hinge + 0.7)


@pytest.mark.parametrize("alpha", [0.0, 0.4], ids=["paper", "release"])
def test_ti_dpo_equals_a_float64_loop_over_tokens_in_value_and_gradient(alpha: float) -> None:
    sides = random_sides()
    result = ti_dpo(*sides, beta=0.3, alpha=alpha, triplet_gamma=0.2, triplet_margin=0.7)
    by_name = dict(
        zip([(f, s) for f in ("policy", "kl") for s in range(3)], gradients(result.losses, sides), strict=True)
    )
    step, active = 1e-5, set()
    for row in range(4):
        plain = [tokens(side, row) for side in sides]
        assert result.losses[row].item() == pytest.approx(loop_over_tokens(*plain, plain[0], alpha), rel=1e-12)
        for (field, s), gradient in by_name.items():
            for t, begin in enumerate(range(BEGINS[row], BEGINS[row] + len(plain[s]))):
                ends = []
                for shift in (step, -step):
                    moved = list(plain)
                    token = plain[s][t]._replace(**{field: getattr(plain[s][t], field) + shift})
                    moved[s] = [*plain[s][:t], token, *plain[s][t + 1 :]]
                    ends.append(loop_over_tokens(*moved, plain[0], alpha))
                assert gradient[row, begin].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-9)
        active.add(triplet(*sides, margin=0.7).losses[row].item() > 0)
    assert active == {True, False}  # both branches of the hinge were there


def test_ti_dpo_and_its_triplet_equal_the_sums_by_hand() -> None:
    chosen = response([0.5, -0.2], [2.0, 1.0], [0.1, 0.2])
    rejected = response([-0.4, 0.3, 0.1], [0.5, 1.0, 2.0], [0.3, 0.1, 0.4])
    anchor = response([0.1, 0.2, -0.3, 5.0])  # its fourth token meets nobody
    found = triplet(chosen, rejected, anchor, margin=0.05)
    assert found.to_chosen.item() == pytest.approx(0.32)  # (0.1 - 0.5)^2 + (0.2 + 0.2)^2
    assert found.to_rejected.item() == pytest.approx(0.42)  # (0.1 + 0.4)^2 + (0.2 - 0.3)^2 + (-0.3 - 0.1)^2
    assert found.losses.item() == 0.0  # 0.32 - 0.42 + 0.05 < 0
    assert triplet(chosen, rejected, anchor, margin=0.5).losses.item() == pytest.approx(0.4)
    # weighted sums 2*0.5 - 0.2 = 0.8 and -0.5*0.4 + 0.3 + 2*0.1 = 0.3; log(1 + exp(-0.1 * 0.5)) = log(1.951229)
    paper = ti_dpo(chosen, rejected, anchor, beta=0.1, triplet_gamma=0.1, triplet_margin=0.5)
    assert paper.losses.item() == pytest.approx(0.668460 + 0.1 * 0.4, abs=1e-6)
    assert (paper.chosen_rewards.item(), paper.rejected_rewards.item()) == pytest.approx((0.08, 0.03))
    # KL sums 0.3 and 0.8: 0.5 - 0.5 * (0.8 - 0.3) = 0.25; log(1 + exp(-0.025)) = log(1.975310)
    release = ti_dpo(chosen, rejected, anchor, beta=0.1, alpha=0.5, triplet_gamma=0.1, triplet_margin=0.5)
    assert release.losses.item() == pytest.approx(0.680725 + 0.1 * 0.4, abs=1e-6)
    # 0.1 * (0.8 + 0.5 * 0.3) and 0.1 * (0.3 + 0.5 * 0.8)
    assert (release.chosen_rewards.item(), release.rejected_rewards.item()) == pytest.approx((0.095, 0.07))


def test_gradients_pass_gradcheck() -> None:
    sides = random_sides()

    def run(chosen: Tensor, rejected: Tensor, anchor: Tensor, kls: Tensor) -> Tensor:
        # the chosen KL takes no gradient on purpose, which gradcheck cannot know
        moved = (sides[0]._replace(policy_logps=chosen), sides[1]._replace(policy_logps=rejected, kls=kls))
        anchored = sides[2]._replace(policy_logps=anchor)
        return ti_dpo(*moved, anchored, beta=0.3, alpha=0.4, triplet_gamma=0.2, triplet_margin=0.7).losses

    assert torch.autograd.gradcheck(run, (*(side.policy_logps for side in sides), sides[1].kls))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (lambda c, r: ti_dpo(c, r, beta=0.1), lambda c, r: dpo(c, r, beta=0.1)),
        (lambda c, r: ti_dpo(c, r, beta=0.1, alpha=0.5), lambda c, r: tdpo2(c, r, beta=0.1, alpha=0.5)),
    ],
    ids=["paper is dpo", "release is tdpo2"],
)
def test_without_a_triplet_and_with_weights_of_1_the_base_remains_bit_for_bit(
    ours: Callable, expected: Callable
) -> None:
    chosen, rejected, _ = sides = random_sides(token_weights=1.0, dtype=torch.float32)
    found, wanted = ours(chosen, rejected), expected(chosen, rejected)
    assert torch.equal(found.losses, wanted.losses)
    assert torch.equal(found.chosen_rewards, wanted.chosen_rewards)
    for gradient, other in zip(gradients(found.losses, sides), gradients(wanted.losses, sides), strict=True):
        assert torch.equal(gradient, other)


def test_without_a_triplet_the_paper_s_loss_is_tis_dpo_s_on_other_weights() -> None:
    chosen, rejected, anchor = random_sides(dtype=torch.float32)
    expected = tis_dpo(chosen, rejected, beta=0.1)
    assert torch.equal(ti_dpo(chosen, rejected, anchor, beta=0.1, triplet_margin=0.5).losses, expected.losses)


def test_where_the_policy_is_the_reference_the_triplet_is_its_margin_and_has_no_gradient() -> None:
    sides = tuple(side._replace(ref_logps=side.policy_logps.detach()) for side in random_sides())
    found = triplet(*sides, margin=0.3)
    assert torch.all(found.losses == 0.3)
    for gradient in gradients(found.losses, sides):
        assert torch.all(gradient == 0)
    # the rest of the loss is at work: log 2 and its gradient, -beta w / 2 on chosen
    result = ti_dpo(*sides, beta=0.2, triplet_gamma=0.1, triplet_margin=0.3)
    assert torch.allclose(result.losses, torch.full_like(result.losses, math.log(2) + 0.03))
    chosen = sides[0]
    expected = torch.where(chosen.completion_mask, -0.1 * chosen.token_weights, 0.0)
    assert torch.allclose(gradients(result.losses, sides)[0], expected)


def test_an_inactive_hinge_has_no_gradient_and_an_active_one_pulls_all_three() -> None:
    sides = (response([0.4]), response([-2.0]), response([0.1]))
    assert triplet(*sides, margin=0.5).losses.item() == 0  # 0.09 - 4.41 + 0.5
    assert all(gradient.item() == 0 for gradient in gradients(triplet(*sides, margin=0.5).losses, sides))
    active = triplet(*sides, margin=5.0).losses
    # by b: -2 (d - b); by c: 2 (d - c); by d: 2 (d - b) - 2 (d - c)
    assert [gradient.item() for gradient in gradients(active, sides)] == pytest.approx([0.6, 4.2, -4.8])
    assert active.item() == pytest.approx(0.68)


def test_an_anchor_that_is_the_chosen_response_is_no_distance_from_it() -> None:
    chosen, rejected, _ = random_sides()
    found = triplet(chosen, rejected, chosen, margin=0.5)
    assert torch.all(found.to_chosen == 0)
    assert torch.allclose(found.losses, torch.relu(0.5 - found.to_rejected))
    assert torch.all(found.to_rejected > 0)


def test_swapping_the_sides_swaps_the_distances_and_negates_their_difference() -> None:
    chosen, rejected, anchor = random_sides()
    found, swapped = triplet(chosen, rejected, anchor, margin=0.0), triplet(rejected, chosen, anchor, margin=0.0)
    assert torch.equal(found.to_chosen, swapped.to_rejected)
    assert torch.equal(found.losses - swapped.losses, found.to_chosen - found.to_rejected)


def test_tokens_behind_the_shorter_of_two_responses_meet_nobody() -> None:
    sides = random_sides()
    by_chosen, by_rejected, by_anchor, *_ = gradients(triplet(*sides, margin=100.0).losses, sides)
    for row in range(4):
        num_tokens = {name: LENGTHS[name][row] for name in SIDES}
        reached = {
            "chosen": min(num_tokens["chosen"], num_tokens["anchor"]),
            "rejected": min(num_tokens["rejected"], num_tokens["anchor"]),
            "anchor": min(num_tokens["anchor"], max(num_tokens["chosen"], num_tokens["rejected"])),
        }
        for name, gradient in zip(SIDES, (by_chosen, by_rejected, by_anchor), strict=True):
            places = gradient[row].nonzero().flatten().tolist()
            assert places == list(range(BEGINS[row], BEGINS[row] + reached[name])), name


def test_tokens_are_compared_by_their_number_in_the_response_wherever_it_begins() -> None:
    sides = random_sides()
    expected = triplet(*sides, margin=0.7)
    shifted = tuple(
        ResponseLogps(*(torch.nn.functional.pad(field.detach(), (shift, 9 - shift)) for field in side))
        for side, shift in zip(sides, (0, 5, 9), strict=True)
    )
    for ours, wanted in zip(triplet(*shifted, margin=0.7), expected, strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_what_stands_outside_the_mask_changes_neither_value_nor_gradient(rubbish: float) -> None:
    clean, dirty = random_sides(), []
    for side in clean:
        policy, ref, weights, kls = (side[i].detach().masked_fill(~side.completion_mask, rubbish) for i in (0, 2, 3, 4))
        dirty.append(ResponseLogps(policy.requires_grad_(), side.completion_mask, ref, weights, kls.requires_grad_()))
    found = []
    for sides in (clean, tuple(dirty)):
        losses = ti_dpo(*sides, beta=0.3, alpha=0.4, triplet_gamma=0.2, triplet_margin=9.0).losses
        found.append([losses, *gradients(losses, sides)])
    assert all(torch.equal(*values) for values in zip(*found, strict=True))


def test_log_ratios_of_300_nats_per_token_stay_finite() -> None:
    sides = random_sides(dtype=torch.float32)
    low, zero = torch.full((4, T), -300.0), torch.zeros(4, T)
    sides = tuple(
        side._replace(policy_logps=policy.clone().requires_grad_(), ref_logps=ref)
        for side, policy, ref in zip(sides, (low, zero, zero), (zero, low, low), strict=True)
    )
    losses = ti_dpo(*sides, beta=0.3, alpha=0.4, triplet_gamma=0.2, triplet_margin=0.5).losses
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(losses, sides))


def test_what_the_triplet_lacks_is_named() -> None:
    chosen, rejected, anchor = random_sides()
    with pytest.raises(ValueError, match="ti_dpo with triplet_gamma above 0 needs an anchor; none was given"):
        ti_dpo(chosen, rejected, beta=0.1, triplet_gamma=0.1, triplet_margin=0.5)
    with pytest.raises(ValueError, match="this loss needs ref_logps; none were given"):
        triplet(chosen, rejected, anchor._replace(ref_logps=None), margin=0.5)
    with pytest.raises(ValueError, match="this loss needs kls; none were given"):
        ti_dpo(chosen._replace(kls=None), rejected, beta=0.1, alpha=0.5)
    assert isinstance(triplet(chosen, rejected, anchor._replace(token_weights=None, kls=None), margin=0.5), Triplet)
