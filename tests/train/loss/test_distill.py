"""Distillation from a teacher's stored top k: by hand, and against the dense formula; `test_losses_trl.py` has TRL's code."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from train.loss.divergence import exact_kl, top_k_kl
from train.loss.losses import distill
from train.loss.terms import ResponseLogps
from train.model.logps import Divergence, ModelInputs, per_token_logps

LENGTHS = (9, 6)


def side(kls: Tensor, policy_logps: Tensor | None = None, **fields: Any) -> ResponseLogps:
    mask = torch.ones_like(kls, dtype=torch.bool)
    logps = torch.zeros_like(kls) if policy_logps is None else policy_logps
    return ResponseLogps(logps, mask, kls=kls, **{"token_weights": torch.ones_like(kls), **fields})


def test_two_positions_by_hand() -> None:
    # the teacher's two likeliest ids at each position, and all others; the student has the same at the first position
    teacher = torch.tensor([[0.5, 0.25], [0.6, 0.3]], dtype=torch.float64)  # others: 0.25 and 0.1
    student = torch.tensor([[0.5, 0.25], [0.3, 0.3]], dtype=torch.float64)  # others: 0.25 and 0.4
    kls = top_k_kl(student.log(), teacher.log(), "ref_policy")
    # 0; 0.6 log(0.6 / 0.3) + 0.3 log 1 + 0.1 log(0.1 / 0.4) = 0.415888 - 0.138629
    assert kls.tolist() == pytest.approx([0.0, 0.277259], abs=1e-6)
    policy_logps = torch.tensor([[-0.5, -2.0]], dtype=torch.float64)
    one = side(kls[None], policy_logps, token_weights=torch.tensor([[2.0, 0.5]], dtype=torch.float64))
    assert distill(one).losses.item() == pytest.approx(0.138629, abs=1e-6)  # 2 · 0 + 0.5 · 0.277259
    # 0.138629 + 0.1 (2 · 0.5 + 0.5 · 2.0)
    assert distill(one, nll_lambda=0.1).losses.item() == pytest.approx(0.338629, abs=1e-6)
    cut = one._replace(completion_mask=torch.tensor([[True, False]]))
    assert distill(cut, nll_lambda=0.1).losses.item() == pytest.approx(0.1, abs=1e-6)


def test_without_token_weights_or_a_divergence_it_is_refused() -> None:
    kls = torch.ones(1, 2)
    for field in ("kls", "token_weights"):
        with pytest.raises(ValueError, match=f"this loss needs {field}; none were given"):
            distill(side(kls)._replace(**{field: None}))


@pytest.fixture(scope="module")
def student(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def teacher(student: torch.nn.Module) -> torch.nn.Module:
    """Another function with the same vocabulary."""
    other, generator = copy.deepcopy(student), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return other


def padded_ids() -> Tensor:
    return (torch.arange(2 * max(LENGTHS)).view(2, -1) * 37 + 5) % 128


def response_logps_of(model: torch.nn.Module) -> Tensor:
    """Oracle: log-softmax over the vocabulary at the tokens from the fourth on, one sequence at a time, `[n, V]`."""
    rows = [model(input_ids=row[None, :length]).logits[0] for row, length in zip(padded_ids(), LENGTHS, strict=True)]
    return torch.cat([row[2:-1].log_softmax(-1) for row in rows])


def top_of(logps: Tensor, k: int) -> dict[str, Tensor]:
    """What a batch has of the teacher."""
    scored = scored_tokens()
    found = dict(zip(("ref_top_logps", "ref_top_ids"), logps.topk(k), strict=True))
    aligned = {name: values.new_zeros(2 * max(LENGTHS), k) for name, values in found.items()}
    for name, values in found.items():
        aligned[name][scored] = values
    return {name: values.view(2, max(LENGTHS), k) for name, values in aligned.items()}


def scored_tokens() -> Tensor:
    steps = torch.arange(max(LENGTHS))
    return ((steps >= 3) & (steps < torch.tensor(LENGTHS)[:, None])).flatten().nonzero().flatten()


def losses_of(student: torch.nn.Module, top: dict[str, Tensor], token_weights: Tensor, nll_lambda: float) -> Tensor:
    """Run the student as a training does, a few rows of its output layer at a time."""
    ids, mask = padded_ids(), torch.zeros(2 * max(LENGTHS), dtype=torch.bool)
    mask[scored_tokens()] = True
    inputs = ModelInputs(input_ids=ids, places=torch.arange(ids.numel()).view(ids.shape), scored=scored_tokens(), **top)
    terms = per_token_logps(student, divergence=Divergence("ref_policy", top_k=True), chunk_logits=12 * 128, **inputs)
    sides = ResponseLogps(terms.logps, mask.view(ids.shape), token_weights=token_weights, kls=terms.kls)
    return distill(sides, nll_lambda=nll_lambda).losses


def gradient_of(model: torch.nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


def test_value_and_gradient_are_those_of_the_dense_formula(student, teacher) -> None:
    """The bucket is all columns of the vocabulary but k, added up."""
    weights = 0.5 + torch.rand(2, max(LENGTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = response_logps_of(teacher).detach().exp()
    ids = p.topk(5).indices
    is_top = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, True)
    q = response_logps_of(student).exp()
    p_rest, q_rest = (torch.where(is_top, 0.0, values).sum(-1) for values in (p, q))
    kls = torch.where(is_top, p * (p / q).log(), 0.0).sum(-1) + p_rest * (p_rest / q_rest).log()
    targets = padded_ids().flatten()[scored_tokens()]
    nlls = -q.gather(1, targets[:, None]).squeeze(1).log()
    expected = (weights.flatten()[scored_tokens()] * (kls + 0.3 * nlls)).sum()
    found = losses_of(student, top_of(p.log(), 5), weights, 0.3).sum()
    assert 0.05 < p_rest.min() < p_rest.max() < 0.95
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, dense = gradient_of(student, found), gradient_of(student, expected)
    assert (ours - dense).abs().max() < 1e-10
    assert dense.abs().max() > 0.1


def test_with_the_whole_vocabulary_it_is_the_whole_kl_and_with_less_a_lower_bound(student, teacher) -> None:
    ones = torch.ones(2, max(LENGTHS), dtype=torch.float64)
    teacher_logps, student_logps = (response_logps_of(model).detach() for model in (teacher, student))
    whole = exact_kl(student_logps, teacher_logps, "ref_policy").sum().item()
    values = [losses_of(student, top_of(teacher_logps, k), ones, 0.0).sum().item() for k in (1, 2, 16, 127, 128)]
    assert 0 < values[0] < values[1] < values[2] < whole
    assert values[3:] == pytest.approx([whole, whole], rel=1e-5)  # a bucket of one id, or of none but MIN_TAIL


def test_a_student_that_is_the_teacher_has_nothing_to_learn(student) -> None:
    ones = torch.ones(2, max(LENGTHS), dtype=torch.float64)
    losses = losses_of(student, top_of(response_logps_of(student).detach(), 4), ones, 0.0)
    assert losses.abs().max() < 1e-12
    assert gradient_of(student, losses.sum()).abs().max() < 1e-12
