"""Responses whose prompts are computed once, without gradients. Called by `attribution.py`, for packed micro-batches.

A prompt does not depend on what comes after it, so gradients with respect to response tokens never pass through a prompt. First
the prompts alone go through the decoder, and the keys and values of every layer are kept; then the responses alone, which
attend to them. So a prompt costs no backward pass and no stored activations. Training cannot do this: prompt tokens contribute
to the gradients of its parameters. Attention runs in groups on CPUs and GPUs; it has not been run on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from train.model.attention import MAX_GROUP_SCORES, NUM_BRANCHES, KeysValues, Packing, RowGroup, Scoring
from train.model.collate import Batch

_FULL = 0.7
"""Responses are computed together as long as at least this share of their scores is not padding."""


class EnoughError(Exception):
    """All keys and values are known; the rest of the last layer is not needed."""


@dataclass
class KeptPrompts(Packing):
    """Prompts in one row; the keys and values of every attention, `[1, H, N, D]`, are kept.

    By their order in a forward pass, not by module: a module may attend twice (DiffLlama), or layers run in loops (HRM).

    Args:
        num_attentions: After so many keys and values, stop; None to compute all layers to their end.
    """

    num_attentions: int | None = field(default=None, kw_only=True)
    kept: list[KeysValues] = field(default_factory=list)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend as in any packed row.

        Raises:
            EnoughError: These were the last keys and values.
        """
        self.kept.append((key.to(value.dtype), value))
        if len(self.kept) == self.num_attentions:
            raise EnoughError
        return super().attend(module, query, key, value, scoring)


@dataclass(frozen=True)
class ResponseGroup(RowGroup):
    """B neighbouring responses in the row of responses, in place of pairs.

    Args:
        prompts: `[B, P]`, where the tokens of their prompts are in the row of prompts; anything after a prompt's end.
        num_before: `[B]`, the lengths of the prompts.
    """

    prompts: Tensor
    num_before: Tensor

    def mask(self, _packing: Packing, window: int | None) -> Tensor:
        """Return whether a response token sees a key, the prompt's first, `[B, 1, R, P + R]`. Padding sees something too."""
        steps = torch.arange(self.places.shape[1], device=self.prompts.device)
        before = torch.arange(self.prompts.shape[1], device=self.prompts.device)
        positions = self.num_before[:, None] + steps
        key_positions = torch.cat([before.expand(len(positions), -1), positions], dim=1)
        distance = positions[:, :, None] - key_positions[:, None, :]
        sees = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        sees[:, :, : len(before)] &= (before < self.num_before[:, None])[:, None]
        return sees[:, None]


@dataclass
class Continuation(Packing):
    """Responses in one row, group after group; each continues its prompt in `prompts`."""

    prompts: KeptPrompts = field(kw_only=True)
    groups: Sequence[ResponseGroup] = field(kw_only=True)
    num_attended: int = 0

    def attend(
        self,
        module: nn.Module,  # noqa: ARG002 - what is kept is known by its order
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Return the attention output of the response tokens, `[1, N, H, D]`."""
        kept_key, kept_value = (kept[0].transpose(0, 1) for kept in self.prompts.kept[self.num_attended])
        self.num_attended += 1
        befores = (
            (kept_key[group.prompts].transpose(1, 2), kept_value[group.prompts].transpose(1, 2))
            for group in self.groups
        )
        return self.attend_in_groups((query, key, value), befores, scoring)


@dataclass(frozen=True)
class SplitBatch:
    """A packed micro-batch as two rows, prompts and responses.

    Args:
        prompts: `input_ids`, `position_ids` and `branch_ids` of the prompts, `[1, N]`.
        responses: A micro-batch of the responses alone, `[S, T]`; the first token of each, which a prompt predicts, is not in
            its `completion_mask`.
        groups: The responses in the order of their row.
        is_prompt: `[N]` bool, where the prompts are in the whole row.
        own_places: `[N]`, where each token of the row of responses is in the whole row.
    """

    prompts: Batch
    responses: Batch
    groups: list[ResponseGroup]
    is_prompt: Tensor
    own_places: Tensor

    @classmethod
    def of(cls, batch: Batch) -> "SplitBatch":
        """Split a packed micro-batch that was collated with `share_beginnings=False`."""
        places, mask = batch["places"], batch["completion_mask"]
        num_before, num_own = (mask.cumsum(1) == 0).sum(1), mask.sum(1)
        parts = _cut(num_own.tolist(), num_before.tolist())
        order = torch.tensor([row for part in parts for row in part], device=places.device)
        own_places = places[order][mask[order]]
        is_prompt = batch["branch_ids"][0] % NUM_BRANCHES == 0
        in_prompts = is_prompt.cumsum(0) - 1
        row_inputs = {name: batch[name][0] for name in ("input_ids", "position_ids", "branch_ids")}
        ends = num_own[order].cumsum(0)
        begins = torch.empty_like(ends).scatter(0, order, ends - num_own[order])
        steps = torch.arange(int(num_own.max()), device=places.device)
        responses = {name: values[own_places][None] for name, values in row_inputs.items()}
        responses["places"] = (begins[:, None] + steps).where(steps < num_own[:, None], 0)
        responses["completion_mask"] = (steps > 0) & (steps < num_own[:, None])
        responses["pair_weights"] = batch["pair_weights"]
        groups, begin = [], 0
        for part in parts:
            rows = torch.tensor(part, device=places.device)
            lengths = num_before[rows]
            groups.append(
                ResponseGroup.of(num_own[rows], begin, in_prompts[places[rows, : int(lengths.max())]], lengths)
            )
            begin += groups[-1].num_tokens
        prompts = {name: values[is_prompt][None] for name, values in row_inputs.items()}
        return cls(prompts, responses, groups, is_prompt, own_places)


def _cut(num_own: list[int], num_before: list[int]) -> list[list[int]]:
    """Return which responses are computed together, by their lengths and those of their prompts."""
    needed = [own * (before + own) for own, before in zip(num_own, num_before, strict=True)]
    groups: list[list[int]] = []
    for row in sorted(range(len(num_own)), key=lambda row: (num_own[row], num_before[row]), reverse=True):
        if groups:
            group = [*groups[-1], row]
            widest = num_own[group[0]]
            laid_out = len(group) * widest * (max(num_before[member] for member in group) + widest)
            if laid_out <= MAX_GROUP_SCORES and sum(needed[member] for member in group) >= _FULL * laid_out:
                groups[-1] = group
                continue
        groups.append([row])
    return groups
