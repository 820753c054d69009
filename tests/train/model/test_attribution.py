"""Attributions against a naive loop: one sequence at a time, embeddings as input, the whole logits, plain autograd."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import train.model.attention.groups
from train.data.dataset import Pair, StoredResponse
from train.model.attribution import AttributionTarget, TokenAttributions, attribute_tokens
from train.model.collate import Batch, PairCollator
from train.model.packing import enable_packing
from weights_store.errors import InputError

VOCAB_SIZE, UNUSED_ID = 61, 60
TARGETS: tuple[AttributionTarget, ...] = ("max_logit", "gold_logps", "dpo_margin")
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attention_dropout": 0.2,  # must not matter
}
SLIDING = {**SMALL, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
SOFT = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SLIDING, **SOFT),
    "gemma3": lambda: Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=8),
}


def make_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").to(dtype).eval()


def make_pairs() -> list[Pair]:
    """Unequal lengths; the second pair's responses begin alike, the third's chosen one is a single token."""
    ids = np.random.default_rng(1).integers(1, UNUSED_ID, 200).astype(np.int32)
    cuts = [(ids[0:9], ids[9:20], ids[20:27]), (ids[30:33], ids[40:49], np.append(ids[40:44], ids[60:62]))]
    cuts += [(ids[70:84], ids[90:91], ids[91:98])]
    return [
        Pair(f"pair-{i}", prompt, make_response(chosen), make_response(rejected))
        for i, (prompt, chosen, rejected) in enumerate(cuts)
    ]


def make_response(ids: np.ndarray) -> StoredResponse:
    return StoredResponse(ids, np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32))


def naive(model: Any, prompt: np.ndarray, response: np.ndarray, target: str) -> np.ndarray:
    """Attributions of all tokens of one sequence."""
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0].float()
    if target == "max_logit":
        value = logits[-1].max()
    else:
        logps = logits.log_softmax(-1)
        value = sum(logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))
    (gradient,) = torch.autograd.grad(value, embeddings)
    return gradient[0].abs().sum(-1).numpy()


def sequences(pairs: list[Pair]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for side in ("chosen", "rejected"):
        for pair in pairs:
            yield pair.prompt_ids, getattr(pair, side).ids


def rows_of(values: Tensor, batch: Batch) -> list[np.ndarray]:
    """What `[S, T]` values say of the response tokens of each sequence; nothing may be said of any other."""
    mask = batch["completion_mask"]
    assert not values[~mask].any()
    return [row[row_mask].numpy() for row, row_mask in zip(values, mask, strict=True)]


def assert_like_naive(model: nn.Module, pairs: list[Pair], batch: Batch, target: AttributionTarget) -> None:
    got = attribute_tokens(model, batch, target)
    for row, (prompt, response) in zip(rows_of(got.attributions, batch), sequences(pairs), strict=True):
        np.testing.assert_allclose(row, naive(model, prompt, response, target)[len(prompt) :], rtol=1e-5)


def naive_margin(model: Any, pair: Pair) -> list[np.ndarray]:
    """Attributions of the response tokens of a pair: one graph for both responses, behind one embedding of the prompt."""
    lookup, num_before = model.get_input_embeddings(), len(pair.prompt_ids)
    parts = [
        lookup(torch.tensor(ids.astype(np.int64))[None]).detach().requires_grad_()
        for ids in (pair.prompt_ids, pair.chosen.ids, pair.rejected.ids)
    ]
    margin = torch.zeros(())
    for sign, own, response in ((1, parts[1], pair.chosen), (-1, parts[2], pair.rejected)):
        logits = model(inputs_embeds=torch.cat([parts[0], own], 1), use_cache=False).logits[0].float()
        ids = torch.tensor(response.ids.astype(np.int64))
        margin = margin + sign * logits[num_before - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).sum()
    return [gradient[0].abs().sum(-1).numpy() for gradient in torch.autograd.grad(margin, parts[1:])]


# --- equal to the naive loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_attributions_are_those_of_single_sequences(family: str) -> None:
    model, pairs = make_model(family), make_pairs()
    expected = {target: [naive(model, *sequence, target) for sequence in sequences(pairs)] for target in TARGETS}
    assert enable_packing(model) is None
    batch = PairCollator(share_beginnings=False)(pairs)
    for target in TARGETS:
        got = attribute_tokens(model, batch, target)
        for row, whole in zip(rows_of(got.attributions, batch), expected[target], strict=True):
            np.testing.assert_allclose(row, whole[-len(row) :], rtol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_changes_nothing(family: str, target: AttributionTarget) -> None:
    model, pairs = make_model(family), make_pairs()
    assert_like_naive(model, pairs, PairCollator(packed=False)(pairs), target)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("target", ["max_logit", "gold_logps"])
def test_sums_over_the_prompt_are_those_of_the_naive_loop(packed: bool, target: AttributionTarget) -> None:
    """Packed only where each response has a prompt of its own; padded it always has."""
    model, pairs = make_model(), make_pairs()
    expected = [naive(model, p, r, target)[: len(p)].sum() for p, r in sequences(pairs)]
    if packed:
        assert enable_packing(model) is None
        pairs, expected = pairs, expected[: len(pairs)]
    batch = PairCollator(packed=packed, with_rejected=not packed, share_beginnings=False)(pairs)
    sums = attribute_tokens(model, batch, target, with_prompts=True).prompt_attributions
    assert sums is not None
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-5)


def test_a_response_token_matters_to_the_dpo_margin_as_much_as_to_its_own_log_probs() -> None:
    """The margin is the difference of two sums, and a response token is in one of them: |+g| = |-g|."""
    model, pairs = make_model(), make_pairs()
    expected = [naive_margin(model, pair) for pair in pairs]
    assert enable_packing(model) is None
    batch = PairCollator(share_beginnings=False)(pairs)
    margin, gold = (attribute_tokens(model, batch, target) for target in ("dpo_margin", "gold_logps"))
    of_margin = rows_of(margin.attributions, batch)
    for chosen, rejected, both in zip(of_margin[: len(pairs)], of_margin[len(pairs) :], expected, strict=True):
        np.testing.assert_allclose(chosen, both[0], rtol=1e-5)
        np.testing.assert_allclose(rejected, both[1], rtol=1e-5)
    torch.testing.assert_close(margin.attributions, gold.attributions, rtol=1e-6, atol=0)
    assert margin.attributions.sum() > 0


def test_the_last_token_has_no_part_in_the_log_probs_and_the_first_ones_have() -> None:
    """Nothing is predicted from the last token of a response, so its gold attribution is 0; behind it is the largest logit."""
    model, pairs = make_model(), make_pairs()
    batch = PairCollator(packed=False)(pairs)
    for target, last_counts in (("gold_logps", False), ("max_logit", True)):
        for row in rows_of(attribute_tokens(model, batch, target).attributions, batch):  # type: ignore[arg-type]
            assert (row[-1] > 0) == last_counts
            assert (row[:-1] > 0).all()


@pytest.mark.parametrize("limit", ["MAX_DENSE_SCORES", "MAX_GROUP_SCORES"])
def test_how_attention_is_computed_and_laid_out_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Without dense products it is PyTorch's own kernel; without room for two, every response is a group of its own."""
    model = make_model("gemma3")
    assert enable_packing(model) is None
    batch = PairCollator(share_beginnings=False)(make_pairs())
    expected = attribute_tokens(model, batch, "gold_logps").attributions
    monkeypatch.setattr("train.model.attention.groups." + limit, 0)
    largest = train.model.attention.groups.MAX_GROUP_SCORES
    monkeypatch.setattr("train.model.attention.continuation.MAX_GROUP_SCORES", largest)
    torch.testing.assert_close(attribute_tokens(model, batch, "gold_logps").attributions, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", ["max_logit", "gold_logps"])
def test_prompts_without_gradients_leave_those_of_the_response_as_they_are(target: AttributionTarget) -> None:
    """With prompts wanted gradients go through all of the packed row; without, prompts are a constant and layers cut short."""
    model = make_model("gemma2")
    assert enable_packing(model) is None
    batch = PairCollator(with_rejected=False, share_beginnings=False)(make_pairs())
    whole = attribute_tokens(model, batch, target, with_prompts=True)
    alone = attribute_tokens(model, batch, target)
    measured = attribute_tokens(model, batch, target, with_activations=True)
    torch.testing.assert_close(alone.attributions, whole.attributions, rtol=1e-5, atol=0)
    torch.testing.assert_close(measured.attributions, whole.attributions, rtol=1e-5, atol=0)
    assert alone.prompt_attributions is None


@pytest.mark.parametrize("packed", [True, False])
def test_responses_of_one_token_have_no_part_in_their_log_probs(packed: bool) -> None:
    model, pair = make_model(), make_pairs()[0]
    alone = [Pair("p", pair.prompt_ids, make_response(pair.chosen.ids[:1]), make_response(pair.rejected.ids[:1]))]
    if packed:
        assert enable_packing(model) is None
    batch = PairCollator(packed=packed, share_beginnings=False)(alone)
    assert not attribute_tokens(model, batch, "gold_logps").attributions.any()
    assert (attribute_tokens(model, batch, "max_logit").attributions > 0).equal(batch["completion_mask"])


# --- by hand -----------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """A decoder whose hidden state is the sum of the embeddings up to a token."""

    def __init__(self, embeddings: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embeddings

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        embeddings = self.embed_tokens(input_ids)
        states = embeddings.cumsum(1)
        return BaseModelOutputWithPast(last_hidden_state=states, hidden_states=(embeddings, states))


class BagModel(nn.Module):
    """Logits h W^T over three ids, h in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=3)
        self.base_model = Bag(nn.Embedding.from_pretrained(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0]])))
        self.lm_head = nn.Linear(2, 3, bias=False)
        self.lm_head.weight.data = torch.tensor([[2.0, -3.0], [1.0, 1.0], [0.0, 0.5]])

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def bag_batch() -> Batch:
    """Prompt (0), responses (0, 1) and (1)."""
    pair = Pair("p", *(np.array([0], np.int32), make_response(np.array([0, 1])), make_response(np.array([1]))))
    return PairCollator(packed=False)([pair])


def test_attributions_of_a_linear_model_are_its_rows() -> None:
    """Logits are linear in every embedding, so the gradient of the largest is its row of W, the same at every token.

    Chosen: h = (1,0) + (1,0) + (0,2) = (2,2), logits (4-6, 2+2, 1): the largest is id 1, with row (1, 1): 2 per token.
    Rejected: h = (1,0) + (0,2) = (1,2), logits (-4, 3, 1): id 1 too.
    """
    got = attribute_tokens(BagModel(), bag_batch(), "max_logit", with_prompts=True)
    assert got.attributions.tolist() == [[0.0, 2.0, 2.0], [0.0, 2.0, 0.0]]
    assert got.prompt_attributions is not None
    assert got.prompt_attributions.tolist() == [2.0, 2.0]


def test_activations_are_norms_of_the_predicting_states_relative_to_their_mean() -> None:
    """Chosen: states behind prompt and first token are (1,0) and (2,0), norms 1 and 2, mean 1.5; a lone token gets 1."""
    got = attribute_tokens(BagModel(), bag_batch(), "max_logit", with_activations=True)
    assert got.activations is not None
    torch.testing.assert_close(got.activations, torch.tensor([[0.0, 1 / 1.5, 2 / 1.5], [0.0, 1.0, 0.0]]))


def test_activations_of_a_packed_batch_are_those_of_its_hidden_states() -> None:
    model, pairs = make_model(), make_pairs()
    expected = []
    for prompt, response in sequences(pairs):
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1:]
        sizes = np.mean([states[0].norm(dim=-1).numpy() for states in hidden], axis=0)[len(prompt) - 1 : -1]
        expected.append(sizes / sizes.mean())
    assert enable_packing(model) is None
    batch = PairCollator(share_beginnings=False)(pairs)
    got = attribute_tokens(model, batch, "gold_logps", with_activations=True)
    assert got.activations is not None
    for row, sizes in zip(rows_of(got.activations, batch), expected, strict=True):
        np.testing.assert_allclose(row, sizes, rtol=1e-5)
    plain = attribute_tokens(model, batch, "gold_logps")
    assert plain.activations is None
    assert plain.attributions.equal(got.attributions)


# --- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_comes_close_and_sums_in_float32(way: str) -> None:
    """Against the float32 attributions of the same (rounded) weights; eight bits, so a few per cent of the whole."""
    model = make_model(dtype=torch.bfloat16).float()
    assert enable_packing(model) is None
    batch = PairCollator(share_beginnings=False)(make_pairs())
    expected = attribute_tokens(model, batch, "gold_logps").attributions
    if way == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        got = attribute_tokens(model, batch, "gold_logps").attributions
    assert got.dtype == torch.float32
    assert not got.equal(expected)
    assert (got - expected).abs().sum() < 0.05 * expected.sum()


# --- what must stay as it was ------------------------------------------------------------------------------------------


def test_accumulated_gradients_modes_and_hooks_stay_as_they_were() -> None:
    """The TI-DPO release's ports call `zero_grad` here, in the middle of accumulation."""
    model: Any = make_model().train()
    model.model.norm.eval()
    model.model.norm.weight.requires_grad_(False)
    batch = PairCollator(packed=False)(make_pairs())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    attribute_tokens(model, batch, "max_logit", with_activations=True)
    for name, parameter in model.named_parameters():
        is_norm = name == "model.norm.weight"
        assert parameter.requires_grad != is_norm
        assert parameter.grad is None if is_norm else (parameter.grad == 0.5).all()
    assert [module for module in model.modules() if not module.training] == [model.model.norm]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (model.model, model.get_input_embeddings()))


def test_dropout_and_gradient_checkpointing_do_not_matter() -> None:
    model: Any = make_model()
    batch = PairCollator(packed=False)(make_pairs())
    expected = attribute_tokens(model, batch, "gold_logps").attributions
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert attribute_tokens(model.train(), batch, "gold_logps").attributions.equal(expected)


def test_it_works_where_gradients_are_off() -> None:
    model, batch = make_model(), PairCollator(packed=False)(make_pairs())
    expected = attribute_tokens(model, batch, "gold_logps").attributions
    with torch.no_grad():
        got = attribute_tokens(model, batch, "gold_logps").attributions
    assert got.equal(expected)


# --- what cannot be attributed -----------------------------------------------------------------------------------------


def test_an_empty_response_is_refused() -> None:
    batch = PairCollator(packed=False)(make_pairs())
    batch["completion_mask"][4] = False
    with pytest.raises(InputError, match=r"sequences \[4\] of the micro-batch have no response tokens"):
        attribute_tokens(make_model(), batch, "max_logit")


def test_prompt_sums_of_responses_that_share_a_packed_prompt_are_refused() -> None:
    model = make_model()
    assert enable_packing(model) is None
    with pytest.raises(AssertionError, match="responses share a prompt"):
        attribute_tokens(model, PairCollator(share_beginnings=False)(make_pairs()), "max_logit", with_prompts=True)


def test_responses_that_share_their_first_tokens_are_refused() -> None:
    model = make_model()
    assert enable_packing(model) is None
    with pytest.raises(AssertionError, match="share_beginnings=False"):
        attribute_tokens(model, PairCollator()(make_pairs()), "max_logit")


class Blind(BagModel):
    """Looks its embeddings up around the layer that it names."""

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(3, 2)


class Silent(BagModel):
    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_a_model_without_access_to_its_input_embeddings_is_refused() -> None:
    with pytest.raises(InputError, match="Silent gives no access to its input embeddings"):
        attribute_tokens(Silent(), bag_batch(), "max_logit")
    with pytest.raises(InputError, match="Blind reads its input embeddings 0 times in a forward pass, expected once"):
        attribute_tokens(Blind(), bag_batch(), "max_logit")


def test_gradients_of_one_pair_that_are_not_finite_stay_in_that_pair() -> None:
    model: Any = make_model()
    pairs = make_pairs()
    clean: TokenAttributions = attribute_tokens(model, PairCollator(packed=False)(pairs), "max_logit")
    model.get_input_embeddings().weight.data[UNUSED_ID] = torch.nan
    pairs[1].chosen.ids[2] = UNUSED_ID
    got = attribute_tokens(model, PairCollator(packed=False)(pairs), "max_logit").attributions
    assert not got[1].isfinite().all()
    assert got[[0, 2, 3, 4, 5]].equal(clean.attributions[[0, 2, 3, 4, 5]])
