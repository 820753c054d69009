import copy
import re
from dataclasses import replace
from types import MethodType

import numpy as np
import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import train.model.attention.groups
import train.model.packing
from tests.train.model.families import make_config, make_model
from train.data.dataset import Pair, StoredResponse
from train.model.attention.continuation import Continuation
from train.model.attention.layout import Layout
from train.model.attention.packed import PACKED, Packing
from train.model.collate import PairCollator, model_inputs
from train.model.logps import Divergence, check_output_layer, per_token_logps
from train.model.packing import confirm_layout, enable_packing
from weights_store.errors import InputError

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, **LAYERS}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**BASE)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**BASE, tie_word_embeddings=True)),
    "mistral-window": (MistralForCausalLM, MistralConfig(**BASE, sliding_window=5)),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config(**BASE, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**BASE, head_dim=8)),
    "gemma2-window-softcap": (
        Gemma2ForCausalLM,
        Gemma2Config(**BASE, **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3-window": (Gemma3ForCausalLM, Gemma3TextConfig(**BASE, **GEMMA)),
}


def random_pairs(lengths: list[tuple[int, ...]], *, vocab_size: int) -> list[Pair]:
    """Pairs of random ids: lengths of prompt, chosen, rejected and perhaps anchor; the responses of the first begin alike."""
    generator = np.random.default_rng(0)
    pairs = []
    for length in lengths:
        prompt, *responses = (generator.integers(0, vocab_size, n).astype(np.int32) for n in length)
        if not pairs:
            for other in responses[1:]:
                other[:2] = responses[0][:2]
        sides = [StoredResponse(ids, *(np.zeros(len(ids), np.float32),) * 2) for ids in responses]
        anchor = sides[2] if len(sides) > 2 else None
        pairs.append(Pair(f"pair-{len(pairs)}", prompt, sides[0], sides[1], anchor=anchor))
    return pairs


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    config = copy.deepcopy(config)
    if "softcap" in family:
        config._attn_implementation = "eager"  # transformers' default leaves soft-capping out
    return kind(config).eval()


def inputs_of(pairs: list[Pair], packed: bool, **flags: bool) -> dict[str, torch.Tensor]:
    batch = PairCollator(packed=packed, **flags)(pairs)
    return model_inputs(batch)


@pytest.fixture(params=["dense", "sdpa"])
def kernel(request, monkeypatch) -> str:
    """Both ways of the CPU: plain products for short pairs, torch's kernel for long ones."""
    if request.param == "sdpa":
        monkeypatch.setattr(train.model.attention.groups, "MAX_DENSE_SCORES", 0)
    return request.param


def check_packed_equals_separate(model: torch.nn.Module, pairs: list[Pair], **flags: bool) -> None:
    found = {}
    for packed in (False, True):
        if packed:
            assert enable_packing(model) is None
            assert model.config._attn_implementation == PACKED
        model.zero_grad()
        logps = per_token_logps(model, **inputs_of(pairs, packed, **flags)).logps
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        found[packed] = logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
    assert torch.allclose(found[True][0], found[False][0], atol=2e-5)
    for name, gradient in found[False][1].items():
        assert torch.allclose(found[True][1][name], gradient, atol=2e-4, rtol=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pairs_equal_separate_sequences_in_value_and_gradient(family: str, kernel: str) -> None:
    lengths = [(7, 9, 6), (1, 1, 12), (11, 3, 1), (4, 8, 8)]  # longer than the window of 5
    check_packed_equals_separate(build(family), random_pairs(lengths, vocab_size=96))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2-window-softcap"])
@pytest.mark.parametrize("share_beginnings", [True, False])
def test_packed_anchors_equal_separate_sequences_in_value_and_gradient(family: str, share_beginnings: bool) -> None:
    pairs = random_pairs([(7, 9, 6, 8), (1, 1, 12, 2), (11, 3, 1, 7), (4, 8, 8, 1)], vocab_size=96)
    check_packed_equals_separate(build(family), pairs, with_anchors=True, share_beginnings=share_beginnings)


def test_responses_are_blind_to_each_other_and_pairs_to_pairs() -> None:
    model = build("llama")
    enable_packing(model)
    pairs = random_pairs([(6, 5, 5), (3, 4, 7)], vocab_size=96)
    before = per_token_logps(model, **inputs_of(pairs, True)).logps
    pairs[0].rejected.ids[:] = (pairs[0].rejected.ids + 1) % 96
    after = per_token_logps(model, **inputs_of(pairs, True)).logps
    assert torch.allclose(before[[0, 1, 3]], after[[0, 1, 3]], atol=1e-6)  # its chosen one, and both of the other pair
    assert not torch.allclose(before[2], after[2], atol=1e-2)


def test_anchors_neither_see_the_sides_of_their_pair_nor_are_seen() -> None:
    model = build("llama")
    enable_packing(model)
    pairs = random_pairs([(6, 5, 5, 4), (3, 4, 7, 6)], vocab_size=96)
    plain = per_token_logps(model, **inputs_of(pairs, True)).logps
    before = per_token_logps(model, **inputs_of(pairs, True, with_anchors=True)).logps
    assert torch.allclose(before[:4], plain, atol=1e-6)
    pairs[1].chosen.ids[:] = (pairs[1].chosen.ids + 1) % 96
    after = per_token_logps(model, **inputs_of(pairs, True, with_anchors=True)).logps
    assert torch.allclose(before[[0, 2, 3, 4, 5]], after[[0, 2, 3, 4, 5]], atol=1e-6)
    assert not torch.allclose(before[1], after[1], atol=1e-2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("top_k", [True, False])
def test_the_divergence_is_computed_of_both_sides_and_not_of_anchors(packed: bool, top_k: bool) -> None:
    model, reference = build("llama"), build("llama")
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.5)
    if packed:
        assert enable_packing(model) is enable_packing(reference) is None
    pairs = random_pairs([(6, 5, 5, 4), (3, 4, 7, 6), (2, 1, 3, 9)], vocab_size=96)
    if top_k:
        pairs = [
            replace(pair, **{side: with_top_k(getattr(pair, side)) for side in ("chosen", "rejected")})
            for pair in pairs
        ]
    divergence = Divergence("ref_policy", top_k=top_k, reference=None if top_k else reference)
    found = []
    for with_anchors in (False, True):
        inputs = inputs_of(pairs, packed, with_anchors=with_anchors)
        model.zero_grad()
        # chunks of 2 rows: neither the sides' 25 tokens nor the anchors' 19 are a multiple
        terms = per_token_logps(model, **inputs, divergence=divergence, chunk_logits=8 * 96)
        (terms.logps[:6].sum() + terms.kls.sum()).backward()
        found.append((terms, model.lm_head.weight.grad.clone()))
    (plain, plain_gradient), (anchored, gradient) = found
    length = plain.kls.shape[1]
    assert torch.allclose(anchored.kls[:6, :length], plain.kls, atol=1e-6)
    assert plain.kls.max() > 0.01
    assert torch.allclose(gradient, plain_gradient, atol=1e-4)
    assert torch.all(anchored.kls[6:] == 0)
    expected = per_token_logps(model, **inputs_of(pairs, packed, with_anchors=True)).logps
    assert torch.allclose(anchored.logps, expected, atol=1e-5)


def with_top_k(response: StoredResponse) -> StoredResponse:
    """With three likeliest ids of some reference."""
    ids = np.tile(np.array([3, 1, 2], np.int32), (len(response.ids), 1))
    return replace(response, ref_top_ids=ids, ref_top_logps=np.log(np.full(ids.shape, 0.2, np.float32)))


def packing_of(branch_ids: list[int]) -> Packing:
    return Packing(Layout.of_tokens(branch_ids), torch.device("cpu"))


def test_who_sees_whom_by_hand() -> None:
    # pair 0: prompt a b, chosen c, rejected d e; pair 1: prompt f, chosen g, rejected h
    packing = packing_of([0, 0, 1, 2, 2, 4, 5, 6])
    assert packing.layout.positions().tolist() == [0, 1, 2, 2, 3, 0, 1, 1]
    tokens = torch.arange(8)
    seen = packing.sees(tokens[:, None], tokens[None], None).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]
    assert packing.sees(tokens[4], tokens, 2).int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0]  # itself and the one before
    # prompt a, chosen b, rejected c, anchor d e
    triple = packing_of([0, 1, 2, 3, 3])
    assert triple.sees(tokens[:5, None], tokens[None, :5], None).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 1, 1],
    ]
    # 3 tokens are fewer than 0.8 times 5: two groups
    assert [(group.begin, group.num_tokens, group.places.tolist()) for group in packing.groups] == [
        (0, 5, [[0, 1, 2, 3, 4]]),
        (5, 3, [[0, 1, 2]]),
    ]
    backwards = Packing(Layout.of([(20, 2), (21, 1), (8, 1), (9, 1)]), torch.device("cpu"))  # pair 5, then pair 2
    assert [(group.begin, group.num_tokens) for group in backwards.groups] == [(0, 3), (3, 2)]
    together = packing_of([0, 0, 1, 2, 2, 4, 4, 5, 6])
    (group,) = together.groups
    assert group.places.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 0]]
    assert group.is_token.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build("llama").train()
    enable_packing(model)
    inputs = inputs_of(random_pairs([(7, 9, 6), (4, 8, 8)], vocab_size=96), True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        per_token_logps(model, **inputs).logps.sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    assert torch.equal(*gradients)


def test_models_that_cannot_be_packed_say_why_and_stay_as_they_are() -> None:
    mamba = FalconMambaForCausalLM(
        FalconMambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    assert enable_packing(mamba) == "FalconMambaForCausalLM carries a state from token to token"
    chunked = build("gemma3-window")
    chunked.config.layer_types[1] = "chunked_attention"
    assert enable_packing(chunked) == "Gemma3ForCausalLM has layers of type chunked_attention"
    assert chunked.config._attn_implementation == "sdpa"


# --- what a few ids must see -------------------------------------------------------------------------------------------


def with_real_window(name: str, window: int = 4096, **changes: object) -> PreTrainedModel:
    """A model whose first layer has a window as long as real ones, far longer than any probe."""
    config = make_config(name)
    vars(config).update(sliding_window=window, **changes)
    return make_model(name, config)


def test_a_window_that_attention_is_not_told_of_is_seen_however_long_it_is() -> None:
    """Qwen2-MoE puts its window into the mask alone, which packed attention makes itself."""
    windowed = with_real_window("qwen2_moe")
    assert windowed.config.layer_types == ["sliding_attention", "full_attention"]
    assert enable_packing(windowed).startswith("packed log-probs differ from those of separate sequences by ")
    assert windowed.config._attn_implementation == "sdpa"
    assert enable_packing(with_real_window("qwen2_moe", layer_types=["full_attention"] * 2)) is None


def test_windows_have_their_length_back_after_the_trial() -> None:
    for name in ("qwen2", "qwen2_moe"):
        model = with_real_window(name)
        enable_packing(model)
        assert model.config.sliding_window == 4096
        assert {getattr(module, "sliding_window", None) for module in model.modules()} <= {4096, None}


def test_a_window_that_cannot_be_shortened_is_not_packed(monkeypatch) -> None:
    monkeypatch.setattr(train.model.packing, "_WINDOW_NAMES", re.compile("none is named so"))
    model = with_real_window("qwen2")
    assert enable_packing(model) == "its sliding window cannot be shortened for a test"
    assert model.config._attn_implementation == "sdpa"


def test_packed_attributions_are_tried_only_if_they_are_needed(monkeypatch) -> None:
    """Their way keeps the keys and values of prompts; here responses continue without them."""

    def without_prompts(self, module, query, key, value, scoring):
        nothing = key[0, :, :0][None], value[0, :, :0][None]
        self.groups = [replace(group, prompts=group.prompts[:, :0]) for group in self.groups]
        befores = [tuple(t.expand(len(group.places), -1, -1, -1) for t in nothing) for group in self.groups]
        return self.attend_in_groups((query, key, value), befores, scoring)

    monkeypatch.setattr(Continuation, "attend", without_prompts)
    assert enable_packing(build("llama")) is None
    model = build("llama")
    assert enable_packing(model, attributions=True).startswith(
        "packed gradients differ from those of separate sequences"
    )
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fault", ["fails", "is wrong", "fails backward"])
def test_a_model_that_cannot_run_packed_on_its_device_gets_its_own_attention_back(monkeypatch, fault: str) -> None:
    model = build("llama")
    assert enable_packing(model) is None
    assert confirm_layout(model, "sdpa", None, attributions=True) is None
    assert model.config._attn_implementation == PACKED
    ordinary = Packing.attend

    def attend(self, module, query, key, value, scoring):
        if fault == "fails":
            raise NotImplementedError("no kernel\nand a long story")
        output = ordinary(self, module, query, key, value, scoring)
        if fault == "fails backward":
            return NoBackward.apply(output)
        return output.flip(1)

    monkeypatch.setattr(Packing, "attend", attend)
    reason = confirm_layout(model, "sdpa", None)
    assert reason == {
        "fails": "its decoder does not run packed: no kernel",
        "fails backward": "its decoder does not run packed: no backward kernel",
    }.get(fault, reason)
    assert "\n" not in reason
    assert model.config._attn_implementation == "sdpa"


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output):
        return output.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no backward kernel")


@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcap"])
def test_rounding_is_not_taken_for_an_error(name: str) -> None:
    model = build(name)
    ordinary = model.config._attn_implementation
    assert enable_packing(model, attributions=True) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert confirm_layout(model, ordinary, None, attributions=True) is None


def test_a_family_whose_code_fails_in_training_is_refused_in_one_line() -> None:
    """Reformer's backward pass asserts that all its modules are in training mode."""
    model = make_model("reformer")
    with pytest.raises(
        InputError, match="^ReformerModelWithLMHead does not run on a few ids: .*; use another model$"
    ) as error:
        confirm_layout(model, "eager", enable_packing(model))
    assert "\n" not in str(error.value)


def test_a_model_that_fails_the_trial_is_left_as_it_is(monkeypatch) -> None:
    model = build("llama")
    monkeypatch.setattr(Packing, "sees", lambda self, query, key, window: key <= query)  # everybody sees everybody
    assert enable_packing(model).startswith("packed log-probs differ from those of separate sequences by ")
    assert model.config._attn_implementation == "sdpa"
    ordinary = model.model.forward
    model.model.forward = lambda input_ids, attention_mask=None, position_ids=None, use_cache=None: ordinary(
        input_ids, attention_mask, position_ids, use_cache=use_cache
    )
    assert enable_packing(model).startswith("its decoder does not run packed: ")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("name", "reason"), [("llama", None), ("qwen2_moe", "packed log-probs differ")])
def test_a_quantised_model_is_packed_in_spite_of_its_rounding_but_not_with_wrong_attention(name: str, reason) -> None:
    """Layers of 4 bits compute in bfloat16, whatever the dtype of the model is."""

    def rounded(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        half = torch.nn.functional.linear(hidden.bfloat16(), layer.weight.bfloat16())
        return half.to(hidden.dtype)

    wide = BASE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "initializer_range": 0.05}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**wide)).eval() if name == "llama" else with_real_window(name)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.bias is None and "lm_head" not in layer_name:
            layer.forward = MethodType(rounded, layer)
    check_output_layer(model, rounds=True)
    assert re.match("packed log-probs differ", enable_packing(model))  # as if it were exact
    found = enable_packing(model, rounds=True)
    assert found is None if reason is None else found.startswith(reason)
