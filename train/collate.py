"""Put pairs into one padded batch: two sequences per pair, prompt + chosen and prompt + rejected.

The first form: the prompt is computed twice and short rows are padded. Packing comes behind the same function.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.dataset import Pair, StoredResponse
from train.losses import ResponseLogps

Batch = dict[str, Tensor]
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "completion_mask")
PADDING_ID = 0  # any id does: padding is told by the masks, never by its id


@dataclass(frozen=True)
class PairCollator:
    """Collate B pairs into tensors `[N, T]`, right-padded: rows 0..B-1 chosen, rows B..2B-1 rejected.

    Keys: `input_ids`, `attention_mask`, `position_ids` (int64), `completion_mask` (bool, True on response tokens),
    `token_weights` and `ref_logps` (float32, aligned to their token, 0 elsewhere).

    Args:
        with_rejected: False leaves the rejected rows out (N = B), for losses that do not need them.
    """

    with_rejected: bool = True

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        """Return the batch of `pairs`."""
        responses = [pair.chosen for pair in pairs] + ([pair.rejected for pair in pairs] if self.with_rejected else [])
        prompts = [pair.prompt_ids for pair in pairs] * (2 if self.with_rejected else 1)
        return _pad(prompts, responses)

    def num_pairs(self, batch: Batch) -> int:
        """Return B of a batch that this collator made."""
        return len(batch["input_ids"]) // (2 if self.with_rejected else 1)

    def split_sides(self, batch: Batch, per_token_logps: Tensor) -> tuple[ResponseLogps, ResponseLogps | None]:
        """Return chosen and rejected, `[B, T]` each, of a batch that this collator made; rejected may be left out."""
        num_pairs = self.num_pairs(batch)
        fields = (per_token_logps, batch["completion_mask"], batch["ref_logps"], batch["token_weights"])
        chosen = ResponseLogps(*(field[:num_pairs] for field in fields))
        rejected = ResponseLogps(*(field[num_pairs:] for field in fields))
        return chosen, rejected if self.with_rejected else None


def _pad(prompts: list[NDArray[np.int32]], responses: list[StoredResponse]) -> Batch:
    num_rows, length = len(prompts), max(len(p) + len(r.ids) for p, r in zip(prompts, responses, strict=True))
    input_ids = np.full((num_rows, length), PADDING_ID, np.int64)
    attention_mask = np.zeros((num_rows, length), np.int64)
    completion_mask = np.zeros((num_rows, length), np.bool_)
    token_weights = np.zeros((num_rows, length), np.float32)
    ref_logps = np.zeros((num_rows, length), np.float32)
    for row, (prompt_ids, response) in enumerate(zip(prompts, responses, strict=True)):
        begin, end = len(prompt_ids), len(prompt_ids) + len(response.ids)
        input_ids[row, :begin], input_ids[row, begin:end] = prompt_ids, response.ids
        attention_mask[row, :end] = 1
        completion_mask[row, begin:end] = True
        token_weights[row, begin:end], ref_logps[row, begin:end] = response.token_weights, response.ref_logps
    arrays = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": np.broadcast_to(np.arange(length), (num_rows, length)).copy(),
        "completion_mask": completion_mask,
        "token_weights": token_weights,
        "ref_logps": ref_logps,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
