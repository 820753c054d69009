"""The step-0 gate: before the first step, the model must give the log-probs that the dataset's reference gave.

A loss with a reference assumes that policy and reference are the same function at the start: all log-ratios are 0. Without
the gate, training on another model, another dtype or a damaged dataset goes unnoticed. It compares log-probs, not the loss, so
it is as strict for every loss: the sigmoid losses start at log 2, the Bregman ones at 0, and `loss.nll_lambda` adds what the
stored log-probs say. Not here: the tokenizer and its chat template, which `checkpoint.check_model_fits` compares before a model
is loaded.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import GateSection, TrainConfig
from weights_store.errors import MismatchError
from weights_store.messages import logger
from weights_store.tables.metadata import CommitMetadata, ReferenceRecord

_log = logger(__name__)

_PARITY_FACTOR = 3.0
"""How far the trainer may be off, as a multiple of how far the stored scorer itself is from transformers in float32."""
_LEAST_TOLERANCE_NATS = 1e-3
_UNCHECKED_NATS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}
"""Tolerance by the scorer's dtype, for a dataset without a recorded parity check."""
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


def tolerance_of(gate: GateSection, metadata: CommitMetadata) -> float:
    """Return the largest mean |difference| per token that passes, nats.

    It follows from the parity check that the build recorded for its scorer: the trainer's rounding errors are about as large as
    the scorer's, and independent of them.
    """
    if gate.tolerance_nats is not None:
        return gate.tolerance_nats
    parity = metadata.get("parity")
    if parity is not None:
        return max(_PARITY_FACTOR * float(parity["mean"]), _LEAST_TOLERANCE_NATS)
    dtype = (metadata.get("reference") or {}).get("dtype", "bfloat16")
    return _UNCHECKED_NATS.get(dtype, _UNCHECKED_NATS["bfloat16"])


def compare(measured: Measured) -> Agreement:
    """Return how far policy and stored log-probs are apart."""
    gaps = torch.cat([(policy - stored).abs().float().cpu() for policy, stored in measured])
    return Agreement(len(gaps), gaps.mean().item(), gaps.max().item())


def check_step_0(
    measure: Callable[[str], Measured],
    config: TrainConfig,
    metadata: CommitMetadata,
    model_fingerprint: str,
    *,
    is_split: bool = False,
) -> None:
    """Refuse a model that is not the reference the dataset was scored with.

    `measure` runs the model over the sample in a dtype; with `is_split`, only in that of the config. `metadata` is the
    dataset's.

    Raises:
        MismatchError: Its log-probs differ; the message says whether the dtype, the model or the stored numbers are to blame.
    """
    model, tolerance_nats = config.model, tolerance_of(config.gate, metadata)
    found = compare(measure(model.dtype))
    if found.within(tolerance_nats):
        _log.info(
            f"step-0 gate: {found.mean:.2g} nats per token from the stored reference (at most {tolerance_nats:.2g}), over "
            f"{found.num_tokens:,} tokens"
        )
        return
    reference = metadata.get("reference") or {}
    if model.quantization != "none":
        cause = (
            "model.quantization rounds the weights, so that training starts from another function than the reference that was "
            "scored. Build the dataset for the quantised model, or accept the difference with gate.tolerance_nats"
        )
    elif model.dtype != "float32" and is_split:
        cause = (
            f"a model that is split between processes cannot be run in float32 to see whether {model.dtype} is the cause. If "
            f"model.dtype='float32' passes, it is: keep that, or build with `--set score.dtype={model.dtype}`. Otherwise: "
            + _blame_model(model.path, model_fingerprint, reference)
        )
    elif model.dtype != "float32" and compare(measure("float32")).within(tolerance_nats):
        scored = reference.get("dtype") or (metadata.get("parity") or {}).get("dtype") or "another dtype"
        cause = (
            f"in float32 they agree, so the dtype is the cause: the reference was scored in {scored}, this run computes in "
            f"{model.dtype}. Set model.dtype='float32', or build with `--set score.dtype={model.dtype}`"
        )
    else:
        cause = _blame_model(model.path, model_fingerprint, reference)
    raise MismatchError(f"{_describe(found, tolerance_nats)}; {cause}")


def check_reference(measured: Measured, config: TrainConfig, metadata: CommitMetadata) -> None:
    """Refuse a frozen reference model that is not the one the dataset was scored with, after `check_step_0`.

    It has the policy's files, but its parameters are in the dtype of the forward pass, those of the policy in float32.

    Raises:
        MismatchError: Its log-probs differ from the stored ones.
    """
    found, tolerance_nats = compare(measured), tolerance_of(config.gate, metadata)
    if found.within(tolerance_nats):
        _log.info(f"step-0 gate: the frozen reference model is {found.mean:.2g} nats per token from it")
        return
    dtype = config.model.dtype
    cause = "set model.dtype='float32', or accept the difference with gate.tolerance_nats"
    if dtype == "float32":
        cause = "this is a fault of this installation: compare the versions of torch and transformers with those of the build"
    raise MismatchError(
        f"{_describe(found, tolerance_nats, 'frozen reference model')}; the policy's agree, so the way in which the reference "
        f"is computed in {dtype} is the cause: {cause}"
    )


def _describe(found: Agreement, tolerance_nats: float, model: str = "model") -> str:
    if math.isnan(found.mean):
        return f"step-0 gate: the {model} gives log-probs that are not finite, over {found.num_tokens:,} tokens"
    return (
        f"step-0 gate: the {model}'s log-probs differ from the stored ones of the reference by {found.mean:.2g} nats per token "
        f"in the mean (expected at most {tolerance_nats:.2g}) and by {found.max:.2g} at one token (expected at most "
        f"{_MAX_FACTOR * tolerance_nats:.2g}), over {found.num_tokens:,} tokens"
    )


def _blame_model(path: str, fingerprint: str, reference: ReferenceRecord) -> str:
    recorded = reference.get("model_fingerprint")
    if recorded == fingerprint:
        return (
            "the model's files are those of the reference, so the stored numbers or the ones of this machine are wrong: run "
            "`tokenweights verify` on the store and `tokenweights check-scorer` on the recipe"
        )
    named = f" ({recorded[:12]}, {reference.get('model')})" if recorded else ""
    return (
        f"model.path={path!r} ({fingerprint[:12]}) is another model than the reference{named}: train the model that the "
        "dataset was scored with, or build the dataset for this one. If the difference is intended, raise gate.tolerance_nats "
        "or set gate.pairs=0"
    )
