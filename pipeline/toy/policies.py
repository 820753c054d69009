"""Train policies with the project's own trainer, and measure what they have become: true reward, and KL to the reference.

The demo and the quality benchmark use it. Pairs and weights are held in memory; the loss, its gradient, the order of pairs and
the optimizer are those of `tokenweights train`.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from transformers.cache_utils import DynamicCache, StaticCache

from train.config import ModelConfig, TrainConfig
from train.data.stored_pairs import Pair
from train.job.trainer import PairTrainer
from train.model.packing import confirm_layout
from train.model.policy import Policy, load_policy, load_reference, switch_off_noise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = np.ndarray
"""Token ids of a prompt or a response, `[T]` int32."""
SAMPLES_PER_BATCH = 2048
TOKENS_PER_BATCH = 1 << 14


class NextRewards(Protocol):
    """The true rewards of whatever token comes next."""

    def __call__(self, prompts: Tensor, previous: Tensor, /) -> Tensor:
        """Return `[V]`, or `[n, V]` for n positions; `prompts` says whose each is, `previous` which token came before."""
        ...


class _Source(NamedTuple):
    """What trainings that refresh weights read of a dataset."""

    name: str
    metadata: Mapping[str, object]


class PairsInMemory:
    """Pairs in the form in which the trainer reads them from a store, with the recipe that it would record."""

    def __init__(self, pairs: Sequence[Pair], recipe: Mapping[str, object] | None = None) -> None:
        self.pairs = list(pairs)
        self.source = _Source("pairs in memory", {"recipe": recipe or {}})
        self.group_sizes = [[len(self.pairs)]]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


class Base:
    """The starting model of a world, loaded once: the reference, and what every policy starts from."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "float32") -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.config = ModelConfig(path=str(folder), dtype=dtype)
        policy = load_policy(folder, self.config)
        policy.model.to(device)
        policy.model.train()
        with self.autocast():
            not_packed = confirm_layout(policy.model, policy.attention, policy.not_packed)
        self.policy = Policy(policy.model, not_packed, policy.attention)
        # With attention and forward pass of transformers. In float32: a short training changes less than bfloat16 resolves.
        in_float32 = self.config.model_copy(update={"dtype": "float32"})
        plain = load_reference(folder, in_float32, Policy(policy.model, "its own attention"))
        self.plain = cast("PreTrainedModel", plain.to(device).eval())
        ends = self.plain.generation_config.eos_token_id
        self.end_ids = [*np.atleast_1d(self.plain.config.eos_token_id if ends is None else ends).tolist()]

    def autocast(self) -> torch.autocast:
        """Return the arithmetic of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def fresh_policy(self) -> Policy:
        """Return a policy that starts from the base."""
        model = copy.deepcopy(self.policy.model)
        switch_off_noise(model)  # its `train` would be that of the original
        return Policy(model, self.policy.not_packed, self.policy.attention)

    def plain_copy(self, model: nn.Module) -> "PreTrainedModel":
        """Return a model with the parameters of a policy and the forward pass of transformers."""
        plain = copy.deepcopy(self.plain)
        plain.load_state_dict(model.state_dict())
        return plain


# --- measuring ---------------------------------------------------------------------------------------------------------


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of sequences of similar length, so many that they have at most `TOKENS_PER_BATCH` tokens with padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    begin = 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * lengths[order[end]] <= TOKENS_PER_BATCH:
            end += 1
        yield order[begin:end]
        begin = end


def padded(prompts: Sequence[Ids], responses: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Return ids `[B, T]` with padding at the end, and which positions predict a token of a response, `[B, T]` bool."""
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids, predicts = (
        torch.zeros(len(prompts), width, dtype=torch.long),
        torch.zeros(len(prompts), width, dtype=torch.bool),
    )
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        predicts[row, len(prompt) - 1 : end - 1] = True
    return ids, predicts


@torch.inference_mode()
def sample(
    model: nn.Module,
    prompts: Sequence[Ids],
    num_new: int,
    end_ids: Sequence[int],
    *,
    seed: int,
) -> list[Ids]:
    """Sample a response of at most `num_new` tokens to each prompt, without top-k or top-p."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(list(end_ids), device=device)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    responses: dict[int, Ids] = {}
    for begin in range(0, len(order), SAMPLES_PER_BATCH):
        part = order[begin : begin + SAMPLES_PER_BATCH].tolist()
        width = max(len(prompts[i]) for i in part)
        ids, seen = torch.zeros(2, len(part), width, dtype=torch.long)
        for row, i in enumerate(part):  # padding in front
            ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i].astype(np.int64))
            seen[row, width - len(prompts[i]) :] = 1
        ids, seen = ids.to(device), seen.to(device)
        # A static cache is twice as fast on a CPU; on a GPU with autocast its keys and values have different dtypes.
        cache = (
            DynamicCache(config=model.config) if device.type == "cuda" else StaticCache(model.config, width + num_new)
        )
        positions, alive = (seen.cumsum(1) - 1).clamp(min=0), torch.ones(len(part), dtype=torch.bool, device=device)
        columns, lengths = [], torch.zeros(len(part), dtype=torch.long, device=device)
        for step in range(num_new):
            logits = (
                model(
                    input_ids=ids,
                    attention_mask=seen,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )
            # Gumbel's trick: the largest of logits with noise is a sample.
            noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
            new = (logits + noise).argmax(-1)
            columns.append(new)
            lengths += alive
            alive &= ~torch.isin(new, ends)
            if step % 8 == 7 and not bool(alive.any()):
                break
            ids, positions = new[:, None], positions[:, -1:] + 1
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        sampled = torch.stack(columns, 1).to(torch.int32).cpu().numpy()
        responses |= {
            i: sampled[row, :length] for row, (i, length) in enumerate(zip(part, lengths.tolist(), strict=True))
        }
    return [responses[i] for i in range(len(prompts))]


@torch.inference_mode()
def along(
    base: Base, model: "PreTrainedModel", prompts: Sequence[Ids], responses: Sequence[Ids], next_rewards: NextRewards
) -> tuple[np.ndarray, np.ndarray]:
    """Return two sums over the positions of each response, `[S]`, given what was sampled up to there.

    The exact KL(policy || reference) of the next token, in nats, and its expected true reward: the mean over the vocabulary, so
    both are unbiased and far less noisy than log-ratios and rewards of the tokens that were sampled.
    """
    kls, rewards = np.zeros((2, len(responses)))
    for part in batches([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]):
        ids, predicts = (
            each.to(base.device) for each in padded([prompts[i] for i in part], [responses[i] for i in part])
        )
        with base.autocast():
            states = [each.base_model(input_ids=ids).last_hidden_state[predicts] for each in (model, base.plain)]
        rows = predicts.nonzero()[:, 0]
        whose = torch.tensor(part, device=base.device)[rows]
        of_part: list[list[Tensor]] = [[], []]
        for state, ref_state, prompt, previous in zip(
            *(each.split(4096) for each in (*states, whose, ids[predicts])), strict=True
        ):
            with base.autocast():
                logits, ref_logits = model.lm_head(state), base.plain.lm_head(ref_state)
            logps, ref_logps = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
            probs, gains = logps.exp(), next_rewards(prompt, previous)
            of_part[0].append((probs * (logps - ref_logps)).sum(-1))
            of_part[1].append(probs @ gains if gains.ndim == 1 else (probs * gains).sum(-1))
        for target, values in zip((kls, rewards), of_part, strict=True):
            target[part] = (
                torch.zeros(len(part), device=base.device).index_add_(0, rows, torch.cat(values)).cpu().numpy()
            )
    return kls, rewards


class Point(NamedTuple):
    """A policy at one step of its training: means over sampled responses, and the standard error of the reward."""

    step: int
    reward: float
    kl: float
    reward_se: float
    num_tokens: float


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
    with base.autocast():
        responses = sample(model, prompts, num_new, base.end_ids, seed=7)
    kls, rewards = along(base, model, prompts, responses, next_rewards)
    error = float(rewards.std() / math.sqrt(len(rewards)))
    return Point(
        step, float(rewards.mean()), float(kls.mean()), error, float(np.mean([len(each) for each in responses]))
    )


# --- training ----------------------------------------------------------------------------------------------------------


class Enough(Exception):  # noqa: N818  (a signal, not an error)
    """Raised by a look at a policy: its training may end."""


class Look(TrainerCallback):
    """Calls `look(step, model)` after some steps; `Enough` ends the training."""

    def __init__(self, steps: Sequence[int], look: Callable[[int, nn.Module], None]) -> None:
        self.steps, self.look = frozenset(steps), look

    def on_step_end(self, args: object, state: Any, control: Any, model: nn.Module, **_: object) -> None:  # noqa: ARG002
        """Look, if it is time to."""
        if state.global_step in self.steps:
            try:
                self.look(state.global_step, model)
            except Enough:
                control.should_training_stop = True


def train_policy(
    base: Base,
    pairs: Sequence[Pair],
    loss: Mapping[str, object],
    optim: Mapping[str, object],
    *,
    swap: bool = False,
    steps: Sequence[int] = (),
    look: Callable[[int, nn.Module], None] = lambda step, model: None,
    recipe: Mapping[str, object] | None = None,
) -> nn.Module:
    """Train a policy on pairs with their token weights, look at it after some steps, and return it with our forward pass.

    `recipe` says how a loss that refreshes weights or anchors makes them, see `train/job/refresh.py`.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate({
            "data": {"store": "memory", "weights": "memory/pairs"},
            "model": base.config.model_dump(),
            "loss": dict(loss),
            "optim": {"tokens_per_batch": TOKENS_PER_BATCH, "schedule": "constant", "warmup_share": 0.0, **optim},
            "output": {"folder": folder, "log_every_steps": 1000},
        })  # fmt: skip
        policy = base.fresh_policy()
        reference = base.fresh_policy().model.requires_grad_(False) if config.loss.needs.reference_model else None
        trainer = PairTrainer(
            policy,
            PairsInMemory([pair.swapped() for pair in pairs] if swap else pairs, recipe),  # type: ignore[arg-type]
            config,
            checkpoints=Path(folder),
            reference=reference,
            callbacks=[Look(steps, look)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model)
