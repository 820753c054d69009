"""Train policies with the project's own trainer, on pairs and weights in memory.

The demo and the quality benchmark use it. The loss, its gradient, the order of pairs and the optimizer are those of
`tokenweights train`. What policies have become is measured in `sampling.py`.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from pipeline.weighing.estimators import ESTIMATORS, SideScores
from train.config import ModelConfig, TrainConfig
from train.data.stored_pairs import Pair
from train.job.trainer import PairTrainer
from train.model.packing import confirm_layout
from train.model.policy import Policy, load_policy, load_reference, switch_off_noise
from weights_store.schemas import Side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = np.ndarray
"""Token ids of a prompt or a response, `[T]` int32."""
TOKENS_PER_BATCH = 1 << 14
POSITIONS_PER_PIECE = 4096
"""So many have their logits in memory at once."""


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


# --- a forward pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Responses of similar length behind their prompts, padded at the end; N tokens of the responses in all."""

    base: Base
    indices: list[int]
    """Which of all responses these are."""
    ids: Tensor
    """`[B, T]`."""
    predicts: Tensor
    """Which positions predict a token of a response, `[B, T]` bool."""

    def states(self, model: "PreTrainedModel", layer: int | None = None) -> Tensor:
        """Return the states that predict each response token, `[N, H]`: the last ones, or those after a layer."""
        with self.base.autocast():
            output = model.base_model(input_ids=self.ids, output_hidden_states=layer is not None)
        return (output.last_hidden_state if layer is None else output.hidden_states[layer])[self.predicts]

    def logps(self, model: "PreTrainedModel") -> Tensor:
        """Return the log-probs of the response tokens, `[N]` float32."""
        pieces = (each.split(POSITIONS_PER_PIECE) for each in (self.states(model), self.ids.roll(-1, 1)[self.predicts]))
        with self.base.autocast():
            found = [
                model.lm_head(state).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
                for state, target in zip(*pieces, strict=True)
            ]
        return torch.cat(found)

    def by_response(self, values: Tensor) -> dict[int, np.ndarray]:
        """Return `[N, …]` values as one array for each response, by its index."""
        ends = self.predicts.sum(1).cumsum(0)[:-1].tolist()
        return dict(zip(self.indices, np.split(values.float().cpu().numpy(), ends), strict=True))


def batches(base: Base, prompts: Sequence[Ids], responses: Sequence[Ids]) -> Iterator[Batch]:
    """Yield every response once, the shortest sequences first; a batch has at most `TOKENS_PER_BATCH` ids with padding."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    begin = 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end + 1 - begin) * lengths[order[end]] <= TOKENS_PER_BATCH:
            end += 1
        part = order[begin:end]
        ids = torch.zeros(len(part), lengths[part[-1]], dtype=torch.long)
        predicts = torch.zeros(ids.shape, dtype=torch.bool)
        for row, i in enumerate(part):
            ids[row, : lengths[i]] = torch.from_numpy(np.concatenate([prompts[i], responses[i]]).astype(np.int64))
            predicts[row, len(prompts[i]) - 1 : lengths[i] - 1] = True
        yield Batch(base, part, ids.to(base.device), predicts.to(base.device))
        begin = end


# --- training ----------------------------------------------------------------------------------------------------------


def weights_of_side(
    side: Side, scores: Sequence[np.ndarray], estimator: str = "tis", **settings: object
) -> list[np.ndarray]:
    """Return the token weights, `[T]` each, that an estimator makes of the token scores of one side's responses.

    The scores stand for log pi+ - log pi-, in nats; settings that are not given are the paper's.
    """
    lengths, flat = np.array([len(each) for each in scores]), np.concatenate(scores).astype(np.float32)
    known = SideScores(side, lengths, positive_logps=flat, negative_logps=np.zeros_like(flat))
    weights = ESTIMATORS[estimator].estimate(known, **settings).token_weights
    return np.split(weights, np.cumsum(lengths)[:-1])


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
