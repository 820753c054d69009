"""Responses that the policy samples while it is trained."""

import copy

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from train.config import LoraSection, ModelConfig
from train.model.generation import sample_responses
from train.model.logps import route_forward
from train.model.policy import Policy, load_policy
from train.model.sampling import AnchorSampling
from weights_store.errors import InputError

EOS = 2
GREEDY = AnchorSampling(max_new_tokens=6, top_k=1)


@pytest.fixture
def policy(model_folder) -> Policy:
    """As it is in training: packed attention, and `model(...)` returns log-probs."""
    policy = load_policy(model_folder, ModelConfig(path=str(model_folder)))
    assert policy.not_packed is None
    route_forward(policy.model)
    return policy


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Unequal lengths, the pad id inside, and one that leaves room for 3 of the model's 128 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128, length).astype(np.int32) for length in (1, 3, 9, 9, 40, 125)]


def decode_greedily(model: torch.nn.Module, prompt: np.ndarray, room: int, ends: tuple[int, ...] = (EOS,)) -> list[int]:
    """Oracle: one sequence, nothing padded, the whole sequence again for every token."""
    ids = prompt.tolist()
    for _ in range(room):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_one_sequence_at_a_time(policy, model, prompts) -> None:
    got = sample_responses(policy, prompts, GREEDY, seed=0)
    assert [ids.tolist() for ids in got] == [decode_greedily(model, ids, min(6, 128 - len(ids))) for ids in prompts]
    assert all(ids.dtype == np.int32 for ids in got)


@torch.no_grad()
def test_a_response_ends_with_an_end_of_turn_token_of_the_generation_config_or_the_caller(
    policy, model, prompts
) -> None:
    free = decode_greedily(model, prompts[2], 6, ends=())
    policy.model.generation_config.eos_token_id = [free[3], 127]
    assert sample_responses(policy, [prompts[2]], GREEDY, seed=0)[0].tolist() == free[: free.index(free[3]) + 1]
    policy.model.generation_config.eos_token_id = None
    assert sample_responses(policy, [prompts[2]], GREEDY, seed=0)[0].tolist() == free
    ended = sample_responses(policy, [prompts[2]], GREEDY, end_ids=(free[0],), seed=0)
    assert ended[0].tolist() == free[:1]


@torch.no_grad()
def test_tokens_are_drawn_as_often_as_their_cut_and_tempered_probability_says(policy, model, prompts) -> None:
    sampling = AnchorSampling(max_new_tokens=1, temperature=0.5, top_k=8, top_p=0.9)
    num_draws = 4000
    drawn = sample_responses(policy, [prompts[2]] * num_draws, sampling, seed=3)
    counts = np.bincount([int(ids[0]) for ids in drawn], minlength=128)

    logits = model(input_ids=torch.tensor([prompts[2].tolist()])).logits[0, -1].double() / 0.5
    order = logits.argsort(descending=True)[:8]
    likeliest = logits[order].softmax(-1)
    kept = int((likeliest.cumsum(-1) < 0.9).sum()) + 1  # the one that reaches 0.9 is in
    assert 2 <= kept < 8
    expected = np.zeros(128)
    expected[order[:kept].numpy()] = (likeliest[:kept] / likeliest[:kept].sum()).numpy()
    assert not counts[expected == 0].any()
    deviation = np.sqrt(num_draws * expected * (1 - expected))
    assert (abs(counts - num_draws * expected) <= 4.5 * deviation).all()


def test_a_seed_repeats_and_torch_goes_on_as_if_nothing_had_been_drawn(policy, prompts) -> None:
    sampling = AnchorSampling(max_new_tokens=8, top_k=0, top_p=1.0, temperature=2.0)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, other, again = (sample_responses(policy, prompts[:4], sampling, seed=seed) for seed in (5, 6, 5))
    assert torch.equal(torch.rand(3), expected)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_model_is_as_it_was_and_its_own_sampling_settings_do_not_count(policy, model, prompts) -> None:
    with torch.no_grad():
        expected = [decode_greedily(model, ids, 6) for ids in prompts[:4]]
    inner = policy.model
    # A penalty that would forbid to repeat what is in the prompt.
    inner.generation_config = GenerationConfig(eos_token_id=EOS, repetition_penalty=50.0, num_beams=3)
    forward, settings, attention = inner.forward, inner.generation_config, inner.config._attn_implementation
    inner.train()
    modes = [module.training for module in inner.modules()]
    assert modes[0]
    assert [ids.tolist() for ids in sample_responses(policy, prompts[:4], GREEDY, seed=0)] == expected
    assert (inner.forward, inner.generation_config) == (forward, settings)
    assert inner.config._attn_implementation == attention == "tokenweights_packed"
    assert [module.training for module in inner.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in inner.parameters())
    with pytest.raises(InputError):
        sample_responses(policy, [np.zeros(128, np.int32)], GREEDY, seed=0)
    assert inner.forward == forward


def test_a_prompt_without_room_for_a_token_is_refused(policy) -> None:
    with pytest.raises(
        InputError, match=r"a prompt of 128 tokens leaves no room for an anchor: the model takes at most 128"
    ):
        sample_responses(policy, [np.zeros(128, np.int32)], GREEDY, seed=0)


@torch.no_grad()
def test_adapters_and_bfloat16_count(model_folder, prompts) -> None:
    folder = ModelConfig(path=str(model_folder))
    policy = load_policy(model_folder, folder, LoraSection(rank=4))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
    plain = load_policy(model_folder, folder)
    merged = copy.deepcopy(policy.model).merge_and_unload()
    merged.set_attn_implementation("sdpa")
    route_forward(policy.model)
    got = [ids.tolist() for ids in sample_responses(policy, prompts[:4], GREEDY, seed=0)]
    assert got == [decode_greedily(merged, ids, 6) for ids in prompts[:4]]
    assert got != [ids.tolist() for ids in sample_responses(plain, prompts[:4], GREEDY, seed=0)]

    dtypes = set()
    hook = (
        policy.model.get_base_model()
        .model.layers[0]
        .mlp.down_proj.register_forward_hook(lambda _layer, _args, output: dtypes.add(output.dtype))
    )
    sample_responses(policy, prompts[:2], GREEDY, seed=0, dtype="bfloat16")
    hook.remove()
    assert dtypes == {torch.bfloat16}
