import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import train.model.attention.packed
import train.model.elementwise
from tests.train.model.test_packing import build, inputs_of, random_pairs
from train.config import LoraSection
from train.model.elementwise import enter_bfloat16
from train.model.logps import per_token_logps
from train.model.packing import enable_packing
from train.model.policy import add_adapters, enable_checkpointing, switch_off_noise
from train.model.recompute import cheap, recomputing

PAIRS = random_pairs([(7, 9, 6), (4, 8, 8), (11, 3, 2)], vocab_size=96)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code path of a GPU but for attention and what is compiled."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(train.model.elementwise, "compiled", lambda compute: compute)
    monkeypatch.setattr("train.model.logps.compiled", lambda compute: compute)
    monkeypatch.setattr(train.model.attention.packed, "way_of", lambda *_: "groups")


def gradients_of(model: nn.Module, *, autocast: bool) -> list[Tensor]:
    model.zero_grad()
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = per_token_logps(model, **inputs_of(PAIRS, True)).logps
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-window"])
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "adapters", "checkpointing"])
@pytest.mark.usefixtures("as_on_gpu")
def test_gradients_are_the_same_to_the_bit(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with mock.patch.object(Tensor, "is_cuda", False):
        model = build(family)
        assert enable_packing(model) is None
        enter_bfloat16(model)
    policy = add_adapters(model, LoraSection(rank=2)) if kind == "adapters" else model
    if kind == "adapters":
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    if kind == "checkpointing":
        assert enable_checkpointing(model)
    switch_off_noise(policy)
    if kind == "float64":
        policy.double()
    calls: list[object] = []
    ordinary = train.model.elementwise.cheap
    monkeypatch.setattr(
        train.model.elementwise, "cheap", lambda compute, *inputs: ordinary(_counting(compute, calls), *inputs)
    )
    got = gradients_of(policy, autocast=kind != "float64")
    num_calls, _ = len(calls), calls.clear()
    monkeypatch.setattr(train.model.elementwise, "recomputing", nullcontext)
    expected = gradients_of(policy, autocast=kind != "float64")
    # Checkpointing computes whole layers a second time anyway. Gemma's norms and gates are others: its weights alone are left.
    has_any = kind != "checkpointing" and (family != "gemma3-window" or kind != "float64")
    assert (num_calls > len(calls)) == has_any
    assert len(got) == len(expected) > 0
    assert all(map(torch.equal, got, expected))


def _counting(compute, calls):
    def call(*inputs: Tensor) -> Tensor:
        calls.append(compute)
        return compute(*inputs)

    return call


def test_an_output_is_not_kept_and_computed_again_once_for_all_who_need_it() -> None:
    calls: list[object] = []
    x, first, second = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with recomputing():
        y = cheap(_counting(torch.sin, calls), x)
        total = (y @ first).sum() + (y.view(2, 8)[1:].view(2, 4) @ second).sum()
    memory = StorageWeakRef(y.untyped_storage())
    y = y.detach().clone()
    assert memory.expired()
    total.backward()
    assert len(calls) == 2  # forward, and once for both products
    torch.testing.assert_close(first.grad, y.T @ torch.ones(4, 4, dtype=torch.float64))
    torch.testing.assert_close(second.grad, y[2:].T @ torch.ones(2, 4, dtype=torch.float64))


def test_without_recomputing_an_output_is_kept() -> None:
    x = torch.randn(4, requires_grad=True)
    y = cheap(torch.sin, x)
    total, memory = (y * y).sum(), StorageWeakRef(y.untyped_storage())
    del y
    assert not memory.expired()
    total.backward()


def test_an_output_that_is_changed_in_place_is_kept() -> None:
    x, weight = torch.tensor([0.5, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
    with recomputing():
        y = cheap(torch.square, x)
        y += 1
        total = (y * weight).sum()
    total.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.25, 5.0]  # x² + 1


@pytest.mark.parametrize("changed", ["input", "kept"])
def test_a_change_in_place_of_what_is_needed_is_an_error_as_ever(changed: str) -> None:
    x, weight = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with recomputing():
        twice = x * 2
        y = cheap(torch.square, twice) if changed == "input" else twice
        total = (y * weight).sum()
    with torch.no_grad():
        twice.add_(1)
    with pytest.raises(
        RuntimeError, match=r"a tensor \(2,\) that the backward pass needs was changed in place.*version 1"
    ):
        total.backward()


def test_a_copied_model_recomputes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    enter_bfloat16(model)
    other = copy.deepcopy(model)
    assert other.model.forward.__self__ is other.model
    assert other.model.layers[0].mlp.up_proj.forward.__self__ is other.model.layers[0].mlp.up_proj
