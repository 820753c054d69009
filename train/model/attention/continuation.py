"""Responses whose prompts are computed once, without gradients. Called by `attribution.py`, for packed micro-batches.

A prompt does not depend on what comes after it, so gradients with respect to response tokens never pass through a prompt. First
the prompts alone go through the decoder, and the keys and values of every layer are kept; then the responses alone, which
attend to them. So a prompt costs no backward pass and no stored activations. Training cannot do this: prompt tokens contribute
to the gradients of its parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from train.model.attention.groups import MAX_GROUP_SCORES, KeysValues, RowGroup, Scoring
from train.model.attention.layout import NUM_BRANCHES, Layout, to_device
from train.model.attention.packed import Packing, way_of
from train.model.attention.segments import Segments
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
    """B neighbouring responses in the row of responses.

    Args:
        prompts: `[B, P]`, where the tokens of their prompts are in the row of prompts; anything after a prompt's end.
        num_before: `[B]`, the lengths of the prompts.
    """

    prompts: Tensor
    num_before: Tensor


@dataclass
class Continuation(Packing):
    """Responses in one row; each continues its prompt in `prompts`.

    Args:
        group_sizes: How many neighbouring responses are computed together where attention runs in groups.
    """

    prompts: KeptPrompts = field(kw_only=True)
    group_sizes: Sequence[int] = field(kw_only=True)
    num_attended: int = 0

    @cached_property
    def groups(self) -> Sequence[ResponseGroup]:
        """The responses in the order of the row."""
        run_before, num_before = self.layout.before(self.prompts.layout)
        groups: list[ResponseGroup] = []
        begin = 0
        for runs in np.split(np.arange(len(num_before)), np.cumsum(self.group_sizes)[:-1]):
            plain = RowGroup.of(self.layout.lengths[runs], begin, self.device)
            steps = np.arange(num_before[runs].max())
            known = np.minimum(steps, num_before[runs][:, None] - 1)  # anything does after a prompt's end
            places = self.prompts.layout.begins[run_before[runs]][:, None] + known
            before = (to_device(array, self.device) for array in (places, num_before[runs]))
            groups.append(ResponseGroup(plain.begin, plain.num_tokens, plain.places, plain.is_token, *before))
            begin += plain.num_tokens
        return groups

    @cached_property
    def segments(self) -> Segments:
        """The row as flash attention takes it, with the prompts in front of the responses."""
        return Segments.of(self.layout, self.device, self.prompts.layout)

    def mask(self, group: RowGroup, window: int | None) -> Tensor:
        """Return whether a response token sees a key, the prompt's first, `[B, 1, R, P + R]`. Padding sees something too."""
        assert isinstance(group, ResponseGroup)
        steps = torch.arange(group.places.shape[1], device=self.device)
        before = torch.arange(group.prompts.shape[1], device=self.device)
        positions = group.num_before[:, None] + steps
        key_positions = torch.cat([before.expand(len(positions), -1), positions], dim=1)
        distance = positions[:, :, None] - key_positions[:, None, :]
        sees = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        sees[:, :, : len(before)] &= (before < group.num_before[:, None])[:, None]
        return sees[:, None]

    def attend(
        self,
        module: nn.Module,  # noqa: ARG002 - what is kept is known by its order
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Return the attention output of the response tokens, `[1, N, H, D]`."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        kept = self.prompts.kept[self.num_attended]
        self.num_attended += 1
        if way_of(query, value, scoring) == "segments":
            return self.segments.attend(query, key, value, scale=scoring.scaling, window=scoring.window, before=kept)
        kept_key, kept_value = (tensor[0].transpose(0, 1) for tensor in kept)
        befores = (
            (kept_key[group.prompts].transpose(1, 2), kept_value[group.prompts].transpose(1, 2))
            for group in self.groups
        )
        return self.attend_in_groups((query, key, value), befores, scoring)


@dataclass(frozen=True)
class SplitBatch:
    """A packed micro-batch as two rows, prompts and responses.

    Args:
        prompts: `input_ids` and `position_ids` of the prompts, `[1, N]`, and their `layout`.
        responses: A micro-batch of the responses alone, `[S, T]`; the first token of each, which a prompt predicts, is not in
            its `completion_mask`.
        group_sizes: How many neighbouring responses of the row are best computed together.
        prompt_places: `[N]`, where each token of the row of prompts is in the whole row.
        own_places: `[N]`, where each token of the row of responses is in the whole row.
    """

    prompts: Batch
    responses: Batch
    group_sizes: Sequence[int]
    prompt_places: Tensor
    own_places: Tensor

    @classmethod
    def of(cls, batch: Batch) -> "SplitBatch":
        """Split a packed micro-batch that was collated with `share_beginnings=False`."""
        layout: Layout = batch["layout"]
        device = batch["input_ids"].device
        own = np.flatnonzero(~layout.is_shared)
        own = own[
            np.lexsort((layout.pairs[own], layout.branch_ids[own] % NUM_BRANCHES))
        ]  # as the sequences of the batch
        num_own, num_before = layout.lengths[own], layout.before(layout)[1][own]
        parts = _cut(num_own.tolist(), num_before.tolist())
        order = np.concatenate(parts)
        shared = np.flatnonzero(layout.is_shared)

        def row_of(runs: np.ndarray) -> tuple[Tensor, Batch]:
            places = to_device(layout.places(runs), device)
            fields: Batch = {name: batch[name][0, places][None] for name in ("input_ids", "position_ids")}
            return places, fields | {"layout": layout.take(runs)}

        prompt_places, prompts = row_of(shared)
        own_places, responses = row_of(own[order])
        begins = np.empty_like(num_own)
        begins[order] = num_own[order].cumsum() - num_own[order]
        steps = np.arange(num_own.max())
        is_own = steps < num_own[:, None]
        mask = (steps > 0) & is_own
        arrays = {
            "places": np.where(is_own, begins[:, None] + steps, 0),
            "completion_mask": mask,
            "scored": np.flatnonzero(mask),
        }
        responses |= {name: to_device(array, device) for name, array in arrays.items()}
        responses["pair_weights"] = batch["pair_weights"]
        return cls(prompts, responses, [len(part) for part in parts], prompt_places, own_places)


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
