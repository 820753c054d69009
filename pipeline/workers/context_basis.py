"""The numbers that stand for what a model has read: the mean and the principal axes of its hidden states, one set per table.

They are computed once, from the pairs with the smallest ids, and recorded in the first commit of the table, which has no rows.
Later processes, other actors and later versions of the pairs read them there, so that numbers of different rows compare.
Called by `pair_attributor.py`. Not here: which hidden states (`train/model/attribution.py`).
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weights_store.errors import InputError
from weights_store.tables.metadata import ContextsRecord

SAMPLE_PAIRS = 256


@dataclass(frozen=True)
class ContextBasis:
    """A map from hidden states to d numbers."""

    mean: Tensor
    """`[H]` float32."""
    axes: Tensor
    """`[d, H]` float32, scaled so that the numbers of the sample have mean squared norm 1."""

    def project(self, states: Tensor) -> Tensor:
        """Return the numbers of hidden states `[N, H]`, `[N, d]` float32."""
        return (states - self.mean) @ self.axes.T

    def to(self, device: torch.device) -> "ContextBasis":
        """Return the same on a device."""
        return ContextBasis(self.mean.to(device), self.axes.to(device))

    def record(self) -> ContextsRecord:
        """Return what the first commit of a table records."""
        return {"num_contexts": len(self.axes), "mean": _encode(self.mean), "axes": _encode(self.axes)}

    @classmethod
    def of_record(cls, record: ContextsRecord) -> "ContextBasis":
        """Read it back."""
        mean = _decode(record["mean"])
        return cls(mean, _decode(record["axes"]).reshape(record["num_contexts"], len(mean)))


def fit_basis(batches: Iterable[Tensor], num_contexts: int) -> ContextBasis:
    """Return the basis of hidden states `[n, H]`, in batches; states that are not finite are left out.

    Signs are fixed by the largest number of each axis. Memory for a matrix of H x H in float64.

    Raises:
        InputError: There are no finite states, or they have fewer numbers than are wanted.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for states in batches:
        exact = states[states.isfinite().all(1)].to("cpu", torch.float64)
        count += len(exact)
        total, squares = total + exact.sum(0), squares + exact.T @ exact
    if not count:
        raise InputError(
            "no hidden state of the first pairs is finite, so there are no contexts; set attribute.contexts=0"
        )
    if len(total) < num_contexts:
        raise InputError(
            f"attribute.contexts is {num_contexts}, and the model's hidden states have {len(total)} numbers"
        )
    mean = total / count
    variances, vectors = torch.linalg.eigh(squares / count - torch.outer(mean, mean))  # in rising order
    axes, kept = vectors[:, -num_contexts:].T.flip(0), variances[-num_contexts:].clamp(min=0).sum()
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    scale = kept.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    return ContextBasis(mean.float(), (axes * largest.sign() * scale).float())


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.cpu().numpy().astype("<f4").tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
