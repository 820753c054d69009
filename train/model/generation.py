"""Sample responses from the policy during training, for anchors of the triplet loss. Called by `refresh.py`.

Ids in, ids out: nothing is tokenised. transformers' `generate` samples. Meanwhile the model has its own forward pass and
attention back: in training `model(...)` returns log-probs and attention is packed. Not here: anchors of the reference, which a
build samples with vLLM, and log-probs (`refresh.py`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from train.model.collate import PADDING_ID, Ids
from train.model.foreign import unwrap_adapters
from train.model.policy import Policy
from train.model.sampling import AnchorSampling
from train.model.token_budget import cut_by_tokens
from weights_store.errors import InputError

GENERATED_TOKENS = 1 << 14
"""Tokens, prompts included, that are generated at a time. Not a setting: samples depend on what is in a batch, and
`optim.tokens_per_batch` must not change results."""


def sample_responses(
    policy: Policy,
    prompts: Sequence[Ids],
    sampling: AnchorSampling,
    *,
    end_ids: Sequence[int] = (),
    seed: int,
    dtype: str = "float32",
) -> list[Ids]:
    """Return a response to each prompt, at least one token, with its end-of-turn token if it reached one.

    The same seed, prompts and parameters give the same responses. torch's global random state does not change.

    Args:
        policy: Not wrapped for several processes, not sharded.
        prompts: Ids, `[P]` each.
        sampling: A prompt near the model's maximum length gets fewer new tokens than this allows.
        end_ids: Ids that end a response, besides those of the model's generation config.
        seed: 0 to 2^64 - 1.
        dtype: Of the forward pass, `float32` or `bfloat16` (autocast).

    Raises:
        InputError: A prompt leaves no room for a token.
    """
    causal_model = unwrap_adapters(policy.model)
    own_ends = causal_model.generation_config.eos_token_id  # transformers fills it in from the model's config
    ends = sorted({*end_ids, *np.atleast_1d([] if own_ends is None else own_ends).tolist()})
    rooms = _rooms(prompts, causal_model, sampling.max_new_tokens)
    device = next(causal_model.parameters()).device
    responses: dict[int, Ids] = {}
    with (
        _ordinary(policy) as model,
        torch.random.fork_rng([] if device.type == "cpu" else [device]),
        torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        torch.manual_seed(seed)  # `generate` samples from the global generators
        for room in sorted(set(rooms)):
            members = [index for index, its_room in enumerate(rooms) if its_room == room]
            sampled = asdict(replace(sampling, max_new_tokens=room))
            settings = GenerationConfig(**sampled, do_sample=True, eos_token_id=ends or None, pad_token_id=PADDING_ID)
            sizes = [len(prompts[index]) + room for index in members]
            for part in cut_by_tokens(members, sizes, GENERATED_TOKENS):
                generated = _generate(model, [prompts[index] for index in part], settings)
                responses |= zip(part, (_until_end(ids, ends) for ids in generated), strict=True)
    return [responses[index] for index in range(len(prompts))]


def _rooms(prompts: Sequence[Ids], causal_model: PreTrainedModel, max_new_tokens: int) -> list[int]:
    longest = getattr(causal_model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return [max_new_tokens] * len(prompts)
    rooms = [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]
    if min(rooms) < 1:
        raise InputError(
            f"a prompt of {max(map(len, prompts))} tokens leaves no room for an anchor: the model takes at most {longest} "
            "tokens; build the dataset with a smaller dataset.max_prompt_tokens, or train with loss.anchor='stored'"
        )
    return rooms


@contextmanager
def _ordinary(policy: Policy) -> Iterator[PreTrainedModel]:
    """Give the model its own forward pass and attention back while inside, in evaluation mode."""
    model = unwrap_adapters(policy.model)  # the adapters are in its layers; peft's wrapper adds nothing
    routed = vars(model).pop("forward", None)  # with accelerate's wrapper around it
    attention, defaults, was_training = model.config._attn_implementation, model.generation_config, model.training
    model.set_attn_implementation(policy.attention)
    model.generation_config = GenerationConfig()  # otherwise it adds what our settings leave out, such as penalties
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
        model.generation_config = defaults
        model.set_attn_implementation(attention)
        if routed is not None:
            model.forward = routed


def _generate(model: PreTrainedModel, prompts: Sequence[Ids], settings: GenerationConfig) -> list[Ids]:
    """Return what follows each prompt, all equally long; what comes after an end-of-turn token has no meaning."""
    width = max(map(len, prompts))
    before = np.array([[width - len(prompt)] for prompt in prompts])
    mask = np.arange(width) >= before
    input_ids = np.full(mask.shape, PADDING_ID, np.int64)
    input_ids[mask] = np.concatenate(prompts)
    inputs = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64)}
    device = next(model.parameters()).device
    tensors = {name: torch.from_numpy(values).to(device) for name, values in inputs.items()}
    sequences = model.generate(**tensors, generation_config=settings)
    return list(sequences[:, width:].to(torch.int32).cpu().numpy())


def _until_end(ids: Ids, ends: Sequence[int]) -> Ids:
    """Return the ids up to the first end-of-turn token, itself included."""
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: found[0] + 1] if len(found) else ids
