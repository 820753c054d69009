import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train.model.elementwise
from tests.train.model.families import make_model
from tests.train.model.test_packing import build, inputs_of, random_pairs
from train.model.attribution import attribute_tokens
from train.model.collate import PairCollator
from train.model.elementwise import (
    _Gated,
    _norm_by_torch,
    compiled,
    enter_bfloat16,
    gated,
    gradients_of_gated,
    is_gated_mlp,
    is_rms_norm,
)
from train.model.logps import per_token_logps
from train.model.packing import enable_packing
from train.model.policy import compile_layers

PAIRS = random_pairs([(7, 9, 6), (4, 8, 8), (11, 3, 2)], vocab_size=96)


def dtypes_in(model: nn.Module) -> set[torch.dtype]:
    """The dtypes of what goes into layers, of norms' results and of the final hidden states, in a step under autocast."""
    seen: set[torch.dtype] = set()

    def note(_module: nn.Module, inputs: tuple, output: object) -> None:
        seen.update(
            each.dtype for each in (*inputs, output) if isinstance(each, torch.Tensor) and each.is_floating_point()
        )

    watched = [module for name, module in model.named_modules() if "norm" in name or name.startswith("model.layers.")]
    handles = [module.register_forward_hook(note) for module in watched]
    with torch.autocast("cpu", torch.bfloat16):
        per_token_logps(model, **inputs_of(PAIRS, True)).logps.sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma3-window"])
def test_nothing_between_matrix_products_is_float32(family: str) -> None:
    model = build(family)
    assert enable_packing(model) is None
    assert torch.float32 in dtypes_in(model)
    enter_bfloat16(model)
    assert dtypes_in(model) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gemma2-window-softcap", "gemma3-window"])
def test_without_autocast_nothing_changes(family: str) -> None:
    model = build(family)
    inputs = inputs_of(PAIRS, False)
    expected = per_token_logps(model, **inputs).logps
    enter_bfloat16(model)
    got = per_token_logps(model, **inputs).logps
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_log_probs_and_gradients_are_those_of_float32_but_for_rounding() -> None:
    """As far away as a model whose parameters are bfloat16, which nobody trains with so small learning rates."""
    exact, ours = build("llama"), build("llama")
    enter_bfloat16(ours)
    rounded = copy.deepcopy(exact).bfloat16()
    found = {}
    for name, model, autocast in (("exact", exact, False), ("ours", ours, True), ("rounded", rounded, False)):
        assert enable_packing(model, rounds=name == "rounded") is None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logps = per_token_logps(model, **inputs_of(PAIRS, True)).logps
        logps.sum().backward()
        found[name] = logps.detach(), model.model.layers[0].mlp.up_proj.weight.grad.float()
    for value, expected, other in zip(*(found[name] for name in ("ours", "exact", "rounded")), strict=True):
        error, others = ((each - expected).norm() / expected.norm() for each in (value, other))
        assert 0 < error < 1.5 * others
        assert error < 0.05


def test_norms_of_gpus_are_those_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden = build("llama"), torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    norm = model.model.layers[0].input_layernorm
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    expected = norm(hidden), norm(hidden.bfloat16())
    enter_bfloat16(model)
    on_cpu = norm(hidden), norm(hidden.bfloat16())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for other, own, exact in zip((norm(hidden), norm(hidden.bfloat16())), on_cpu, expected, strict=True):
        assert other.dtype == own.dtype
        torch.testing.assert_close(own, exact.to(own.dtype))
        torch.testing.assert_close(other, own, rtol=2**-6 if own.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_norms_of_gpus_stay_in_bfloat16_under_autocast() -> None:
    """CUDA's autocast has RMS norms in its list of float32, the one of CPUs has not; tensors without data need no GPU."""
    norm = build("llama").model.layers[0].input_layernorm
    was, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.no_grad(), FakeTensorMode():
            norm.weight = nn.Parameter(torch.empty(32, device="cuda"), requires_grad=False)
            hidden = torch.empty(1, 5, 32, device="cuda", dtype=torch.bfloat16)
            assert nn.functional.rms_norm(hidden, (32,), norm.weight.bfloat16()).dtype == torch.float32
            assert _norm_by_torch(norm, hidden).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", was)
        torch.set_autocast_dtype("cuda", dtype)


def test_which_norms_are_the_one_that_torch_has() -> None:
    assert all(is_rms_norm(module) for name, module in build("llama").named_modules() if name.endswith("norm"))
    # Gemma multiplies by 1 + weight
    assert not any(is_rms_norm(module) for module in build("gemma3-window").modules())
    assert not is_rms_norm(nn.LayerNorm(8))

    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden / (hidden.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    assert not is_rms_norm(OtherRMSNorm())


def test_which_mlps_are_gated_by_silu() -> None:
    assert sum(map(is_gated_mlp, build("llama").modules())) == 3
    assert not any(map(is_gated_mlp, build("gemma3-window").modules()))  # its gate is a GELU
    other = build("llama").model.layers[0].mlp
    other.forward = lambda hidden: other.down_proj(other.act_fn(other.up_proj(hidden)) * other.gate_proj(hidden))
    assert not is_gated_mlp(other)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_gates_and_their_gradients_by_autograd(dtype: torch.dtype, atol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, gradient = (2 * torch.randn(3, 40, generator=generator, dtype=torch.float64)).unbind(0)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    expected = gate * torch.sigmoid(gate) * up
    of_both = torch.autograd.grad(expected, (gate, up), gradient)
    rounded = [tensor.detach().to(dtype) for tensor in (gate, up, gradient)]
    torch.testing.assert_close(gated(*rounded[:2]).double(), expected, rtol=0.01 if atol > 1e-3 else 0, atol=atol)
    for got, exact in zip(gradients_of_gated(*rounded), of_both, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=0.02 if atol > 1e-3 else 0, atol=atol)


def test_fused_gates_keep_what_a_backward_pass_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs, not compiled."""
    monkeypatch.setattr(train.model.elementwise, "compiled", lambda compute: compute)
    mlp = build("llama").model.layers[0].mlp.double()
    hidden = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    parts = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    found = [_Gated.apply(*parts), mlp.act_fn(parts[0]) * parts[1]]
    gradients = [torch.autograd.grad(each.square().sum(), hidden, retain_graph=True)[0] for each in found]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


def test_a_model_that_does_not_say_which_its_embeddings_are_stays_as_it_is() -> None:
    class Nameless(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    enter_bfloat16(Nameless())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi3", "olmo2", "mixtral", "mamba2", "falcon_mamba", "kimi_linear"])
def test_other_families_compute_as_before_but_for_rounding(name: str) -> None:
    model = make_model(name)
    inputs = inputs_of(PAIRS, False)
    exact = per_token_logps(model, **inputs).logps
    enter_bfloat16(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = per_token_logps(model, **inputs).logps
    assert 0 < (got - exact).abs().mean() < 0.05


def test_what_cannot_be_compiled_is_computed_all_the_same(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def broken(_compute: object, **_options: object):
        def call(*_tensors: torch.Tensor) -> None:
            raise RuntimeError("Failed to find C compiler.\nA long story")

        return call

    def doubled(value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    monkeypatch.setattr(torch, "compile", broken)
    call = compiled(doubled)
    assert [call(torch.ones(2)).tolist() for _ in range(2)] == [[2, 2], [2, 2]]
    assert caplog.text.count("doubled cannot be compiled, and is slower now: Failed to find C compiler.") == 1


def test_attributions_see_the_embeddings_in_float32() -> None:
    """The hook that rounds embeddings and the one that makes them leaves do not get into each other's way."""
    model = build("llama")
    assert enable_packing(model) is None
    batch = PairCollator(share_beginnings=False)(PAIRS)
    expected = attribute_tokens(model, batch, "gold_logps").attributions
    enter_bfloat16(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = attribute_tokens(model, batch, "gold_logps").attributions
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.05 * expected.mean()


def test_layers_share_their_compiled_code_whatever_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, whose masks change with every micro-batch, is left out, so there are no new graphs for new lengths."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    ordinary = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: ordinary(self, backend=count, **options))
    model = build("llama")
    assert enable_packing(model) is None
    enter_bfloat16(model)
    plain = copy.deepcopy(model)
    compile_layers(model)
    numbers = []
    for lengths in ([(7, 9, 6), (4, 8, 8)], [(20, 9, 6)], [(5, 4, 3)] * 3):
        inputs = inputs_of(random_pairs(lengths, vocab_size=96), True)
        gradients = []
        for each in (plain, model):
            each.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                per_token_logps(each, **inputs).logps.sum().backward()
            gradients.append(each.model.layers[0].mlp.up_proj.weight.grad)
        torch.testing.assert_close(*gradients)
        numbers.append(len(graphs))
    assert 0 < numbers[0] <= 6
    assert numbers[0] == numbers[1] == numbers[2]
