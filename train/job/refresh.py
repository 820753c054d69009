"""Token weights and anchors made from the policy while it is trained (TI-DPO), in the place of stored ones.

Before every window of `loss.refresh_steps` steps the trainer hands the window's pairs over and gets them back with hybrid
weights from the policy's gradients (`attribution.py`), with anchors that the policy sampled (`generation.py`), or with both.
Both are data: no gradient flows through how they were made. How weights are made of attributions, and how anchors are sampled,
is what the dataset records of its build; nothing is configured twice. Not here: when a window begins (`trainer.py`).
"""

from collections.abc import Mapping, Sequence
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

from train.config import TrainConfig
from train.data.dataset import Pair, PairDataset, StoredResponse, WeightSource, sample_pairs
from train.loss.config import loss_needs
from train.model.attribution import AttributionTarget, attribute_tokens
from train.model.collate import MODEL_INPUTS, Batch, PairCollator
from train.model.generation import sample_responses
from train.model.hybrid import hybrid_weights
from train.model.logps import _adapters_off, per_token_logps
from train.model.policy import Policy
from train.model.sampling import AnchorSampling, closing_ids
from train.model.token_budget import cut_by_tokens
from weights_store.errors import InputError, MismatchError, SettingsError

_NUM_LOOKED_AT = 256
"""Pairs whose responses show how a turn ends."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class HybridSettings:
    """How token weights are made of attributions, see `hybrid_weights`.

    Args:
        target: What is differentiated.
        mix: Share of the attribution, 0..1.
        sigma_divisor: Of the prior, > 0.
        with_prompts: The weights' mean is 1 over prompt and response instead of over the response.
    """

    target: AttributionTarget
    mix: float
    sigma_divisor: float
    with_prompts: bool

    @classmethod
    def of(cls, source: WeightSource) -> "HybridSettings":
        """Return those that the stored weights were made with.

        Raises:
            MismatchError: They are not hybrid weights alone.
        """
        recipe = source.metadata.get("recipe") or {}
        weights = recipe.get("weights") or {}
        target: Any = (recipe.get("attribute") or {}).get("target")
        missing = {"ti_lambda", "sigma_divisor", "span"} - weights.keys()
        if weights.get("estimator") != "ti" or target not in get_args(AttributionTarget) or missing:
            raise MismatchError(
                "loss.importance='online' makes weights the way the dataset's were made, and so needs one that was built with "
                f"weights.estimator='ti'; {source.name} was built with {weights.get('estimator')!r}. Build it again with "
                "`tokenweights build RECIPE --set weights.estimator=ti`, or train with loss.importance='stored'"
            )
        if weights.get("transforms"):
            raise MismatchError(
                f"{source.name} was built with weights.transforms={weights['transforms']}, which only a build applies; for "
                "loss.importance='online' build it without, or train with loss.importance='stored'"
            )
        return cls(target, weights["ti_lambda"], weights["sigma_divisor"], weights["span"] == "sequence")


def sampling_of(source: WeightSource) -> AnchorSampling:
    """Return how the dataset's anchors were sampled; the defaults for one that has none."""
    recorded = (source.metadata.get("recipe") or {}).get("anchors") or {}
    known = AnchorSampling.__dataclass_fields__
    return AnchorSampling(**{name: value for name, value in recorded.items() if name in known})


def check_refreshing(config: TrainConfig, source: WeightSource) -> None:
    """Refuse what cannot be made on the way, before anything is loaded.

    Raises:
        MismatchError: See `HybridSettings.of`.
    """
    if loss_needs(config.loss).fresh_weights:
        HybridSettings.of(source)


@dataclass(frozen=True)
class Refresher:
    """Makes token weights and anchors from the policy as it is now.

    Args:
        policy: On its device, not wrapped for several processes, whole on this one.
        reference: For log-probs of fresh anchors; None for the policy with its adapters off.
        hybrid: How weights are made; None leaves the stored ones.
        sampling: How anchors are sampled; None leaves the stored ones, or none.
        end_ids: Ids that end a response, beside those of the model's generation config.
        tokens_per_batch: Tokens that are computed at a time.
        dtype: Of the arithmetic.
    """

    policy: Policy
    reference: nn.Module | None = None
    hybrid: HybridSettings | None = None
    sampling: AnchorSampling | None = None
    end_ids: tuple[int, ...] = ()
    tokens_per_batch: int = 8192
    dtype: str = "float32"

    @classmethod
    def of(
        cls, policy: Policy, config: TrainConfig, pairs: PairDataset, reference: nn.Module | None
    ) -> "Refresher | None":
        """Return what `config` asks for; None where everything is stored.

        Raises:
            MismatchError: See `HybridSettings.of`.
        """
        needs = loss_needs(config.loss)
        if not (needs.fresh_weights or needs.fresh_anchors):
            return None
        return cls(
            policy,
            reference,
            HybridSettings.of(pairs.source) if needs.fresh_weights else None,
            sampling_of(pairs.source) if needs.fresh_anchors else None,
            _end_ids(sample_pairs(pairs, _NUM_LOOKED_AT)) if needs.fresh_anchors else (),
            config.optim.tokens_per_batch,
            config.model.dtype,
        )

    def refresh(self, pairs: Sequence[Pair], seed: int) -> list[Pair]:
        """Return the pairs with what is fresh in the place of what was stored.

        Args:
            pairs: At least one.
            seed: Of the sampling, 0 to 2^64 - 1.

        Raises:
            SettingsError: The policy's gradients are no longer finite.
            InputError: See `attribute_tokens` and `sample_responses`.
        """
        fresh = list(pairs)
        if self.hybrid is not None:
            fresh = self._weighted(fresh, self.hybrid)
        if self.sampling is not None:
            fresh = self._anchored(fresh, self.sampling, seed)
        return fresh

    def _weighted(self, pairs: Sequence[Pair], hybrid: HybridSettings) -> list[Pair]:
        # A prompt that two responses share gets their gradients mixed: where it counts, each response brings its own.
        collator = self._collator(with_rejected=not hybrid.with_prompts)
        rows = [*pairs, *(pair.swapped() for pair in pairs)] if hybrid.with_prompts else list(pairs)
        weights: dict[tuple[int, int], Floats] = {}  # by pair and side
        for part in self._parts(rows, collator):
            batch = self._collate(rows, part, collator)
            with self._arithmetic(batch):
                found = attribute_tokens(self.policy.model, batch, hybrid.target, with_prompts=hybrid.with_prompts)
            sides = [divmod(row, len(pairs))[::-1] for row in part]
            if collator.with_rejected:
                sides += [(index, 1) for index, _ in sides]
            mask = batch["completion_mask"]
            lengths = mask.sum(1).cpu().numpy()
            attributions = found.attributions[mask].cpu().numpy()
            prompts = found.prompt_attributions if hybrid.with_prompts else None
            pair_ids = [pairs[index].pair_id for index, _ in sides]
            _check_finite(attributions, lengths, pair_ids)
            if prompts is not None:
                _check_finite(prompts.cpu().numpy(), np.ones_like(lengths), pair_ids)
            hybrids = hybrid_weights(
                attributions,
                lengths,
                mix=hybrid.mix,
                sigma_divisor=hybrid.sigma_divisor,
                prompt_lengths=None if prompts is None else mask.int().argmax(1).cpu().numpy(),
                prompt_attributions=None if prompts is None else prompts.cpu().numpy(),
            )
            weights |= zip(sides, np.split(hybrids.token_weights, np.cumsum(lengths)[:-1]), strict=True)
        return [
            replace(
                pair,
                chosen=replace(pair.chosen, token_weights=weights[index, 0]),
                rejected=replace(pair.rejected, token_weights=weights[index, 1]),
            )
            for index, pair in enumerate(pairs)
        ]

    def _anchored(self, pairs: Sequence[Pair], sampling: AnchorSampling, seed: int) -> list[Pair]:
        prompts = {pair.prompt_ids.tobytes(): pair.prompt_ids for pair in pairs}  # distinct, in order
        sampled = sample_responses(
            self.policy, list(prompts.values()), sampling, end_ids=self.end_ids, seed=seed, dtype=self.dtype
        )
        anchors = dict(zip(prompts, self._with_ref_logps(list(prompts.values()), sampled), strict=True))
        return [replace(pair, anchor=anchors[pair.prompt_ids.tobytes()]) for pair in pairs]

    @torch.no_grad()
    def _with_ref_logps(
        self, prompts: Sequence[NDArray[np.int32]], responses: Sequence[NDArray[np.int32]]
    ) -> list[StoredResponse]:
        """Return the responses with the reference's log-probs; weights are 1."""
        unknown = [anchor_of(ids, np.zeros(len(ids), np.float32)) for ids in responses]
        rows = [Pair("anchor", prompt, response, response) for prompt, response in zip(prompts, unknown, strict=True)]
        collator = self._collator(with_rejected=False)
        model = self.policy.model if self.reference is None else self.reference
        ref_logps: dict[int, Floats] = {}
        for part in self._parts(rows, collator):
            batch = self._collate(rows, part, collator)
            inputs: dict[str, Any] = {name: batch[name] for name in MODEL_INPUTS if name in batch}
            with self._arithmetic(batch), nullcontext() if self.reference is not None else _adapters_off(model):
                logps = per_token_logps(model, **inputs).logps
            values, mask = logps.float().cpu(), batch["completion_mask"].cpu()
            ref_logps |= {row: values[place][mask[place]].numpy() for place, row in enumerate(part)}
        return [anchor_of(ids, ref_logps[index]) for index, ids in enumerate(responses)]

    def _collator(self, *, with_rejected: bool) -> PairCollator:
        packed = self.policy.not_packed is None
        return PairCollator(packed=packed, with_rejected=with_rejected, share_beginnings=False)

    def _parts(self, rows: Sequence[Pair], collator: PairCollator) -> list[list[int]]:
        return cut_by_tokens(range(len(rows)), [collator.num_tokens(row) for row in rows], self.tokens_per_batch)

    def _collate(self, rows: Sequence[Pair], part: Sequence[int], collator: PairCollator) -> Batch:
        device = next(self.policy.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in collator([rows[index] for index in part]).items()}

    def _arithmetic(self, batch: Batch) -> torch.autocast:
        device = batch["input_ids"].device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def _end_ids(pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Return the id that ends the responses of these pairs, see `closing_ids`."""
    responses = [response.ids for pair in pairs for response in (pair.chosen, pair.rejected)]
    return closing_ids(np.array([len(ids) for ids in responses]), np.array([ids[-1] for ids in responses]))


def anchor_of(ids: NDArray[np.int32], ref_logps: Floats) -> StoredResponse:
    """Return an anchor as pairs carry it; its weights are 1."""
    return StoredResponse(ids, np.ones(len(ids), np.float32), ref_logps)


def _check_finite(attributions: Floats, lengths: NDArray[np.int64], pair_ids: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(attributions))
    if len(bad):
        pair_id = pair_ids[int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))]
        raise SettingsError(
            f"token weights cannot be made anew: the policy's gradients are not finite ({len(bad)} tokens of a micro-batch, "
            f"the first in pair {pair_id}); lower optim.learning_rate, raise optim.warmup_share, or set model.dtype='float32'"
        )


# --- what a checkpoint keeps of a window that has begun -----------------------------------------------------------------

FRESH_FILES = "fresh-*.parquet"
"""One of each process."""
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


def save_fresh(path: Path, pairs: Mapping[int, Pair]) -> None:
    """Write what is fresh of `pairs`, by position in the training: the policy that made it is gone when a run is resumed."""
    columns: dict[str, list[Any]] = {name: [] for name in _FRESH.names}
    for position, pair in pairs.items():
        row = [position, pair.pair_id, pair.chosen.token_weights, pair.rejected.token_weights]
        row += [None, None] if pair.anchor is None else [pair.anchor.ids, pair.anchor.ref_logps]
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=_FRESH), path)


def load_fresh(folder: Path, pairs: Mapping[int, Pair]) -> dict[int, Pair]:
    """Return `pairs` with what `save_fresh` wrote into the checkpoint `folder`, by whichever process.

    Raises:
        InputError: It holds nothing for one of them.
    """
    rows = [row for path in sorted(folder.glob(FRESH_FILES)) for row in pq.read_table(path).to_pylist()]
    by_position, by_pair = ({row[key]: row for row in rows} for key in ("position", "pair_id"))
    fresh = {}
    for position, pair in pairs.items():
        # Another number of processes has other fillers; a filler is some pair of the window.
        row = by_position.get(position, by_pair.get(pair.pair_id) if pair.is_filler else None)
        if row is None or row["pair_id"] != pair.pair_id:
            raise InputError(
                f"{folder} was written between two refreshes and lacks the weights or anchors of pair {pair.pair_id} (position "
                f"{position}); set output.resume=false to train from the beginning"
            )
        fresh[position] = replace(
            pair,
            chosen=replace(pair.chosen, token_weights=np.array(row["chosen_token_weights"], np.float32)),
            rejected=replace(pair.rejected, token_weights=np.array(row["rejected_token_weights"], np.float32)),
            anchor=pair.anchor
            if row["anchor_ids"] is None
            else anchor_of(np.array(row["anchor_ids"], np.int32), np.array(row["anchor_ref_logps"], np.float32)),
        )
    return fresh
