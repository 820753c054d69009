"""Put pairs into one micro-batch: packed, or a padded sequence per response.

Packed, all pairs are in one row without padding: the prompt once (with the tokens that all responses begin with), then the
rest of the chosen response, of the rejected one and of the anchor, positions continued from the prompt; its `layout` says
who sees whom. Padded, for models that cannot be packed, every response has its prompt in front of it. Either way
`places` says where token t of each sequence is, and all values per token are `[2 B, T]`: chosen sequences, then rejected;
with anchors `[3 B, T]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.dataset import Pair, StoredResponse
from train.loss.terms import ResponseLogps
from train.model.attention.layout import ANCHOR, CHOSEN, NUM_BRANCHES, REJECTED, Layout, to_device
from train.model.logps import ModelInputs, TokenTerms
from weights_store.schemas import SIDES

Batch = dict[str, Any]
"""What `PairCollator` makes: tensors on a device, and what the host has to know: numbers, and a `Layout` if packed."""
PADDING_ID = 0  # any id does: no token sees what comes after it

Ids = NDArray[np.int32]


def model_inputs(batch: Batch) -> ModelInputs:
    """Return the part of a batch that `per_token_logps` takes."""
    return cast("ModelInputs", {name: batch[name] for name in ModelInputs.__annotations__ if name in batch})


@dataclass(frozen=True)
class PairCollator:
    """Collate B pairs.

    Keys: those of `ModelInputs`; `completion_mask` (bool, True on response tokens), `token_weights` and `ref_logps` (float32,
    aligned to their token, 0 elsewhere), `[2 B, T]`; `pair_weights` (float32) `[B]`; and if the pairs have them `chosen_scores`
    and `rejected_scores` `[B]`. `num_counted` pairs, which come first, are no fillers; they have `num_responses` responses with
    tokens, and `num_chosen_tokens` chosen response tokens. With anchors, `num_kls` leaves out those of anchors, of which no
    loss reads a divergence.

    Args:
        packed: Otherwise padded.
        with_rejected: False leaves the rejected responses out (B sequences), for losses that do not need them.
        with_anchors: Add the anchor of every pair (3 B sequences).
        share_beginnings: If packed, compute the tokens that all responses of a pair begin with once; False shares the prompt
            alone, so that every response token has its own embedding.
    """

    packed: bool = True
    with_rejected: bool = True
    with_anchors: bool = False
    share_beginnings: bool = True

    def __call__(self, pairs: Sequence[Pair], device: torch.device | str = "cpu") -> Batch:
        """Return the micro-batch of `pairs`, of which fillers come last, on a device."""
        responses = list(chain(*zip(*(self._responses(pair).values() for pair in pairs), strict=True)))
        prompts = [pair.prompt_ids for pair in pairs] * (len(responses) // len(pairs))
        layout, arrays = self._pack(pairs) if self.packed else (None, _pad(prompts, responses))
        arrays |= _align(prompts, responses)
        arrays["pair_weights"] = np.array([pair.pair_weight for pair in pairs], np.float32)
        counted = [pair for pair in pairs if not pair.is_filler]
        assert not any(pair.is_filler for pair in pairs[: len(counted)]), "fillers come last"
        arrays["scored"] = np.flatnonzero(arrays["completion_mask"])
        numbers = {
            "num_counted": len(counted),
            "num_chosen_tokens": sum(len(pair.chosen.ids) for pair in counted),
            "num_responses": sum(bool(len(side.ids)) for pair in counted for side in (pair.chosen, pair.rejected)),
        }
        if self.with_anchors:
            numbers["num_kls"] = sum(len(response.ids) for response in responses[: -len(pairs)])
        if pairs[0].chosen_score is not None:
            for side in SIDES:
                arrays[f"{side}_scores"] = np.array([getattr(pair, f"{side}_score") for pair in pairs], np.float32)
        batch: Batch = {name: to_device(array, device) for name, array in arrays.items()} | numbers
        return batch if layout is None else batch | {"layout": layout}

    def num_tokens(self, pair: Pair) -> int:
        """Return the tokens that a pair adds to a micro-batch (before padding; as if no beginning were shared)."""
        responses = self._responses(pair).values()
        num_prompts = 1 if self.packed else len(responses)
        return num_prompts * len(pair.prompt_ids) + sum(len(response.ids) for response in responses)

    def split_sides(
        self, batch: Batch, terms: TokenTerms
    ) -> tuple[ResponseLogps, ResponseLogps | None, ResponseLogps | None]:
        """Return chosen, rejected and anchor, `[B, T]` each, of a batch that this collator made; None for what is left out."""
        num_pairs = len(batch["pair_weights"])
        fields = (terms.logps, batch["completion_mask"], batch["ref_logps"], batch["token_weights"], terms.kls)

        def side(index: int) -> ResponseLogps:
            rows = slice(index * num_pairs, (index + 1) * num_pairs)
            return ResponseLogps(*(field if field is None else field[rows] for field in fields))  # type: ignore[arg-type]

        rejected = side(1) if self.with_rejected else None
        return side(0), rejected, side(1 + self.with_rejected) if self.with_anchors else None

    def _responses(self, pair: Pair) -> dict[int, StoredResponse]:
        """Return the responses of a pair that go into the batch, by branch."""
        responses = {CHOSEN: pair.chosen}
        if self.with_rejected:
            responses[REJECTED] = pair.rejected
        if self.with_anchors:
            assert pair.anchor is not None, "dataset.py gives them on request"
            responses[ANCHOR] = pair.anchor
        return responses

    def _pack(self, pairs: Sequence[Pair]) -> tuple[Layout, dict[str, NDArray]]:
        ids: list[Ids] = []
        runs: list[tuple[int, int]] = []  # branch id and number of tokens
        places: list[list[NDArray]] = []  # of each pair, of each response
        end = 0
        for pair_idx, pair in enumerate(pairs):
            responses = self._responses(pair)
            common = _count_common([response.ids for response in responses.values()]) if self.share_beginnings else 0
            num_shared = len(pair.prompt_ids) + common
            shared = np.arange(end, end + num_shared)
            ids += [pair.prompt_ids, pair.chosen.ids[:common]]
            runs.append((NUM_BRANCHES * pair_idx, num_shared))
            places.append([])
            end += num_shared
            for branch, response in responses.items():
                own = response.ids[common:]
                ids.append(own)
                runs.append((NUM_BRANCHES * pair_idx + branch, len(own)))
                places[-1].append(np.concatenate([shared, np.arange(end, end + len(own))]))
                end += len(own)
        layout = Layout.of(runs)
        arrays = {
            "input_ids": np.concatenate(ids).astype(np.int64)[None],
            "position_ids": layout.positions()[None],
            "places": _stack(list(chain(*zip(*places, strict=True)))),
        }
        return layout, arrays


def _count_common(responses: Sequence[Ids]) -> int:
    """Return how many ids all responses begin with."""
    length = min(map(len, responses))
    differing = np.flatnonzero(np.any([ids[:length] != responses[0][:length] for ids in responses], axis=0))
    return int(differing[0]) if len(differing) else length


def _pad(prompts: Sequence[Ids], responses: Sequence[StoredResponse]) -> dict[str, NDArray]:
    input_ids = _stack([np.concatenate([p, r.ids]) for p, r in zip(prompts, responses, strict=True)], PADDING_ID)
    return {"input_ids": input_ids, "places": np.arange(input_ids.size).reshape(input_ids.shape)}


def _stack(rows: Sequence[NDArray], padding: int = 0) -> NDArray[np.int64]:
    stacked = np.full((len(rows), max(map(len, rows))), padding, np.int64)
    for row, values in zip(stacked, rows, strict=True):
        row[: len(values)] = values
    return stacked


def _align(prompts: Sequence[Ids], responses: Sequence[StoredResponse]) -> dict[str, NDArray]:
    """Align the stored values to their tokens, `[2 B, T]` (and `[2 B, T, K]`)."""
    begins = np.array([[len(prompt_ids)] for prompt_ids in prompts])
    ends = begins + [[len(response.ids)] for response in responses]
    steps = np.arange(ends.max())
    mask = (begins <= steps) & (steps < ends)
    aligned = {"completion_mask": mask}
    for name in ("token_weights", "ref_logps", "ref_top_ids", "ref_top_logps"):
        known = [values for response in responses if (values := getattr(response, name)) is not None]
        if known:  # anchors, which come last, have no top k
            dtype = np.int64 if name == "ref_top_ids" else np.float32
            aligned[name] = np.zeros((*mask.shape, *known[0].shape[1:]), dtype)
            aligned[name][: len(known)][mask[: len(known)]] = np.concatenate(known)
    return aligned
