import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from train.loss.divergence import MIN_TAIL, exact_kl, top_k_kl

BOTH = pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log() + 3.0  # a shift changes nothing


def peaked_logits(num_rows: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Policy and reference like those of a language model, float64 `[N, V]`.

    Zipf's law over the vocabulary with an exponent of 1.2 to 4, row by row (median probability of the likeliest id 0.76),
    and a policy that has moved by 0.3 nats per id.
    """
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.linspace(1.2, 4.0, num_rows, dtype=torch.float64)[:, None]
    ref = -exponents * torch.arange(1, vocab_size + 1, dtype=torch.float64).log()
    policy = ref + 0.3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    order = torch.randperm(vocab_size, generator=generator)
    return policy[:, order], ref[:, order]


def top_k(policy_logits: Tensor, ref_logits: Tensor, k: int, stored: Callable[[Tensor], Tensor] = lambda x: x):
    """What the store and the output layer give for the reference's k likeliest ids."""
    top = ref_logits.log_softmax(-1).topk(k)
    return policy_logits.log_softmax(-1).gather(-1, top.indices), stored(top.values)


def round_to_12_bits(values: Tensor) -> Tensor:
    """As the store rounds mantissas."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 4096).round() / 4096, exponent)


def loop_kl(p_logits: list[float], q_logits: list[float]) -> float:
    """KL(p‖q) with Python's floats."""
    p, q = ([x - math.log(math.fsum(map(math.exp, row))) for x in row] for row in (p_logits, q_logits))
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def test_exact_kl_equals_the_sums_by_hand_in_both_directions() -> None:
    policy, ref = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75) = 0.346574 - 0.202733
    assert exact_kl(policy, ref, "policy_ref").item() == pytest.approx(0.143841, abs=1e-6)
    # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5) = -0.173287 + 0.304099
    assert exact_kl(policy, ref, "ref_policy").item() == pytest.approx(0.130812, abs=1e-6)


def test_top_k_kl_equals_the_sum_by_hand() -> None:
    # the reference's top 1 is the third id; buckets: policy 0.2 and 0.8, reference 0.6 and 0.4
    policy, ref = logits_of(0.5, 0.3, 0.2), logits_of(0.1, 0.3, 0.6)
    # 0.2 log(0.2 / 0.6) + 0.8 log(0.8 / 0.4) = -0.219722 + 0.554518
    assert top_k_kl(*top_k(policy, ref, 1), "policy_ref").item() == pytest.approx(0.334795, abs=1e-6)
    # 0.6 log(0.6 / 0.2) + 0.4 log(0.4 / 0.8) = 0.659167 - 0.277259
    assert top_k_kl(*top_k(policy, ref, 1), "ref_policy").item() == pytest.approx(0.381908, abs=1e-6)


@BOTH
def test_exact_kl_equals_a_loop_over_the_vocabulary(direction: str) -> None:
    policy, ref = peaked_logits(6, 300)
    first, second = (policy, ref) if direction == "policy_ref" else (ref, policy)
    expected = [loop_kl(p, q) for p, q in zip(first.tolist(), second.tolist(), strict=True)]
    assert exact_kl(policy, ref, direction).tolist() == pytest.approx(expected, rel=1e-11)
    assert exact_kl(policy.float(), ref.float(), direction).tolist() == pytest.approx(expected, abs=1e-6)
    coarse = exact_kl(policy.bfloat16(), ref.bfloat16(), direction)
    assert coarse.dtype == torch.float32
    # its inputs are rounded, its arithmetic is not
    assert torch.equal(coarse, exact_kl(policy.bfloat16().float(), ref.bfloat16().float(), direction))


@BOTH
def test_equal_models_have_no_divergence(direction: str) -> None:
    policy, _ = peaked_logits(4, 200)
    assert exact_kl(policy, policy - 5.0, direction).abs().max() < 1e-14
    assert top_k_kl(*top_k(policy, policy, 8), direction).abs().max() < 1e-14


@BOTH
def test_the_reference_takes_no_gradient(direction: str) -> None:
    policy, ref = (logits.requires_grad_() for logits in peaked_logits(2, 20))
    (exact_kl(policy, ref, direction).sum() + top_k_kl(*top_k(policy, ref, 4), direction).sum()).backward()
    assert ref.grad is None
    assert policy.grad.abs().sum() > 0


@BOTH
def test_gradients_pass_gradcheck(direction: str) -> None:
    policy, ref = peaked_logits(3, 12)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: exact_kl(p, ref, direction), policy)
    for k in (1, 5, 12):  # 12: nothing is left for the bucket
        assert torch.autograd.gradcheck(lambda p, k=k: top_k_kl(*top_k(p, ref, k), direction), policy)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_gaps_of_300_give_finite_values_and_gradients(direction: str, dtype: torch.dtype) -> None:
    """log(softmax(x)) would be -inf here, and 0 * -inf NaN: pitfall 21 of the official release."""
    policy = torch.tensor([[300.0, 0.0, -300.0, 0.0], [0.0, 300.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    ref = torch.tensor([[-300.0, 0.0, 300.0, 0.0], [0.0, 300.0, 0.0, 0.0]], dtype=dtype)
    exact, bucketed = exact_kl(policy, ref, direction), top_k_kl(*top_k(policy.float(), ref.float(), 2), direction)
    assert exact.tolist() == [600.0, 0.0]  # all mass on ids that are 600 nats apart
    assert bucketed.isfinite().all()
    assert bucketed[0] > 10
    assert bucketed[1].item() == pytest.approx(0.0, abs=1e-6)
    for result in (exact, bucketed):
        assert torch.autograd.grad(result.sum(), policy, retain_graph=True)[0].isfinite().all()


@BOTH
def test_ids_that_neither_model_can_give_count_nothing(direction: str) -> None:
    policy, ref = peaked_logits(3, 10)
    padded = [torch.nn.functional.pad(logits, (0, 6), value=-math.inf).requires_grad_() for logits in (policy, ref)]
    result = exact_kl(*padded, direction)
    assert torch.allclose(result, exact_kl(policy, ref, direction), rtol=1e-14)
    gradient = torch.autograd.grad(result.sum(), padded[0])[0]
    assert gradient.isfinite().all()
    assert torch.all(gradient[:, 10:] == 0)


@BOTH
def test_bucketed_kl_is_never_above_the_exact_one_and_grows_with_k(direction: str) -> None:
    policy, ref = peaked_logits(64, 500)
    policy = policy + 2.0 * torch.randn(500, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    values = [top_k_kl(*top_k(policy, ref, k), direction) for k in (1, 2, 4, 16, 64, 256)]
    values.append(exact_kl(policy, ref, direction))
    for fewer, more in pairwise(values):
        assert torch.all(fewer >= 0)
        assert torch.all(fewer <= more + MIN_TAIL)


@BOTH
@pytest.mark.parametrize("num_left_out", [0, 1])
def test_with_at_most_one_id_in_the_bucket_it_is_the_exact_kl(direction: str, num_left_out: int) -> None:
    policy, ref = (logits / 2 for logits in peaked_logits(16, 40))  # flatter: the last id keeps more than MIN_TAIL
    expected = exact_kl(policy, ref, direction)
    assert torch.allclose(top_k_kl(*top_k(policy, ref, 40 - num_left_out), direction), expected, rtol=1e-5, atol=1e-7)


@BOTH
def test_error_of_the_top_k_kl_shrinks_with_k_and_is_small_on_peaked_distributions(direction: str) -> None:
    policy, ref = peaked_logits(256, 8192)
    exact = exact_kl(policy, ref, direction).mean()
    shares = [
        ((exact - top_k_kl(*top_k(policy, ref, k, stored=round_to_12_bits), direction).mean()) / exact).item()
        for k in (1, 4, 16, 64, 256)
    ]
    assert all(fewer > more for fewer, more in pairwise(shares))
    assert 0.05 < shares[2] < 0.15  # k = 16
    assert 0.02 < shares[3] < 0.08  # k = 64


@BOTH
@pytest.mark.parametrize("excess", [0.0, 1e-8, 1e-3])
def test_stored_log_probs_that_add_up_to_one_or_more_are_taken_as_leaving_next_to_nothing(direction, excess) -> None:
    ref = torch.tensor([[0.7, 0.3]]).log() + math.log1p(excess)
    policy = torch.tensor([[0.6, 0.3]]).log().requires_grad_()  # and 0.1 elsewhere
    result = top_k_kl(policy, ref, direction)
    p, q = [0.6, 0.3, 0.1], [0.7 * (1 - MIN_TAIL), 0.3 * (1 - MIN_TAIL), MIN_TAIL]
    if direction == "ref_policy":
        p, q = q, p
    assert result.item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=0.02)
    result.sum().backward()
    assert policy.grad.isfinite().all()


def test_rounding_of_stored_log_probs_hardly_moves_the_kl() -> None:
    policy, ref = peaked_logits(128, 2000)
    for direction in ("policy_ref", "ref_policy"):
        plain = top_k_kl(*top_k(policy, ref, 16), direction)
        rounded = top_k_kl(*top_k(policy, ref, 16, stored=round_to_12_bits), direction)
        assert torch.all(rounded >= 0)
        assert (rounded - plain).abs().max() < 2e-4
