"""The step-0 gate: before the first step, the model must give the log-probs that the dataset's reference gave.

A loss with a reference assumes that policy and reference are the same function at the start; then every log-ratio is 0 and the
sigmoid losses are log 2. Another model, another dtype or a damaged dataset trains on without a word otherwise. Not here: the
tokenizer and its chat template, which `policy.check_model_fits` compares before a model is loaded.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config import GateSection
from weights_store.errors import MismatchError

_PARITY_FACTOR = 3.0
"""How far the trainer may be off, as a multiple of how far the stored scorer itself is from transformers in float32."""
_LEAST_TOLERANCE_NATS = 1e-3
_UNCHECKED_NATS = {"float32": 1e-3, "float16": 1e-2}
"""Tolerance by the scorer's dtype, for datasets that record no parity check."""
_UNCHECKED_BFLOAT16_NATS = 4e-2
_MAX_FACTOR = 50
"""A single token may be off by this many times the tolerance of the mean."""

Measured = Iterable[tuple[Tensor, Tensor]]
"""Policy and stored reference log-probs of the response tokens of some pairs, `[n]` each, nats."""


@dataclass(frozen=True)
class Agreement:
    """How far the model is from the stored log-probs, in nats over `num_tokens` response tokens."""

    num_tokens: int
    mean: float
    max: float

    def within(self, tolerance_nats: float) -> bool:
        """Return whether both are in bounds; NaN is not."""
        return self.mean <= tolerance_nats and self.max <= _MAX_FACTOR * tolerance_nats


def tolerance_of(gate: GateSection, metadata: dict[str, Any]) -> float:
    """Return the largest mean |difference| per token that passes, nats.

    Learnt from the parity check that the build recorded for its scorer: what a scorer is off by rounding, a trainer with its
    arithmetic is off as well, in another direction.
    """
    if gate.tolerance_nats is not None:
        return gate.tolerance_nats
    parity = metadata.get("parity")
    if parity is not None:
        return max(_PARITY_FACTOR * float(parity["mean"]), _LEAST_TOLERANCE_NATS)
    dtype = str((metadata.get("reference") or {}).get("dtype"))
    return _UNCHECKED_NATS.get(dtype, _UNCHECKED_BFLOAT16_NATS)


def compare(measured: Measured) -> Agreement:
    """Return how far policy and stored log-probs are apart."""
    gaps = torch.cat([(policy - stored).abs().float().cpu() for policy, stored in measured])
    return Agreement(len(gaps), gaps.mean().item(), gaps.max().item())


def check_step_0(
    measure: Callable[[str], Iterator[tuple[Tensor, Tensor]]],
    *,
    tolerance_nats: float,
    dtype: str,
    metadata: dict[str, Any],
    model: str,
    model_fingerprint: str,
    quantized: bool = False,
) -> Agreement:
    """Refuse a model that is not the reference the dataset was scored with.

    Args:
        measure: Runs the model over the sample in a dtype, see `Measured`.
        tolerance_nats: See `tolerance_of`.
        dtype: The trainer's.
        metadata: The dataset's.
        model: Where it is from, for messages.
        model_fingerprint: Of its files.
        quantized: Its weights were rounded when it was loaded.

    Raises:
        MismatchError: It gives other log-probs: says whether the arithmetic, the model or the stored numbers are to blame.
    """
    found = compare(measure(dtype))
    if found.within(tolerance_nats):
        return found
    difference = (
        f"step-0 gate: the model's log-probs differ from the reference's stored ones by {found.mean:.2g} nats per token in "
        f"the mean (expected at most {tolerance_nats:.2g}) and {found.max:.2g} at most (expected "
        f"{_MAX_FACTOR * tolerance_nats:.2g}), over {found.num_tokens:,} tokens"
    )
    if math.isnan(found.mean):
        difference = f"step-0 gate: the model gives log-probs that are not finite, over {found.num_tokens:,} tokens"
    reference = metadata.get("reference") or {}
    if quantized:
        raise MismatchError(
            f"{difference}; model.quantization rounds the weights, so that training starts from another function than the "
            "reference that was scored. Build the dataset for the quantised model, or accept the difference with "
            "gate.tolerance_nats"
        )
    if dtype != "float32" and compare(measure("float32")).within(tolerance_nats):
        scored = reference.get("dtype") or (metadata.get("parity") or {}).get("dtype") or "another dtype"
        raise MismatchError(
            f"{difference}; in float32 they agree, so this is the arithmetic: the reference was scored in {scored}, this run "
            f"computes in {dtype}. Set model.dtype='float32', or build with `--set score.dtype={dtype}`"
        )
    recorded = reference.get("model_fingerprint")
    if recorded == model_fingerprint:
        raise MismatchError(
            f"{difference}; the model's files are those of the reference, so the stored numbers or this machine's are wrong: "
            "run `tokenweights verify` on the store and `tokenweights check-scorer` on the recipe"
        )
    named = f" ({recorded[:12]}, {reference.get('model')})" if recorded else ""
    raise MismatchError(
        f"{difference}; model.path={model!r} ({model_fingerprint[:12]}) is another model than the reference{named}: train the "
        "model that the dataset was scored with, or build the dataset for this one. Where the difference is meant, raise "
        "gate.tolerance_nats or set gate.pairs=0"
    )
