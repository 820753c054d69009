"""Token weights and anchors made from the policy during training (TI-DPO), in place of the stored ones.

Before every window of `loss.refresh_steps` steps, the pairs of the window get hybrid weights from the policy's gradients
(`attribution.py`), anchors that the policy sampled (`generation.py`), or both. Both are data: no gradient flows through how
they were made. Weights are computed and anchors are sampled with the settings that the dataset recorded. Not here: when a
window begins (`step_reader.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from train.config import FIRST_TOKENS, TrainConfig
from train.data.dataset import Pair, PairDataset, StoredResponse, WeightSource, sample_pairs
from train.model.attribution import AttributionTarget, attribute_tokens
from train.model.collate import Batch, PairCollator, model_inputs
from train.model.generation import sample_responses
from train.model.hybrid import hybrid_weights
from train.model.logps import adapters_off, per_token_logps
from train.model.policy import Policy
from train.model.sampling import AnchorSampling, closing_ids
from train.model.token_budget import cut_by_tokens
from weights_store.errors import InputError, MismatchError, SettingsError
from weights_store.schemas import SIDES

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class HybridSettings:
    """How token weights are computed from attributions, see `hybrid_weights`.

    `mix` is in 0..1, `sigma_divisor` > 0. `with_prompts`: the mean weight is 1 over prompt and response, not over the response.
    """

    target: AttributionTarget
    mix: float
    sigma_divisor: float
    with_prompts: bool

    @classmethod
    def of(cls, source: WeightSource) -> "HybridSettings":
        """Return the settings with which the stored weights were computed.

        Raises:
            MismatchError: They are not hybrid weights, or were transformed.
        """
        recipe = source.metadata.get("recipe") or {}
        weights: dict[str, Any] = recipe.get("weights") or {}
        target: Any = (recipe.get("attribute") or {}).get("target")
        missing = {"ti_lambda", "sigma_divisor", "span"} - weights.keys()
        if weights.get("estimator") != "ti" or target not in get_args(AttributionTarget) or missing:
            raise MismatchError(
                "loss.importance='online' computes weights with the settings of the dataset, so it needs a dataset that was "
                f"built with weights.estimator='ti'; {source.name} was built with {weights.get('estimator')!r}. Build it again "
                "with `tokenweights build RECIPE --set weights.estimator=ti`, or train with loss.importance='stored'"
            )
        if weights.get("transforms"):
            raise MismatchError(
                f"{source.name} was built with weights.transforms={weights['transforms']}, which only a build applies; for "
                "loss.importance='online' build it without them, or train with loss.importance='stored'"
            )
        return cls(target, weights["ti_lambda"], weights["sigma_divisor"], weights["span"] == "sequence")


def sampling_of(source: WeightSource) -> AnchorSampling:
    """Return how the dataset's anchors were sampled; the defaults if it has none."""
    recorded: dict[str, Any] = (source.metadata.get("recipe") or {}).get("anchors") or {}
    return AnchorSampling(**{k: v for k, v in recorded.items() if k in AnchorSampling.__dataclass_fields__})


@dataclass(frozen=True)
class Refresher:
    """Computes token weights and samples anchors with the current policy.

    Args:
        policy: On its device, not wrapped for several processes, not sharded.
        reference: For log-probs of fresh anchors; None for the policy with its adapters off.
        hybrid: How weights are computed; None keeps the stored ones.
        sampling: How anchors are sampled; None keeps the stored ones, if any.
        end_ids: Ids that end a response, besides those of the model's generation config.
        num_steps: Optimizer steps between two refreshes.
    """

    policy: Policy
    reference: nn.Module | None = None
    hybrid: HybridSettings | None = None
    sampling: AnchorSampling | None = None
    end_ids: tuple[int, ...] = ()
    num_steps: int = 1
    tokens_per_batch: int = FIRST_TOKENS
    dtype: str = "float32"

    @classmethod
    def of(
        cls, policy: Policy, config: TrainConfig, pairs: PairDataset, reference: nn.Module | None
    ) -> "Refresher | None":
        """Return what `config` asks for; None if everything comes from the dataset.

        Raises:
            MismatchError: See `HybridSettings.of`.
        """
        needs = config.loss.needs
        if needs.refresh_steps is None:
            return None
        return cls(
            policy,
            reference,
            HybridSettings.of(pairs.source) if needs.fresh_weights else None,
            sampling_of(pairs.source) if needs.fresh_anchors else None,
            find_end_ids(sample_pairs(pairs)) if needs.fresh_anchors else (),
            needs.refresh_steps,
            config.optim.tokens_per_batch or FIRST_TOKENS,
            config.model.dtype,
        )

    def refresh(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        """Return the pairs, at least one, with fresh weights or anchors; `seed` of the sampling is 0 to 2^64 - 1.

        Raises:
            SettingsError: The policy's gradients are no longer finite.
            InputError: See `attribute_tokens` and `sample_responses`.
        """
        fresh = list(pairs)
        if self.hybrid is not None:
            fresh = self._weighted(fresh, self.hybrid)
        if self.sampling is not None:
            distinct = {pair.prompt_ids.tobytes(): pair.prompt_ids for pair in fresh}  # in order
            prompts = list(distinct.values())
            sampled = sample_responses(
                self.policy, prompts, self.sampling, end_ids=self.end_ids, seed=seed, dtype=self.dtype
            )
            anchors = dict(zip(distinct, self._with_ref_logps(prompts, sampled), strict=True))
            fresh = [replace(pair, anchor=anchors[pair.prompt_ids.tobytes()]) for pair in fresh]
        return fresh

    def _weighted(self, pairs: Sequence[Pair], hybrid: HybridSettings) -> list[Pair]:
        # The gradients of two responses mix in a shared prompt; if prompts count, each response gets its own.
        collator = self._collator(with_rejected=not hybrid.with_prompts)
        # Nothing is counted here, so fillers need not come last.
        alike = [replace(pair, is_filler=False) for pair in pairs]
        rows = [*alike, *(pair.swapped() for pair in alike)] if hybrid.with_prompts else alike
        weights: dict[tuple[int, int], Floats] = {}  # by pair and side
        for part, batch in self._batches(rows, collator):
            with self._arithmetic(batch):
                found = attribute_tokens(self.policy.model, batch, hybrid.target, with_prompts=hybrid.with_prompts)
            sides = [divmod(row, len(pairs))[::-1] for row in part]
            if collator.with_rejected:
                sides += [(index, 1) for index, _ in sides]
            mask = batch["completion_mask"]
            lengths = mask.sum(1).cpu().numpy()
            attributions = found.attributions[mask].cpu().numpy()
            pair_ids = [pairs[index].pair_id for index, _ in sides]
            _check_finite(attributions, lengths, pair_ids)
            prompt_lengths = prompts = None
            if found.prompt_attributions is not None:
                prompt_lengths = mask.int().argmax(1).cpu().numpy()
                prompts = found.prompt_attributions.cpu().numpy()
                _check_finite(prompts, np.ones_like(lengths), pair_ids)
            hybrids = hybrid_weights(
                attributions,
                lengths,
                mix=hybrid.mix,
                sigma_divisor=hybrid.sigma_divisor,
                prompt_lengths=prompt_lengths,
                prompt_attributions=prompts,
            )
            weights |= zip(sides, np.split(hybrids.token_weights, np.cumsum(lengths)[:-1]), strict=True)
        return [pair.with_weights(weights[index, 0], weights[index, 1]) for index, pair in enumerate(pairs)]

    @torch.no_grad()
    def _with_ref_logps(
        self, prompts: Sequence[NDArray[np.int32]], responses: Sequence[NDArray[np.int32]]
    ) -> list[StoredResponse]:
        """Return the responses as anchors with the reference's log-probs."""
        unknown = [StoredResponse.anchor(ids, np.zeros(len(ids), np.float32)) for ids in responses]
        rows = [Pair("anchor", prompt, response, response) for prompt, response in zip(prompts, unknown, strict=True)]
        collator = self._collator(with_rejected=False)
        model = self.policy.model if self.reference is None else self.reference
        ref_logps: dict[int, Floats] = {}
        for part, batch in self._batches(rows, collator):
            with self._arithmetic(batch), nullcontext() if self.reference is not None else adapters_off(model):
                logps = per_token_logps(model, **model_inputs(batch)).logps
            values, mask = logps.float().cpu(), batch["completion_mask"].cpu()
            ref_logps |= {row: values[place][mask[place]].numpy() for place, row in enumerate(part)}
        return [StoredResponse.anchor(ids, ref_logps[index]) for index, ids in enumerate(responses)]

    def _collator(self, *, with_rejected: bool) -> PairCollator:
        packed = self.policy.not_packed is None
        return PairCollator(packed=packed, with_rejected=with_rejected, share_beginnings=False)

    def _batches(self, rows: Sequence[Pair], collator: PairCollator) -> Iterator[tuple[list[int], Batch]]:
        device = next(self.policy.model.parameters()).device
        for part in cut_by_tokens(range(len(rows)), [collator.num_tokens(row) for row in rows], self.tokens_per_batch):
            yield part, collator([rows[index] for index in part], device)

    def _arithmetic(self, batch: Batch) -> torch.autocast:
        device = batch["input_ids"].device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def find_end_ids(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Return the id that ends most responses of these pairs, see `closing_ids`."""
    responses = [response.ids for pair in pairs for response in (pair.chosen, pair.rejected)]
    return closing_ids(np.array([len(ids) for ids in responses]), np.array([ids[-1] for ids in responses]))


def _check_finite(attributions: Floats, lengths: NDArray[np.int64], pair_ids: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(attributions))
    if len(bad):
        pair_id = pair_ids[int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))]
        raise SettingsError(
            f"token weights cannot be refreshed: the policy's gradients are not finite ({len(bad)} tokens of a micro-batch, "
            f"the first in pair {pair_id}); lower optim.learning_rate, raise optim.warmup_share, or set model.dtype='float32'"
        )


# --- the rest of a window, kept in a checkpoint ------------------------------------------------------------------------

FRESH_FILES = "fresh-*.parquet"
"""One for each process."""
_FLOATS = pa.list_(pa.float32())
_FRESH = pa.schema(
    [
        pa.field("position", pa.int64(), nullable=False),
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("chosen_token_weights", _FLOATS, nullable=False),
        pa.field("rejected_token_weights", _FLOATS, nullable=False),
        pa.field("anchor_ids", pa.list_(pa.int32())),
        pa.field("anchor_ref_logps", _FLOATS),
    ]
)


def save_fresh(checkpoint: Path, rank: int, pairs: Mapping[int, Pair]) -> None:
    """Write the fresh weights and anchors of `pairs`, by position: a resumed run no longer has the policy that made them."""
    rows = [
        {
            "position": position,
            "pair_id": pair.pair_id,
            "chosen_token_weights": pair.chosen.token_weights,
            "rejected_token_weights": pair.rejected.token_weights,
            "anchor_ids": pair.anchor and pair.anchor.ids,
            "anchor_ref_logps": pair.anchor and pair.anchor.ref_logps,
        }
        for position, pair in pairs.items()
    ]
    checkpoint.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, _FRESH), checkpoint / FRESH_FILES.replace("*", str(rank)))


def load_fresh(folder: Path, pairs: Mapping[int, Pair]) -> dict[int, Pair]:
    """Return `pairs` with what the processes wrote into the checkpoint `folder`, see `save_fresh`.

    Raises:
        InputError: It lacks one of the pairs.
    """
    rows = [row for path in sorted(folder.glob(FRESH_FILES)) for row in pq.read_table(path).to_pylist()]
    by_position, by_pair = ({row[key]: row for row in rows} for key in ("position", "pair_id"))
    fresh = {}
    for position, pair in pairs.items():
        # With another number of processes the fillers are other pairs, but always pairs of the window.
        row = by_position.get(position, by_pair.get(pair.pair_id) if pair.is_filler else None)
        if row is None or row["pair_id"] != pair.pair_id:
            raise InputError(
                f"{folder} was written between two refreshes and lacks the weights or anchors of pair {pair.pair_id} (position "
                f"{position}); set output.resume=false to train from the beginning"
            )
        pair = pair.with_weights(*(np.array(row[f"{side}_token_weights"], np.float32) for side in SIDES))
        if row["anchor_ids"] is not None:
            ids, ref_logps = np.array(row["anchor_ids"], np.int32), np.array(row["anchor_ref_logps"], np.float32)
            pair = replace(pair, anchor=StoredResponse.anchor(ids, ref_logps))
        fresh[position] = pair
    return fresh
