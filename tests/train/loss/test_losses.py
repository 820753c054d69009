import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from train.loss import losses
from train.loss.losses import dpo, sft, tis_dpo
from train.loss.terms import PairLosses, ResponseLogps, decay_weights, sum_logratios, unlikely_tokens
from weights_store.errors import InputError

SPANS = [(3, 12), (4, 5), (1, 6), (2, 5)]  # lengths 9, 1 (nothing but its end-of-text token), 5, 3
CHOSEN_SCORES, REJECTED_SCORES = [8.0, 2.0, 4.5, 3.0], [3.0, 2.5, 4.5, 1.0]


def response(policy: list[float], ref: list[float], token_weights: list[float] | None = None, **kls) -> ResponseLogps:
    """One unpadded response, [1, T], float64."""
    rows = [torch.tensor([values], dtype=torch.float64) for values in (policy, ref)]
    weights = None if token_weights is None else torch.tensor([token_weights], dtype=torch.float64)
    kls = {name: torch.tensor([values], dtype=torch.float64) for name, values in kls.items()}
    return ResponseLogps(rows[0].requires_grad_(), torch.ones_like(rows[0], dtype=torch.bool), rows[1], weights, **kls)


def random_side(seed: int, token_weights: Tensor | None = None, dtype: torch.dtype = torch.float32) -> ResponseLogps:
    """Four responses of lengths 9, 1, 5, 3 behind prompts, [4, 12]; masked places hold rubbish."""
    generator = torch.Generator().manual_seed(seed)
    policy, ref = (-3 * torch.rand(4, 12, generator=generator) for _ in range(2))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    for row, (begin, end) in enumerate(SPANS):
        mask[row, begin:end] = True
    weights = torch.rand(4, 12, generator=generator) * 2 if token_weights is None else token_weights
    kls = torch.rand(4, 12, generator=generator)
    floats = [values.to(dtype) for values in (policy, ref, weights, kls)]
    return ResponseLogps(floats[0].requires_grad_(), mask, floats[1], floats[2], floats[3].requires_grad_())


class Token(NamedTuple):
    """One response token of an oracle's loop."""

    policy: float
    ref: float
    weight: float
    kl: float


Side = list[Token]


def tokens(side: ResponseLogps, row: int) -> Side:
    fields = (side.policy_logps, side.ref_logps, side.token_weights, side.kls)
    return [Token(*(field[row, t].item() for field in fields)) for t in range(12) if side.completion_mask[row, t]]


def total(side: Side, value: Callable[[Token], float]) -> float:
    result = 0.0
    for token in side:
        result += value(token)
    return result


def ratio(token: Token) -> float:
    return token.policy - token.ref


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def average(side: Side, value: Callable[[Token], float]) -> float:
    return total(side, value) / len(side)


def smoothed(margin: float, epsilon: float) -> float:
    return -(1 - epsilon) * math.log(sigmoid(margin)) - epsilon * math.log(sigmoid(-margin))


def tis_margin(c: Side, r: Side, eta: float) -> float:
    u = total(c, lambda t: t.weight * ratio(t)) - total(r, lambda t: t.weight * ratio(t))
    return u - eta * (total(c, lambda t: t.weight * t.kl) - total(r, lambda t: t.weight * t.kl))


def tdpo_margin(c: Side, r: Side, alpha: float, stopped: Side) -> float:
    return total(c, ratio) - total(r, ratio) - alpha * (total(r, lambda t: t.kl) - total(stopped, lambda t: t.kl))


def decayed(side: Side, gamma: float) -> float:
    return sum(gamma ** (t + 1) * ratio(token) for t, token in enumerate(side))


def selected(side: Side) -> float:
    return total(side, lambda t: t.weight * t.policy) / total(side, lambda t: t.weight)


def unlikely(side: Side) -> float:
    """Mean log-prob of the tokens that are at most as likely as the mean."""
    mean = average(side, lambda t: math.exp(t.policy))
    return average([t for t in side if math.exp(t.policy) <= mean * (1 + 1e-12)], lambda t: t.policy)


def uni_oracle(c: Side, r: Side, row: int) -> float:
    quality = sigmoid(0.7 * (CHOSEN_SCORES[row] - REJECTED_SCORES[row]))
    a_w, a_l = average(c, lambda t: t.policy), average(r, lambda t: t.policy)
    focal = (1 - sigmoid(2.0 * (a_w - a_l) - 0.8)) ** 3.0
    log_likelihood = math.log(sigmoid(2.0 * (average(c, ratio) - average(r, ratio))))
    acts = CHOSEN_SCORES[row] >= 3.2 and average(c, lambda t: t.ref) > a_w
    return -quality * focal * log_likelihood - (0.5 * a_w if acts else 0.0)


def treg_oracle(c: Side, r: Side, beta: float, alpha: float, stopped: tuple[Side, Side]) -> float:
    weight = sigmoid(-beta * (total(stopped[0], ratio) - total(stopped[1], ratio)))
    rewards = total(c, lambda t: (t.weight - 1) * ratio(t)) + total(r, lambda t: (1 - t.weight) * ratio(t))
    return -math.log(sigmoid(beta * (total(c, ratio) - total(r, ratio)))) - alpha * weight * beta * rewards


def risk(log_ratio: float, lam: float) -> float:
    """h'(R) R - h(R) - h'(1/R) of the definition of h."""
    r = math.exp(log_ratio)

    def slope(x: float) -> float:
        return ((1 + lam) * x**lam - 1) / (4 * lam * (1 + lam))

    return slope(r) * r - (r ** (1 + lam) - r) / (4 * lam * (1 + lam)) - slope(1 / r)


def bpo_oracle(c: Side, r: Side, beta: float, lam: float) -> float:
    return risk(beta * (total(r, ratio) - total(c, ratio)), lam)


def tbpo_oracle(c: Side, r: Side, beta: float, lam: float) -> float:
    pairs = list(zip(c, r, strict=False))
    return sum(risk(beta * (ratio(b) - ratio(a) + b.kl - a.kl), lam) for a, b in pairs) / len(pairs)


class Case(NamedTuple):
    """A loss with settings, and the same as a float64 loop over tokens, with math's functions only."""

    ours: Callable[[ResponseLogps, ResponseLogps], PairLosses]
    oracle: Callable[[Side, Side, int, tuple[Side, Side]], float]
    """(chosen, rejected, row, both again for what takes no gradient)."""


def run_uni(chosen: ResponseLogps, rejected: ResponseLogps) -> PairLosses:
    num_pairs, dtype = len(chosen.policy_logps), chosen.policy_logps.dtype
    scores = [torch.tensor(values[:num_pairs], dtype=dtype) for values in (CHOSEN_SCORES, REJECTED_SCORES)]
    settings = {"beta": 2.0, "quality_eta": 0.7, "tau_ref": 0.8, "focal_gamma": 3.0, "nll_lambda": 0.5, "tau_good": 3.2}
    return losses.uni_dpo(chosen, rejected, chosen_scores=scores[0], rejected_scores=scores[1], **settings)


CASES = {
    "dpo": Case(
        lambda c, r: dpo(c, r, beta=0.3),
        lambda c, r, row, sg: -math.log(sigmoid(0.3 * (total(c, ratio) - total(r, ratio)))),
    ),
    "dpo, smoothed": Case(
        lambda c, r: dpo(c, r, beta=0.3, label_smoothing=0.1),
        lambda c, r, row, sg: smoothed(0.3 * (total(c, ratio) - total(r, ratio)), 0.1),
    ),
    "ipo": Case(
        lambda c, r: losses.ipo(c, r, beta=0.3),
        lambda c, r, row, sg: (average(c, ratio) - average(r, ratio) - 1 / 0.6) ** 2,
    ),
    "tdpo1": Case(
        lambda c, r: losses.tdpo1(c, r, beta=0.3),
        lambda c, r, row, sg: -math.log(sigmoid(0.3 * tdpo_margin(c, r, 1.0, c))),
    ),
    "tdpo2": Case(
        lambda c, r: losses.tdpo2(c, r, beta=0.3, alpha=0.4),
        lambda c, r, row, sg: -math.log(sigmoid(0.3 * tdpo_margin(c, r, 0.4, sg[0]))),
    ),
    "tis_dpo": Case(
        lambda c, r: tis_dpo(c, r, beta=0.3),
        lambda c, r, row, sg: -math.log(sigmoid(0.3 * tis_margin(c, r, 0.0))),
    ),
    "tis_dpo, eta": Case(
        lambda c, r: tis_dpo(c, r, beta=0.3, eta_scale=0.7),
        lambda c, r, row, sg: -math.log(sigmoid(0.3 * tis_margin(c, r, 0.7))),
    ),
    "simpo": Case(
        lambda c, r: losses.simpo(c, r, beta=2.0, gamma_beta_ratio=0.4, label_smoothing=0.2),
        lambda c, r, row, sg: smoothed(
            2.0 * (average(c, lambda t: t.policy) - average(r, lambda t: t.policy)) - 0.8, 0.2
        ),
    ),
    "confpo": Case(
        lambda c, r: losses.confpo(c, r, beta=2.0, gamma_beta_ratio=0.4, label_smoothing=0.2),
        lambda c, r, row, sg: smoothed(2.0 * (unlikely(c) - unlikely(r)) - 0.8, 0.2),
    ),
    "sepo": Case(losses.sepo, lambda c, r, row, sg: -math.log(sigmoid(selected(c) - selected(r)))),
    "d2po": Case(
        lambda c, r: losses.d2po(c, r, beta=0.3, gamma=0.8),
        lambda c, r, row, sg: -math.log(sigmoid(0.3 * (decayed(c, 0.8) - decayed(r, 0.8)))),
    ),
    "treg": Case(
        lambda c, r: losses.treg(c, r, beta=0.3, reg_alpha=0.5),
        lambda c, r, row, sg: treg_oracle(c, r, 0.3, 0.5, sg),
    ),
    "bpo": Case(
        lambda c, r: losses.bpo(c, r, beta=0.1, bregman_lambda=-0.5, min_ratio=0.01),
        lambda c, r, row, sg: bpo_oracle(c, r, 0.1, -0.5),
    ),
    "bpo, lambda 0.7": Case(
        lambda c, r: losses.bpo(c, r, beta=0.1, bregman_lambda=0.7, min_ratio=0.01),
        lambda c, r, row, sg: bpo_oracle(c, r, 0.1, 0.7),
    ),
    "tbpo_a": Case(
        lambda c, r: losses.tbpo_a(c, r, beta=0.3, bregman_lambda=0.2),
        lambda c, r, row, sg: tbpo_oracle(c, r, 0.3, 0.2),
    ),
    "dpo, nll": Case(
        lambda c, r: losses.add_nll(dpo(c, r, beta=0.3), c, nll_lambda=0.7),
        lambda c, r, row, sg: (
            smoothed(0.3 * (total(c, ratio) - total(r, ratio)), 0.0) - 0.7 * average(c, lambda t: t.policy)
        ),
    ),
    "uni_dpo": Case(run_uni, lambda c, r, row, sg: uni_oracle(c, r, row)),
    "sft": Case(sft, lambda c, r, row, sg: -total(c, lambda t: t.policy)),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def gradients(result: PairLosses, *sides: ResponseLogps) -> list[Tensor]:
    """Gradients by policy log-probs and KLs of each side, 0 where there are none."""
    inputs = [values for side in sides for values in (side.policy_logps, side.kls)]
    found = torch.autograd.grad(result.losses.sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def slopes(case: Case, c: Side, r: Side, row: int) -> list[float]:
    """Central differences of the oracle by every token's policy log-prob and KL, chosen first."""
    step, result = 1e-5, []
    for name in ("policy", "kl"):
        for side in (c, r):
            for t, token in enumerate(side):
                ends = []
                for shift in (step, -step):
                    moved = [*side[:t], token._replace(**{name: getattr(token, name) + shift}), *side[t + 1 :]]
                    ends.append(case.oracle(moved if side is c else c, moved if side is r else r, row, (c, r)))
                result.append((ends[0] - ends[1]) / (2 * step))
    return result


@every_loss
def test_every_loss_equals_a_float64_loop_over_tokens_in_value_and_gradient(case: Case) -> None:
    chosen, rejected = random_side(1, dtype=torch.float64), random_side(2, dtype=torch.float64)
    result = case.ours(chosen, rejected)
    by_policy, by_kl, rejected_by_policy, rejected_by_kl = gradients(result, chosen, rejected)
    for row in range(4):
        c, r = tokens(chosen, row), tokens(rejected, row)
        assert result.losses[row].item() == pytest.approx(case.oracle(c, r, row, (c, r)), rel=1e-12)
        ours = [
            *by_policy[row][chosen.completion_mask[row]].tolist(),
            *rejected_by_policy[row][rejected.completion_mask[row]].tolist(),
            *by_kl[row][chosen.completion_mask[row]].tolist(),
            *rejected_by_kl[row][rejected.completion_mask[row]].tolist(),
        ]
        assert ours == pytest.approx(slopes(case, c, r, row), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if name != "treg"])  # whose pair weight takes no gradient
def test_gradients_pass_gradcheck(name: str) -> None:
    case = CASES[name]
    chosen, rejected = random_side(1, dtype=torch.float64), random_side(2, dtype=torch.float64)

    def run(policy: Tensor, other: Tensor, kls: Tensor) -> Tensor:
        # the chosen KL of TDPO2 takes no gradient on purpose, which gradcheck cannot know
        return case.ours(chosen._replace(policy_logps=policy), rejected._replace(policy_logps=other, kls=kls)).losses

    assert torch.autograd.gradcheck(run, (chosen.policy_logps, rejected.policy_logps, rejected.kls))


@every_loss
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_what_stands_outside_the_mask_changes_neither_value_nor_gradient(case: Case, rubbish: float) -> None:
    clean = [random_side(1), random_side(2)]
    dirty = []
    for side in clean:
        policy, ref, weights, kls = (side[i].detach().masked_fill(~side.completion_mask, rubbish) for i in (0, 2, 3, 4))
        dirty.append(ResponseLogps(policy.requires_grad_(), side.completion_mask, ref, weights, kls.requires_grad_()))
    results = [case.ours(*sides) for sides in (clean, dirty)]
    assert torch.equal(results[0].losses, results[1].losses)
    found, expected = gradients(results[1], *dirty), gradients(results[0], *clean)
    for i, (gradient, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(gradient, wanted)
        assert torch.all(gradient[~dirty[i // 2].completion_mask] == 0)


@every_loss
def test_padding_order_and_company_change_nothing(case: Case) -> None:
    chosen, rejected = random_side(1, dtype=torch.float64), random_side(2, dtype=torch.float64)
    expected = case.ours(chosen, rejected).losses
    padded = [
        ResponseLogps(*(torch.nn.functional.pad(field.detach(), (3, 40)) for field in side))
        for side in (chosen, rejected)
    ]
    assert torch.allclose(case.ours(*padded).losses, expected, rtol=1e-14, atol=0)
    if case is not CASES["uni_dpo"]:  # whose scores stay where they are here; its rows are told apart by the oracle
        order = torch.tensor([2, 0, 3, 1])
        shuffled = [ResponseLogps(*(field[order] for field in side)) for side in (chosen, rejected)]
        assert torch.equal(case.ours(*shuffled).losses, expected[order])
        alone = [
            case.ours(*(ResponseLogps(*(f[[row]] for f in side)) for side in (chosen, rejected))) for row in range(4)
        ]
        assert torch.allclose(torch.cat([one.losses for one in alone]), expected, rtol=1e-14, atol=0)


@every_loss
@pytest.mark.parametrize("winner", ["chosen", "rejected"])
def test_log_ratios_of_300_nats_per_token_stay_finite(case: Case, winner: str) -> None:
    sides = []
    for seed, likely in ((1, winner == "chosen"), (2, winner == "rejected")):
        side, low, zero = random_side(seed), torch.full((4, 12), -300.0), torch.zeros(4, 12)
        policy, kls = (zero if likely else low).clone().requires_grad_(), torch.full((4, 12), 300.0).requires_grad_()
        sides.append(side._replace(policy_logps=policy, ref_logps=low if likely else zero, kls=kls))
    result = case.ours(*sides)
    assert result.losses.isfinite().all()
    for gradient in gradients(result, *sides):
        assert gradient.isfinite().all()


@every_loss
def test_a_response_of_only_its_end_of_text_token_is_trained_on(case: Case) -> None:
    chosen = response([-1.2], [-1.0], [1.5], kls=[0.2])
    rejected = response([-0.7], [-0.9], [0.5], kls=[0.1])
    result = case.ours(chosen, rejected)
    c, r = tokens_of_one(chosen), tokens_of_one(rejected)
    assert result.losses.item() == pytest.approx(case.oracle(c, r, 0, (c, r)), rel=1e-12)
    result.losses.sum().backward()
    assert chosen.policy_logps.grad.item() < 0
    if case is not CASES["sft"]:
        assert rejected.policy_logps.grad.item() > 0


def tokens_of_one(side: ResponseLogps) -> Side:
    return [Token(*(side[i].item() for i in (0, 2, 3, 4)))]


@every_loss
def test_rewards_are_what_the_loss_compares_and_take_no_gradient(case: Case) -> None:
    chosen, rejected = random_side(1, dtype=torch.float64), random_side(2, dtype=torch.float64)
    result = case.ours(chosen, rejected)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
    margins = result.chosen_rewards - result.rejected_rewards
    if case in [CASES[name] for name in ("dpo", "tdpo1", "tdpo2", "tis_dpo", "tis_dpo, eta", "sepo", "d2po")]:
        assert torch.allclose(result.losses, torch.log1p(torch.exp(-margins)), rtol=1e-12)


def pair_by_hand() -> tuple[ResponseLogps, ResponseLogps]:
    """Log-ratios: chosen 0.5, -0.2 (sum 0.3, mean 0.15); rejected -0.4, 0.3, 0.1 (sum 0). KL: chosen 0.3, rejected 0.8."""
    chosen = response([-1.0, -2.2], [-1.5, -2.0], [2.0, 1.0], kls=[0.1, 0.2])
    rejected = response([-3.4, -0.7, -0.1], [-3.0, -1.0, -0.2], [0.5, 1.0, 2.0], kls=[0.3, 0.1, 0.4])
    return chosen, rejected


BY_HAND = {
    # u = 0.1 * (0.3 - 0) = 0.03; log(1 + exp(-0.03)) = log(1.970446)
    "dpo": (lambda c, r: dpo(c, r, beta=0.1), 0.678260, 0.03, 0.0),
    # 0.9 * 0.678260 + 0.1 * log(1 + exp(0.03)) = 0.610434 + 0.1 * 0.708260
    "dpo, smoothed": (lambda c, r: dpo(c, r, beta=0.1, label_smoothing=0.1), 0.681260, 0.03, 0.0),
    # (0.15 - 0 - 1 / (2 * 0.5))^2 = 0.85^2
    "ipo": (lambda c, r: losses.ipo(c, r, beta=0.5), 0.7225, 0.075, 0.0),
    # 0.1 * (0.3 - (0.8 - 0.3)) = -0.02; log(1 + exp(0.02)) = log(2.020201)
    "tdpo1": (lambda c, r: losses.tdpo1(c, r, beta=0.1), 0.703197, 0.06, 0.08),
    # 0.1 * (0.3 - 0.5 * 0.5) = 0.005; log(1 + exp(-0.005)) = log(1.995012)
    "tdpo2": (lambda c, r: losses.tdpo2(c, r, beta=0.1, alpha=0.5), 0.690650, 0.045, 0.04),
    # chosen 2*0.5 - 0.2 = 0.8; rejected -0.5*0.4 + 0.3 + 2*0.1 = 0.3; u = 0.1 * 0.5 = 0.05
    # log(1 + exp(-0.05)) = log(1.951229)
    "tis_dpo": (lambda c, r: tis_dpo(c, r, beta=0.1), 0.668460, 0.08, 0.03),
    # weighted KL: chosen 2*0.1 + 0.2 = 0.4; rejected 0.5*0.3 + 0.1 + 2*0.4 = 1.05; eta = 0.1 * (0.4 - 1.05) = -0.065
    # u - eta = 0.115; log(1 + exp(-0.115)) = log(1.891366)
    "tis_dpo, eta": (lambda c, r: tis_dpo(c, r, beta=0.1, eta_scale=1.0), 0.637299, 0.04, -0.075),
    # means: -1.6 and -1.4; 2 * (-0.2 - 0.5) = -1.4; log(1 + exp(1.4)) = log(5.055200)
    "simpo": (lambda c, r: losses.simpo(c, r, beta=2.0, gamma_beta_ratio=0.5), 1.620418, -3.2, -2.8),
    # p: chosen 0.3679, 0.1108, mean 0.2393: the second; rejected 0.0334, 0.4966, 0.9048, mean 0.4783: the first
    # 2 * (-2.2 + 3.4 - 0.5) = 1.4; log(1 + exp(-1.4)) = log(1.246597)
    "confpo": (lambda c, r: losses.confpo(c, r, beta=2.0, gamma_beta_ratio=0.5), 0.220417, -4.4, -6.8),
    # chosen (-2*1 - 2.2) / 3 = -1.4; rejected (-0.5*3.4 - 0.7 - 2*0.1) / 3.5 = -0.742857
    # log(1 + exp(0.657143)) = log(2.929273)
    "sepo": (losses.sepo, 1.074755, -1.4, -0.742857),
    # chosen 0.5*0.5 - 0.25*0.2 = 0.2; rejected -0.5*0.4 + 0.25*0.3 + 0.125*0.1 = -0.1125; u = 0.1 * 0.3125 = 0.03125
    # log(1 + exp(-0.03125)) = log(1.969233)
    "d2po": (lambda c, r: losses.d2po(c, r, beta=0.1, gamma=0.5), 0.677644, 0.02, -0.01125),
    # w - 1: chosen 1, 0, rejected -0.5, 0, 1; sums with log-ratios 0.5 and 0.2 + 0.1; sigmoid(-0.03) = 0.492501
    # 0.678260 - 0.5 * 0.492501 * 0.1 * (0.5 - 0.3)
    "treg": (lambda c, r: losses.treg(c, r, beta=0.1, reg_alpha=0.5), 0.673335, 0.03, 0.0),
    # log R = -0.03; exp(-0.015) - 1
    "bpo": (lambda c, r: losses.bpo(c, r, beta=0.1, bregman_lambda=-0.5, min_ratio=0.01), -0.014888, 0.03, 0.0),
    # (exp(-0.06) - 1) / 8 - (exp(0.03) - 1) / 4 = -0.0072794 - 0.0076136
    "bpo, lsif": (lambda c, r: losses.bpo(c, r, beta=0.1, bregman_lambda=1.0, min_ratio=0.01), -0.014893, 0.03, 0.0),
    # (exp(-0.03) - 1) / 4 - 0.03 / 4 = -0.0073886 - 0.0075
    "bpo, kliep": (lambda c, r: losses.bpo(c, r, beta=0.1, bregman_lambda=0.0, min_ratio=0.01), -0.014889, 0.03, 0.0),
    # with KL: chosen 0.6, 0; rejected -0.1, 0.4, and a third that nothing is compared with; log R = -0.07, 0.04
    # (exp(-0.035) - 1 + exp(0.02) - 1) / 2 = (-0.0343946 + 0.0202013) / 2
    "tbpo_a": (lambda c, r: losses.tbpo_a(c, r, beta=0.1, bregman_lambda=-0.5), -0.007097, 0.03, 0.015),
    # 0.678260 + 0.5 * (1.0 + 2.2) / 2
    "dpo, nll": (lambda c, r: losses.add_nll(dpo(c, r, beta=0.1), c, nll_lambda=0.5), 1.478260, 0.03, 0.0),
    # w_qual = sigmoid(0.7 * 0.5) = 0.586618; w_perf = (1 - sigmoid(2 * (-1.6 + 1.4) - 0.8))^2 = 0.768525^2 = 0.590630
    # log(1 + exp(-2 * 0.15)) = 0.554355; no c-NLL: the mean of log pi, -1.6, is above that of log ref, -1.75
    "uni_dpo": (lambda c, r: uni_by_hand(c, r, 3.5), 0.192069, 0.3, 0.0),
}


def uni_by_hand(chosen: ResponseLogps, rejected: ResponseLogps, score: float) -> PairLosses:
    settings = {"beta": 2.0, "quality_eta": 0.7, "tau_ref": 0.8, "focal_gamma": 2.0, "nll_lambda": 0.1, "tau_good": 3.2}
    scores = {"chosen_scores": torch.tensor([score]), "rejected_scores": torch.tensor([score - 0.5])}
    return losses.uni_dpo(chosen, rejected, **scores, **settings)


@pytest.mark.parametrize(("loss", "value", "chosen_reward", "rejected_reward"), BY_HAND.values(), ids=BY_HAND.keys())
def test_losses_equal_the_sums_by_hand(loss, value: float, chosen_reward: float, rejected_reward: float) -> None:
    result = loss(*pair_by_hand())
    assert result.losses.item() == pytest.approx(value, abs=1e-6)
    rewards = (result.chosen_rewards.item(), result.rejected_rewards.item())
    assert rewards == pytest.approx((chosen_reward, rejected_reward), abs=1e-6)


def test_sft_is_the_negative_log_likelihood_of_chosen() -> None:
    result = sft(response([-1.0, -2.2], [-1.5, -2.0]), beta=0.5)
    assert result.losses.item() == pytest.approx(3.2)  # 1.0 + 2.2
    assert result.chosen_rewards.item() == pytest.approx(0.15)  # 0.5 * (0.5 - 0.2)
    assert result.rejected_rewards is None
    assert sft(ResponseLogps(torch.tensor([[-1.0]]), torch.tensor([[True]]))).chosen_rewards is None


@pytest.mark.parametrize(
    ("score", "mean_ref", "expected"),
    [
        (3.2, -1.5, 0.16),  # good, and the reference likes it better: 0.1 * 1.6
        (3.1, -1.5, 0.0),  # not good enough
        (3.2, -1.7, 0.0),  # the policy likes it better already
    ],
)
def test_uni_dpo_raises_the_likelihood_of_good_responses_that_fell_behind(score, mean_ref, expected) -> None:
    chosen, rejected = response([-1.0, -2.2], [mean_ref] * 2), response([-2.0], [-2.0])
    plain = uni_by_hand(chosen, rejected, -100.0).losses.item()  # the same difference of scores, none of them good
    assert uni_by_hand(chosen, rejected, score).losses.item() - plain == pytest.approx(expected, abs=1e-6)


def assert_same(ours: PairLosses, expected: PairLosses, *sides: ResponseLogps) -> None:
    """Losses and gradients, bit for bit."""
    assert torch.equal(ours.losses, expected.losses)
    for gradient, wanted in zip(gradients(ours, *sides), gradients(expected, *sides), strict=True):
        assert torch.equal(gradient, wanted)


def with_twos(*sides: ResponseLogps) -> list[ResponseLogps]:
    return [side._replace(token_weights=torch.full_like(side.policy_logps, 2.0)) for side in sides]


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r: tis_dpo(c, r, beta=0.1),  # with weights of 1
        lambda c, r: losses.tdpo2(c, r, beta=0.1, alpha=0.0),
        lambda c, r: losses.d2po(c, r, beta=0.1, gamma=1.0),
        lambda c, r: losses.treg(c, r, beta=0.1, reg_alpha=0.5),  # with weights of 1
        lambda c, r: losses.treg(*with_twos(c, r), beta=0.1, reg_alpha=0.0),
        lambda c, r: losses.add_nll(dpo(c, r, beta=0.1), c, nll_lambda=0.0),
    ],
    ids=[
        "tis_dpo with ones",
        "tdpo2 with alpha 0",
        "d2po with gamma 1",
        "treg with ones",
        "treg with alpha 0",
        "no nll",
    ],
)
def test_what_reduces_to_plain_dpo_does_so_bit_for_bit(loss) -> None:
    ones = torch.ones(4, 12)
    chosen, rejected = random_side(1, ones), random_side(2, ones)
    assert_same(loss(chosen, rejected), dpo(chosen, rejected, beta=0.1), chosen, rejected)


def test_sepo_of_everything_is_simpo_with_beta_1_and_no_margin() -> None:
    ones = torch.ones(4, 12)
    chosen, rejected = random_side(1, ones), random_side(2, ones)
    simpo = losses.simpo(chosen, rejected, beta=1.0, gamma_beta_ratio=0.0)
    assert_same(losses.sepo(chosen, rejected), simpo, chosen, rejected)


def test_sepo_looks_at_selected_tokens_only() -> None:
    chosen, rejected = response([-1.0, -2.0, -6.0], [0.0] * 3, [0, 1, 1]), response([-3.0, -1.0], [0.0] * 2, [1, 0])
    result = losses.sepo(chosen, rejected)
    assert result.losses.item() == pytest.approx(math.log1p(math.exp(1.0)))  # (-2 - 6) / 2 + 3 = -1
    result.losses.backward()
    assert chosen.policy_logps.grad[0, 0] == rejected.policy_logps.grad[0, 1] == 0
    assert chosen.policy_logps.grad[0, 1] == pytest.approx(-0.5 * sigmoid(1.0))


def test_confpo_of_equally_likely_tokens_is_simpo() -> None:
    sides = []
    for seed, logp in ((1, -0.1), (2, -0.7)):  # means of 3 or 9 of these are not always exact in float32
        side = random_side(seed)
        sides.append(side._replace(policy_logps=torch.full((4, 12), logp, requires_grad=True)))
    settings = {"beta": 2.0, "gamma_beta_ratio": 0.5}
    found, expected = (gradients(loss(*sides, **settings), *sides) for loss in (losses.confpo, losses.simpo))
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-6)


def test_confpo_selects_as_estimator_confidence_does_while_policy_and_reference_are_equal() -> None:
    side = random_side(3)
    selected = unlikely_tokens(side)
    for row, (begin, end) in enumerate(SPANS):
        probs = side.policy_logps[row, begin:end].exp()
        assert selected[row, begin:end].tolist() == (probs <= probs.mean() * (1 + 1e-6)).float().tolist()
    assert selected[~side.completion_mask].sum() == 0
    assert (selected.sum(-1) >= 1).all()


def test_tdpo2_with_alpha_1_has_the_value_of_tdpo1_and_not_its_gradient() -> None:
    chosen, rejected = random_side(1), random_side(2)
    first, second = losses.tdpo1(chosen, rejected, beta=0.1), losses.tdpo2(chosen, rejected, beta=0.1, alpha=1.0)
    assert torch.equal(first.losses, second.losses)
    by_kl = [gradients(result, chosen, rejected)[1::2] for result in (first, second)]
    assert torch.all(by_kl[1][0] == 0)
    assert torch.all(by_kl[0][0][chosen.completion_mask] < 0)
    assert torch.equal(by_kl[0][1], by_kl[1][1])


def test_eta_has_the_opposite_sign_of_the_kl_of_tdpo() -> None:
    chosen, rejected = random_side(1), random_side(2)
    ones = torch.ones(4, 12)
    weighted = [side._replace(token_weights=ones) for side in (chosen, rejected)]
    eta = gradients(tis_dpo(*weighted, beta=0.1, eta_scale=1.0), chosen, rejected)
    kl = gradients(losses.tdpo1(chosen, rejected, beta=0.1), chosen, rejected)
    for side, (of_eta, of_kl) in zip((chosen, rejected), zip(eta[1::2], kl[1::2], strict=True), strict=True):
        assert torch.all((of_eta * of_kl)[side.completion_mask] < 0)


def test_uni_dpo_with_eta_0_gives_every_pair_half_its_weight() -> None:
    chosen, rejected = random_side(1), random_side(2)
    settings = {"beta": 2.0, "quality_eta": 0.0, "tau_ref": 0.8, "focal_gamma": 0.0, "nll_lambda": 0.0, "tau_good": 0.0}
    scores = {"chosen_scores": torch.tensor(CHOSEN_SCORES), "rejected_scores": torch.tensor(REJECTED_SCORES)}
    result = losses.uni_dpo(chosen, rejected, **scores, **settings)
    margins = result.chosen_rewards - result.rejected_rewards
    assert torch.allclose(result.losses, 0.5 * torch.log1p(torch.exp(-margins)))  # w_qual 1/2, w_perf 1


def test_decay_starts_with_gamma_at_the_first_response_token() -> None:
    side = ResponseLogps(torch.zeros(2, 5), torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 1]]).bool())
    expected = [[0, 0.5, 0.25, 0.125, 0], [0, 0, 0, 0, 0.5]]
    assert decay_weights(side, 0.5).tolist() == expected


def test_gradient_is_minus_beta_weight_sigmoid() -> None:
    """methods.md 1.2: dL/d log pi(y_t) = -beta w_t sigmoid(-u) on chosen tokens, with + on rejected ones."""
    chosen, rejected = pair_by_hand()
    tis_dpo(chosen, rejected, beta=0.1).losses.sum().backward()
    scale = 0.1 / (1 + math.exp(0.05))  # u = 0.05, see above
    assert chosen.policy_logps.grad.tolist() == [pytest.approx([-2 * scale, -scale])]
    assert rejected.policy_logps.grad.tolist() == [pytest.approx([0.5 * scale, scale, 2 * scale])]


SIGMOID_FAMILY = ["dpo", "dpo, smoothed", "tdpo1", "tdpo2", "tis_dpo", "tis_dpo, eta", "d2po", "treg"]


@pytest.mark.parametrize("name", SIGMOID_FAMILY)
def test_policy_equal_to_reference_gives_log_2(name: str) -> None:
    chosen, rejected = (
        side._replace(policy_logps=side.ref_logps, kls=torch.zeros(4, 12)) for side in (random_side(1), random_side(2))
    )
    result = CASES[name].ours(chosen, rejected)
    assert result.losses.tolist() == pytest.approx([math.log(2)] * 4)
    assert result.chosen_rewards.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", [name for name in SIGMOID_FAMILY if name not in ("dpo, smoothed", "treg")] + ["sepo"])
def test_swapping_sides_negates_the_margin(name: str) -> None:
    chosen, rejected = random_side(1), random_side(2)
    there, back = CASES[name].ours(chosen, rejected), CASES[name].ours(rejected, chosen)
    margins = there.chosen_rewards - there.rejected_rewards
    assert torch.equal(margins, -(back.chosen_rewards - back.rejected_rewards))
    # softplus(-u) - softplus(u) = -u
    assert torch.allclose(there.losses - back.losses, -margins, atol=1e-6)


def test_the_last_token_gets_gradient_like_any_other() -> None:
    """The official release gives EOS weight 0; here a weight of 1 is a weight of 1 on the last token as well."""
    chosen, rejected = response([-1.0, -1.0, -1.0], [-1.0] * 3, [1.0] * 3), response([-2.0], [-2.0], [1.0])
    tis_dpo(chosen, rejected, beta=0.1).losses.sum().backward()
    assert chosen.policy_logps.grad.tolist() == [pytest.approx([-0.05] * 3)]  # -0.1 * sigmoid(0)


@every_loss
def test_weights_and_reference_take_no_gradient(case: Case) -> None:
    chosen, rejected = random_side(1), random_side(2)
    chosen.token_weights.requires_grad_()
    chosen.ref_logps.requires_grad_()
    case.ours(chosen, rejected).losses.sum().backward()
    assert chosen.token_weights.grad is None
    assert chosen.ref_logps.grad is None


def test_the_regulariser_of_treg_scales_the_gradient_of_dpo_token_by_token() -> None:
    chosen, rejected = random_side(1, dtype=torch.float64), random_side(2, dtype=torch.float64)
    found = gradients(losses.treg(chosen, rejected, beta=0.1, reg_alpha=0.5), chosen, rejected)[::2]
    plain = gradients(dpo(chosen, rejected, beta=0.1), chosen, rejected)[::2]
    for side, gradient, of_dpo in zip((chosen, rejected), found, plain, strict=True):
        assert torch.allclose(gradient, of_dpo * (1 + 0.5 * (side.token_weights - 1)), rtol=1e-12, atol=0)


def at_the_start() -> tuple[ResponseLogps, ResponseLogps]:
    """Two sides on which policy and reference are equal."""
    sides = (random_side(1), random_side(2))
    chosen, rejected = (
        side._replace(policy_logps=side.ref_logps.clone().requires_grad_(), kls=torch.zeros(4, 12, requires_grad=True))
        for side in sides
    )
    return chosen, rejected


@pytest.mark.parametrize("lam", [-0.9, -0.5, 0.0, 0.3, 1.0])
def test_bregman_losses_start_at_0_with_the_gradient_of_dpo(lam: float) -> None:
    chosen, rejected = at_the_start()
    result = losses.bpo(chosen, rejected, beta=0.1, bregman_lambda=lam, min_ratio=0.01)
    assert result.losses.tolist() == [0.0] * 4
    expected = gradients(dpo(chosen, rejected, beta=0.1), chosen, rejected)
    for gradient, of_dpo in zip(gradients(result, chosen, rejected), expected, strict=True):
        assert torch.allclose(gradient, of_dpo, rtol=1e-5)
    per_token = losses.tbpo_a(chosen, rejected, beta=0.1, bregman_lambda=lam)
    assert per_token.losses.tolist() == [0.0] * 4
    by_policy = gradients(per_token, chosen, rejected)[0]
    for row, (begin, end) in enumerate(SPANS):  # a mean over the tokens, for each -0.1 / 2
        assert by_policy[row, begin:end].tolist() == pytest.approx([-0.05 / (end - begin)] * (end - begin), rel=1e-5)


def test_a_bregman_divergence_with_lambda_minus_a_half_is_the_exponential_loss() -> None:
    chosen, rejected = random_side(1, dtype=torch.float64), random_side(2, dtype=torch.float64)
    result = losses.bpo(chosen, rejected, beta=0.1, bregman_lambda=-0.5, min_ratio=1e-9)
    margins = result.chosen_rewards - result.rejected_rewards
    assert torch.allclose(result.losses, torch.expm1(-margins / 2), rtol=1e-12)


def test_bpo_leaves_pairs_alone_that_are_told_apart_clearly() -> None:
    for log_ratio, moves in ((-4.5, True), (-4.7, False)):  # log 0.01 = -4.6
        chosen, rejected = response([-1.0], [-1.0 + log_ratio]), response([-2.0], [-2.0])
        losses.bpo(chosen, rejected, beta=1.0, bregman_lambda=0.5, min_ratio=0.01).losses.sum().backward()
        assert (chosen.policy_logps.grad.item() < 0) == moves


def test_tbpo_a_compares_tokens_by_their_place_in_the_response_and_drops_the_rest() -> None:
    chosen = response([-1.0, -2.0], [-1.5, -2.0], kls=[0.1, 0.2])
    rejected = response([-1.0, -2.0, -3.0], [-1.0, -2.5, -1.0], kls=[0.3, 0.1, 5.0])
    result = losses.tbpo_a(chosen, rejected, beta=0.1, bregman_lambda=0.2)
    cut = ResponseLogps(*(None if field is None else field[:, :2] for field in rejected))
    assert torch.equal(result.losses, losses.tbpo_a(chosen, cut, beta=0.1, bregman_lambda=0.2).losses)
    result.losses.sum().backward()
    assert rejected.policy_logps.grad[0, 2] == 0
    assert (rejected.policy_logps.grad[0, :2] > 0).all()
    # single tokens without a KL: the sequence is the token
    one, other = response([-1.0], [-1.5], kls=[0.0]), response([-1.0], [-0.7], kls=[0.0])
    expected = losses.bpo(one, other, beta=0.1, bregman_lambda=0.2, min_ratio=1e-9)
    assert torch.equal(losses.tbpo_a(one, other, beta=0.1, bregman_lambda=0.2).losses, expected.losses)


def test_huge_margins_stay_finite() -> None:
    chosen, rejected = response([0.0], [-1e4]), response([-1e4], [0.0])
    assert dpo(chosen, rejected, beta=1.0).losses.item() == 0.0
    assert dpo(rejected, chosen, beta=1.0).losses.item() == pytest.approx(2e4)


def test_missing_parts_are_refused() -> None:
    bare = ResponseLogps(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    plain = response([0.0], [0.0], [1.0])
    with pytest.raises(ValueError, match="needs ref_logps"):
        sum_logratios(bare)
    with pytest.raises(ValueError, match="needs token_weights"):
        tis_dpo(response([0.0], [0.0]), plain, beta=0.1)
    with pytest.raises(ValueError, match="needs token_weights"):
        losses.sepo(bare, plain)
    with pytest.raises(ValueError, match="needs kls"):
        tis_dpo(plain, plain, beta=0.1, eta_scale=1.0)
    with pytest.raises(ValueError, match="needs kls"):
        losses.tdpo1(plain, plain, beta=0.1)
    with pytest.raises(ValueError, match="needs kls"):
        losses.tbpo_a(plain, plain, beta=0.1, bregman_lambda=0.2)
    with pytest.raises(ValueError, match="needs token_weights"):
        losses.treg(response([0.0], [0.0]), plain, beta=0.1, reg_alpha=0.5)
    assert tis_dpo(plain, plain, beta=0.1).losses.item() == pytest.approx(math.log(2))  # eta off needs none


def test_settings_out_of_range_are_refused() -> None:
    plain = response([0.0], [0.0])
    for loss in (dpo, losses.ipo):
        with pytest.raises(ValueError, match="beta must be > 0, got 0"):
            loss(plain, plain, beta=0)
    for label_smoothing in (-0.1, 0.5):
        with pytest.raises(ValueError, match=f"at least 0 and below 0.5, got {label_smoothing}"):
            dpo(plain, plain, beta=0.1, label_smoothing=label_smoothing)
    for bregman_lambda in (-1.0, 1.5):
        with pytest.raises(ValueError, match=f"above -1 and at most 1, got {bregman_lambda}"):
            losses.bpo(plain, plain, beta=0.1, bregman_lambda=bregman_lambda, min_ratio=0.01)


@pytest.mark.parametrize("token_weights", [[0.0, 0.0], [1.0, -0.5], [math.nan, 1.0]])
def test_sepo_refuses_a_response_without_a_selection(token_weights: list[float]) -> None:
    good, bad = response([-1.0, -1.0], [0.0, 0.0], [1.0, 0.0]), response([-1.0, -1.0], [0.0, 0.0], token_weights)
    sides = ResponseLogps(*(None if a is None else torch.cat([a, b]) for a, b in zip(good, bad, strict=True)))
    both_good = ResponseLogps(*(None if a is None else torch.cat([a, a]) for a in good))
    with pytest.raises(InputError, match=r"sepo, rejected response 1 of the batch: expected token weights >= 0"):
        losses.sepo(both_good, sides)
    with pytest.raises(InputError, match=r"sepo, chosen response 1 of the batch.*weights.estimator='sepo'"):
        losses.sepo(sides, both_good)
