import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.train.model.families import make_model
from train.data.dataset import Pair, StoredResponse
from train.model.collate import PairCollator, model_inputs
from train.model.foreign import decoder_of, output_layer
from train.model.logps import (
    _SelectedLogps,
    check_output_layer,
    gradient_of_logits,
    per_token_logps,
    route_forward,
    selected_logps,
)
from train.model.packing import confirm_layout
from weights_store.errors import InputError


def as_pair(row: dict) -> Pair:
    sides = [
        StoredResponse(*(np.array(row[f"{side}_{name}"]) for name in ("ids", "token_weights", "ref_logps")))
        for side in ("chosen", "rejected")
    ]
    return Pair(row["pair_id"], np.array(row["prompt_ids"]), *sides)


@pytest.fixture
def batch(rows):
    return PairCollator(packed=False)([as_pair(row) for row in rows[:6]])


def test_logps_equal_those_of_each_sequence_alone(model, batch, rows) -> None:
    logps = per_token_logps(model, **model_inputs(batch)).logps
    for row, stored in enumerate(rows[:6]):
        for place, side in ((row, "chosen"), (row + 6, "rejected")):
            got = logps[place][batch["completion_mask"][place]].tolist()
            assert got == pytest.approx(stored[f"{side}_ref_logps"], abs=2e-5)


def test_logps_equal_cross_entropy_of_full_logits_in_value_and_gradient(model, batch) -> None:
    model = copy.deepcopy(model)
    logps = per_token_logps(model, **model_inputs(batch), chunk_logits=5 * 128).logps  # 5 tokens at a time
    logps.sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    mask = batch["completion_mask"]
    until_end = mask.flip(1).cumsum(1).flip(1) > 0  # the response and what is before it
    logits = model(input_ids=batch["input_ids"], attention_mask=until_end.long()).logits
    expected = -F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    expected = expected * batch["completion_mask"][:, 1:]
    assert torch.allclose(logps[:, 1:], expected, atol=1e-5)
    assert torch.all(logps[:, 0] == 0)
    expected.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, atol=1e-4), name


def test_no_tensor_over_all_tokens_and_the_vocabulary_exists(model, batch, monkeypatch) -> None:
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    per_token_logps(model, **model_inputs(batch), chunk_logits=7 * 128)
    handle.remove()
    num_tokens = int(batch["completion_mask"].sum())
    assert sum(rows for _, rows, _ in seen) == num_tokens  # response tokens only
    assert max(seen) == (1, 7, 128)


def test_logits_are_kept_up_to_a_limit_and_computed_again_above_it(model, batch) -> None:
    model = copy.deepcopy(model)
    num_tokens = int(batch["completion_mask"].sum())
    gradients = []
    for kept_logits, runs in ((num_tokens * 128, 1), (num_tokens * 128 - 1, 2)):
        seen = []
        handle = model.lm_head.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.shape[1])
        )
        model.zero_grad()
        per_token_logps(
            model, **model_inputs(batch), chunk_logits=7 * 128, kept_logits=kept_logits
        ).logps.sum().backward()
        handle.remove()
        assert sum(seen) == runs * num_tokens
        gradients.append(model.lm_head.weight.grad.clone())
    assert torch.equal(*gradients)


def test_padding_and_batch_composition_change_nothing(model, rows) -> None:
    pairs = [as_pair(row) for row in rows[:6]]
    together = PairCollator(packed=False)(pairs)
    logps = per_token_logps(model, **model_inputs(together)).logps
    for i, pair in enumerate(pairs):
        alone = PairCollator(packed=False)([pair])
        alone_logps = per_token_logps(model, **model_inputs(alone)).logps
        for place, alone_place in ((i, 0), (i + len(pairs), 1)):
            whole = logps[place][together["completion_mask"][place]]
            assert torch.allclose(whole, alone_logps[alone_place][alone["completion_mask"][alone_place]], atol=1e-5)


def test_padding_id_does_not_matter(model, batch) -> None:
    logps = per_token_logps(model, **model_inputs(batch)).logps
    padding = batch["completion_mask"].flip(1).cumsum(1).flip(1) == 0  # after the response
    assert padding.any()
    batch["input_ids"] = batch["input_ids"].masked_fill(padding, 77)
    assert torch.equal(logps, per_token_logps(model, **model_inputs(batch)).logps)


def test_routed_model_returns_logps_and_keeps_its_class(model, batch) -> None:
    routed = copy.deepcopy(model)
    route_forward(routed)
    assert torch.equal(routed(**model_inputs(batch)).logps, per_token_logps(model, **model_inputs(batch)).logps)
    assert type(routed) is type(model)


def gemma(**changes):
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, final_logit_softcapping=0.5, initializer_range=0.5, query_pre_attn_scalar=16, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config).eval()


def test_softcapped_logits_are_understood() -> None:
    check_output_layer(gemma())


def test_a_model_that_scales_its_logits_in_an_unknown_way_is_refused() -> None:
    model = gemma()
    ordinary = model.forward

    def forward(**inputs):
        output = ordinary(**inputs)
        output.logits = output.logits * 1.5
        return output

    model.forward = forward
    with pytest.raises(
        InputError, match=r"Gemma2ForCausalLM: log-probs computed from its hidden states differ .* nats"
    ):
        check_output_layer(model)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "cpmant",
            "CpmAntForCausalLM: log-probs .* only where padding follows, so its tokens see what comes after them",
        ),
        ("bert-bidirectional", "BertLMHeadModel: log-probs .* set is_decoder=true in its config.json"),
        ("prophetnet", "ProphetNetForCausalLM: .* something else than its last hidden states to its output layer"),
        ("rwkv", "RwkvForCausalLM changes its own weights in a forward pass, .* rescale_every=0"),
    ],
)
def test_families_that_cannot_be_computed_are_refused_in_one_line(family: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        check_output_layer(make_model(family))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "family", ["falcon_h1", "llama4", "recurrent_gemma", "hyperclovax", "modernbert-decoder", "cohere"]
)
def test_hidden_states_become_logits_in_the_way_of_the_family(family: str) -> None:
    model = make_model(family)
    ids = torch.arange(8, 30)[None]
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        assert torch.allclose(output_layer(model)(hidden), logits, atol=1e-5)
        assert not torch.allclose(model.get_output_embeddings()(hidden), logits, atol=0.1) or family == "llama4"
        assert torch.equal(model(input_ids=ids, use_cache=False).logits[0], logits)  # the decoder is its own again


def test_an_output_layer_whose_gradient_needs_the_logits_is_refused_before_training() -> None:
    """tanh' = 1 - tanh² needs logits that are written over. Computed again in the backward pass, they raise no error there."""
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logits.tanh())
    check_output_layer(model)
    with pytest.raises(InputError, match="LlamaForCausalLM does not run on a few ids.*output 0 of Tanh"):
        confirm_layout(model, "sdpa", "not packed")


def test_a_second_backward_pass_over_the_same_logits_is_an_error(model, batch) -> None:
    total = per_token_logps(copy.deepcopy(model), **model_inputs(batch)).logps.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_model_without_an_output_layer_is_refused(model) -> None:
    with pytest.raises(InputError, match="LlamaModel is not a causal language model"):
        check_output_layer(model.base_model)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_what_gpus_compile_is_the_log_softmax_and_its_gradient(dtype: torch.dtype, atol: float) -> None:
    """The functions alone; `tests/gpu` runs them compiled."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 40, generator=generator)).to(dtype)
    ids, gradient = (
        torch.tensor([0, 39, 7, 7, 21]),
        torch.randn(5, generator=generator).to(torch.promote_types(dtype, torch.float32)),
    )
    logps, log_sums = selected_logps(logits, ids)
    exact = logits.double().requires_grad_()
    expected = exact.log_softmax(-1)[torch.arange(5), ids]
    expected.backward(gradient.double())
    assert logps.dtype == log_sums.dtype == gradient.dtype
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(log_sums.double(), exact.logsumexp(-1), rtol=0, atol=atol)
    on_cpu = logits.detach().clone().requires_grad_()
    got = gradient_of_logits(logits.detach(), ids, log_sums, gradient)
    assert got.data_ptr() == logits.data_ptr()  # written over them
    torch.testing.assert_close(got.double(), exact.grad, rtol=0, atol=2 * atol)
    _SelectedLogps.apply(on_cpu, ids).backward(gradient)
    torch.testing.assert_close(on_cpu.grad.double(), exact.grad, rtol=0, atol=2 * atol)
