"""Put pairs into one micro-batch: packed, or two padded sequences per pair.

Packed, all pairs lie behind each other in one row without padding: the prompt once (with what both responses begin with), then
the rest of the chosen and of the rejected response, positions continued from the prompt. Who sees whom is `attention.py`.
Padded, every response has its prompt in front of it, for models that cannot be packed. Either way `places` says where token
t of each sequence is, and all values per token are `[2 B, T]`, chosen sequences first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.dataset import Pair, StoredResponse
from train.logps import TokenTerms
from train.losses import ResponseLogps

Batch = dict[str, Tensor]
MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "places",
    "completion_mask",
    "branch_ids",
    "attention_mask",
    "ref_top_ids",
    "ref_top_logps",
)
PADDING_ID = 0  # any id does: padding is told by the masks, never by its id

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class PairCollator:
    """Collate B pairs.

    Keys: `input_ids` and `position_ids` (int64, packed `[1, N]` or padded `[2 B, T]`), with `branch_ids` when packed and
    `attention_mask` when padded; `places` (int64), `completion_mask` (bool, True on response tokens), `token_weights` and
    `ref_logps` (float32, aligned to their token, 0 elsewhere), `[2 B, T]`; `pair_weights` (float32) and `counts` (bool, False
    for fillers), `[B]`. Where the pairs have them `ref_top_ids`, `ref_top_logps` `[2 B, T, K]`, `chosen_scores` and
    `rejected_scores` `[B]`.

    Args:
        packed: Otherwise padded.
        with_rejected: False leaves the rejected responses out (B sequences), for losses that do not need them.
    """

    packed: bool = True
    with_rejected: bool = True

    def __call__(self, pairs: Sequence[Pair]) -> Batch:
        """Return the micro-batch of `pairs`."""
        responses = [pair.chosen for pair in pairs] + ([pair.rejected for pair in pairs] if self.with_rejected else [])
        prompts = [pair.prompt_ids for pair in pairs] * (2 if self.with_rejected else 1)
        arrays = self._pack(pairs) if self.packed else _pad(prompts, responses)
        arrays |= _align(prompts, responses)
        arrays["pair_weights"] = np.array([pair.pair_weight for pair in pairs], np.float32)
        arrays["counts"] = np.array([not pair.is_filler for pair in pairs])
        if pairs[0].chosen_score is not None:
            for side in ("chosen", "rejected"):
                arrays[f"{side}_scores"] = np.array([getattr(pair, f"{side}_score") for pair in pairs], np.float32)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def num_tokens(self, pair: Pair) -> int:
        """Return what a pair adds to a micro-batch (padded: before padding)."""
        num_tokens = len(pair.prompt_ids) + len(pair.chosen.ids)
        if not self.with_rejected:
            return num_tokens
        return num_tokens + len(pair.rejected.ids) + (0 if self.packed else len(pair.prompt_ids))

    def num_pairs(self, batch: Batch) -> int:
        """Return B of a micro-batch."""
        return len(batch["pair_weights"])

    def split_sides(self, batch: Batch, terms: TokenTerms) -> tuple[ResponseLogps, ResponseLogps | None]:
        """Return chosen and rejected, `[B, T]` each, of a batch that this collator made; rejected may be left out."""
        num_pairs = self.num_pairs(batch)
        fields = (terms.logps, batch["completion_mask"], batch["ref_logps"], batch["token_weights"], terms.kls)
        chosen = ResponseLogps(*(field if field is None else field[:num_pairs] for field in fields))  # type: ignore[arg-type]
        rejected = ResponseLogps(*(field if field is None else field[num_pairs:] for field in fields))  # type: ignore[arg-type]
        return chosen, rejected if self.with_rejected else None

    def _pack(self, pairs: Sequence[Pair]) -> dict[str, NDArray]:
        ids: list[Ids] = []
        branches: list[tuple[int, int]] = []  # branch id and number of tokens
        positions: list[NDArray] = []
        chosen_places: list[NDArray] = []
        rejected_places: list[NDArray] = []
        begin = 0
        for pair_idx, pair in enumerate(pairs):
            length = len(pair.prompt_ids) + len(pair.chosen.ids)
            places = np.arange(begin, begin + length)
            ids += [pair.prompt_ids, pair.chosen.ids]
            positions.append(places - begin)
            chosen_places.append(places)
            begin += length
            if not self.with_rejected:
                branches.append((3 * pair_idx, length))
                continue
            common = _count_common(pair.chosen.ids, pair.rejected.ids)
            shared, own = len(pair.prompt_ids) + common, len(pair.rejected.ids) - common
            ids.append(pair.rejected.ids[common:])
            positions.append(np.arange(shared, shared + own))
            rejected_places.append(np.concatenate([places[:shared], np.arange(begin, begin + own)]))
            branches += [(3 * pair_idx, shared), (3 * pair_idx + 1, length - shared), (3 * pair_idx + 2, own)]
            begin += own
        return {
            "input_ids": np.concatenate(ids).astype(np.int64)[None],
            "position_ids": np.concatenate(positions).astype(np.int64)[None],
            "branch_ids": np.repeat(*(np.array(column) for column in zip(*branches, strict=True)))[None],
            "places": _stack(chosen_places + rejected_places),
        }


def _count_common(first: Ids, second: Ids) -> int:
    """Return how many ids two responses share at their beginning."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def _pad(prompts: Sequence[Ids], responses: Sequence[StoredResponse]) -> dict[str, NDArray]:
    sequences = [np.concatenate([p, r.ids]) for p, r in zip(prompts, responses, strict=True)]
    input_ids = _stack(sequences, padding=PADDING_ID)
    lengths = np.array([len(sequence) for sequence in sequences])
    steps = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    return {
        "input_ids": input_ids,
        "position_ids": steps.copy(),
        "attention_mask": (steps < lengths[:, None]).astype(np.int64),
        "places": np.arange(input_ids.size).reshape(input_ids.shape),
    }


def _stack(rows: Sequence[NDArray], padding: int = 0) -> NDArray[np.int64]:
    stacked = np.full((len(rows), max(map(len, rows))), padding, np.int64)
    for row, values in zip(stacked, rows, strict=True):
        row[: len(values)] = values
    return stacked


def _align(prompts: Sequence[Ids], responses: Sequence[StoredResponse]) -> dict[str, NDArray]:
    """Lay what is known per response token under its token, `[2 B, T]` (and `[2 B, T, K]`)."""
    shape = (len(responses), max(len(p) + len(r.ids) for p, r in zip(prompts, responses, strict=True)))
    aligned = {
        "completion_mask": np.zeros(shape, np.bool_),
        "token_weights": np.zeros(shape, np.float32),
        "ref_logps": np.zeros(shape, np.float32),
    }
    top_ids = responses[0].ref_top_ids
    if top_ids is not None:
        aligned["ref_top_ids"] = np.zeros((*shape, top_ids.shape[1]), np.int64)
        aligned["ref_top_logps"] = np.zeros((*shape, top_ids.shape[1]), np.float32)
    for row, (prompt_ids, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens = slice(len(prompt_ids), len(prompt_ids) + len(response.ids))
        aligned["completion_mask"][row, tokens] = True
        for name in aligned.keys() - {"completion_mask"}:
            aligned[name][row, tokens] = getattr(response, name)
    return aligned
