"""Sample from policies, and measure what they have become: true reward, and KL to the reference.

The demo and the quality benchmark use it.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from pipeline.toy.policies import Base, Ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES_PER_BATCH = 1024
Watch = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor], None]
"""Given which responses go on, `[n]`, the token before the next one, `[n]`, the logits of each model, `[n, V]`, and which of
these responses have ended already, `[n]`."""


class NextRewards(Protocol):
    """The true rewards of whatever token comes next."""

    def __call__(self, prompts: Tensor, previous: Tensor, /) -> Tensor:
        """Return `[V]`, or `[n, V]` for n positions; `prompts` says whose each is, `previous` which token came before."""
        ...


class Point(NamedTuple):
    """A policy at one step of its training: means over sampled responses, and the standard error of the reward."""

    step: int
    reward: float
    kl: float
    reward_se: float
    num_tokens: float


def sample(
    base: Base, model: "PreTrainedModel", prompts: Sequence[Ids], num_new: int, *, seed: int, temperature: float = 1.0
) -> list[Ids]:
    """Sample a response of at most `num_new` tokens to each prompt, without top-k or top-p.

    A token has the probability softmax(logits / temperature).
    """
    return _sample(base, [model], prompts, num_new, seed, temperature, lambda *_: None)


def measure_each(
    base: Base,
    model: "PreTrainedModel",
    prompts: Sequence[Ids],
    next_rewards: NextRewards,
    *,
    num_new: int,
    seed: int = 7,
) -> tuple[list[Ids], np.ndarray, np.ndarray]:
    """Sample a response to each prompt, and return two sums over its positions, `[S]` each, given what was sampled before.

    The exact KL(policy || reference) of the next token, in nats, and its expected true reward: the mean over the vocabulary, so
    both are unbiased and far less noisy than log-ratios and rewards of the tokens that were sampled.
    """
    sums = torch.zeros(2, len(prompts), device=base.device)

    def look(whose: Tensor, previous: Tensor, logits: Sequence[Tensor], has_ended: Tensor) -> None:
        logps, ref_logps = (each.log_softmax(-1) for each in logits)
        probs, gains = logps.exp(), next_rewards(whose, previous)
        kls = (probs * (logps - ref_logps)).sum(-1)
        rewards = probs @ gains if gains.ndim == 1 else (probs * gains).sum(-1)
        sums.index_add_(1, whose, torch.stack([kls, rewards]).masked_fill(has_ended, 0))

    responses = _sample(base, [model, base.plain], prompts, num_new, seed, 1.0, look)
    kls, rewards = sums.cpu().numpy()
    return responses, kls, rewards


def measure(
    base: Base,
    model: "PreTrainedModel",
    prompts: Sequence[Ids],
    next_rewards: NextRewards,
    *,
    num_new: int,
    step: int = 0,
) -> Point:
    """Sample one response to every prompt from a model with the forward pass of transformers, and measure it."""
    responses, kls, rewards = measure_each(base, model, prompts, next_rewards, num_new=num_new)
    error = float(rewards.std() / math.sqrt(len(rewards)))
    return Point(
        step, float(rewards.mean()), float(kls.mean()), error, float(np.mean([len(each) for each in responses]))
    )


@torch.inference_mode()
def _sample(
    base: Base,
    models: Sequence["PreTrainedModel"],
    prompts: Sequence[Ids],
    num_new: int,
    seed: int,
    temperature: float,
    watch: Watch,
) -> list[Ids]:
    """Sample from the first model, and let the others read the same."""
    generator = torch.Generator(base.device).manual_seed(seed)
    ends = torch.tensor(base.end_ids, device=base.device)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    responses: dict[int, Ids] = {}
    for begin in range(0, len(order), SAMPLES_PER_BATCH):
        part = order[begin : begin + SAMPLES_PER_BATCH].tolist()
        reading = _Reading(base, models, [prompts[i] for i in part], num_new)
        indices = torch.tensor(part, device=base.device)
        rows = torch.arange(len(part), device=base.device)  # of those that are read
        has_ended = torch.zeros(len(part), dtype=torch.bool, device=base.device)
        sampled, lengths = torch.zeros(len(part), num_new, dtype=torch.long, device=base.device), torch.zeros_like(rows)
        previous = torch.tensor([prompts[i][-1] for i in part], device=base.device)
        for place in range(num_new):
            watch(indices[rows], previous, reading.logits, has_ended)
            previous = sampled[rows, place] = _draw(reading.logits[0] / temperature, generator)
            lengths[rows] += ~has_ended
            has_ended = has_ended | torch.isin(previous, ends)
            if place + 1 == num_new or bool(has_ended.all()):
                break
            if has_ended.float().mean() > 0.25:  # fewer copies than after every token
                kept = ~has_ended
                rows, previous, has_ended = rows[kept], previous[kept], has_ended[kept]
                reading.keep(kept.nonzero()[:, 0])
            reading.read(previous)
        whole = sampled.to(torch.int32).cpu().numpy()
        responses |= {
            i: whole[row, :length] for row, (i, length) in enumerate(zip(part, lengths.tolist(), strict=True))
        }
    return [responses[i] for i in range(len(prompts))]


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one index for each row of logits, with the probabilities of their softmax."""
    chances = logits.softmax(-1).cumsum(-1)
    aim = torch.rand(len(logits), 1, generator=generator, device=logits.device) * chances[:, -1:]
    return torch.searchsorted(chances, aim, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


class _Reading:
    """Models that read the same growing sequences; equal prompts are read once.

    Attributes:
        logits: Of the next token, `[n, V]` float32 of each model.
    """

    def __init__(self, base: Base, models: Sequence["PreTrainedModel"], prompts: Sequence[Ids], num_new: int) -> None:
        texts = {prompt.tobytes(): prompt for prompt in prompts}
        row_of = {text: row for row, text in enumerate(texts)}
        width = max(map(len, texts.values()))
        ids, seen = torch.zeros(2, len(texts), width, dtype=torch.long)
        for row, prompt in enumerate(texts.values()):  # padding in front
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            seen[row, width - len(prompt) :] = 1
        self._base, self._models = base, models
        self.logits: list[Tensor] = []
        # A static cache is twice as fast on a CPU; with autocast its keys and values would have different dtypes.
        self._caches: list[Cache] = [
            StaticCache(model.config, width + num_new)
            if base.device.type == "cpu" and base.dtype == "float32"
            else DynamicCache(config=model.config)
            for model in models
        ]
        self._seen, self._positions = seen.to(base.device), (seen.cumsum(1) - 1).clamp(min=0).to(base.device)
        self._forward(ids.to(base.device))
        self.keep(torch.tensor([row_of[prompt.tobytes()] for prompt in prompts], device=base.device))

    def read(self, new: Tensor) -> None:
        """Read one more token of each sequence, `[n]`."""
        self._positions = self._positions[:, -1:] + 1
        self._seen = torch.cat([self._seen, torch.ones_like(self._seen[:, :1])], 1)
        self._forward(new[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences alone; a row may be there several times."""
        for cache in self._caches:
            cache.reorder_cache(rows)
        self._seen, self._positions = self._seen[rows], self._positions[rows]
        self.logits = [each[rows] for each in self.logits]

    def _forward(self, ids: Tensor) -> None:
        with self._base.autocast():
            self.logits = [
                model(
                    input_ids=ids,
                    attention_mask=self._seen,
                    position_ids=self._positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
                for model, cache in zip(self._models, self._caches, strict=True)
            ]
