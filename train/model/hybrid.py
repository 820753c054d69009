"""Hybrid token weights of TI-DPO: gradient attribution mixed with a Gaussian prior in position, on flat arrays.

Builds store these weights and trainings refresh them; both call this. Not here: attributions (`attribution.py`).

References:
    TI-DPO, arXiv 2505.19653v3, eq. 7 and 8, and its official release.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class HybridWeights:
    """Weights of all response tokens, flat `[N]` float32, and how many responses had no attribution to mix in."""

    token_weights: np.ndarray
    num_without_mass: int


def hybrid_weights(
    attributions: np.ndarray,
    lengths: np.ndarray,
    *,
    mix: float,
    sigma_divisor: float,
    prompt_lengths: np.ndarray | None = None,
    prompt_attributions: np.ndarray | None = None,
) -> HybridWeights:
    """Return T * (mix * I / sum(I) + (1 - mix) * G / sum(G)) for each token of each response (eq. 8), mean 1 over the span.

    The span of T tokens is the response, or prompt and response if prompts are given. G is Gaussian in the position within the
    span (eq. 7), with mean (T - 1) / 2 and sigma = max(1, T / sigma_divisor); the 1 is from the release and keeps the prior of
    a short span from standing on its middle token alone. The paper writes G with peak 1, so that the mix would depend on the
    length; we divide by its sum, as the release does, and multiply by T, so that weighted and unweighted margins share a scale
    and a beta. A span without any attribution gets the prior alone. A response of one token has weight 1 (the release: 0).

    Args:
        attributions: I of every response token, flat `[N]`, at least 0, in any unit.
        lengths: Tokens of each response, `[B]`, N in sum.
        mix: Share of the attribution, lambda of the paper, 0 to 1.
        sigma_divisor: Span divided by sigma, above 0: 4 in the paper, 8 in the release. The smaller, the flatter the prior.
        prompt_lengths: Tokens of each response's prompt, `[B]`, for the span of the release. Only weights of the response are
            returned, so their mean is usually not 1.
        prompt_attributions: Sum of I over each prompt, `[B]`; together with `prompt_lengths`.

    Raises:
        ValueError: `mix` or `sigma_divisor` is out of range, the arrays do not fit together, or an attribution is negative or
            not finite.
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"mix is the share of the attribution: expected 0 to 1, got {mix}")
    if not (np.isfinite(sigma_divisor) and sigma_divisor > 0):
        raise ValueError(f"sigma_divisor: expected a number above 0, got {sigma_divisor}")
    _check_parts(attributions, lengths, prompt_lengths, prompt_attributions)
    before = np.zeros_like(lengths) if prompt_lengths is None else prompt_lengths
    spans = lengths + before
    firsts = np.cumsum(lengths) - lengths

    there = lengths > 0
    masses = np.zeros(len(lengths))
    masses[there] = np.add.reduceat(attributions, firsts[there], dtype=np.float64)
    if prompt_attributions is not None:
        masses += prompt_attributions
    with_mass = masses > 0
    of_attribution = np.where(with_mass, mix * spans / np.where(with_mass, masses, 1), 0.0)
    of_prior = np.where(with_mass, 1 - mix, 1.0)

    prior, starts = _prior(spans, sigma_divisor)
    token_weights = prior[np.arange(len(attributions)) + np.repeat(starts + before - firsts, lengths)]
    token_weights *= np.repeat(of_prior, lengths)
    token_weights += np.repeat(of_attribution, lengths) * attributions
    token_weights[np.repeat(lengths == 1, lengths)] = 1
    return HybridWeights(token_weights.astype(np.float32), int(np.count_nonzero(~with_mass)))


def _prior(spans: np.ndarray, sigma_divisor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gaussians of all distinct spans, flat, each with mean 1, and where the one of each response begins, `[B]`."""
    known, which = np.unique(spans, return_inverse=True)
    starts = np.cumsum(known) - known
    of = np.repeat(known, known)
    distances = np.arange(len(of)) - np.repeat(starts, known) - (of - 1) / 2
    gaussian = np.exp(-0.5 * (distances / np.maximum(1.0, of / sigma_divisor)) ** 2)
    there = known > 0
    if there.any():
        gaussian *= np.repeat(known[there] / np.add.reduceat(gaussian, starts[there]), known[there])
    return gaussian, starts[which]


def _check_parts(
    attributions: np.ndarray,
    lengths: np.ndarray,
    prompt_lengths: np.ndarray | None,
    prompt_attributions: np.ndarray | None,
) -> None:
    if int(lengths.sum()) != len(attributions):
        raise ValueError(f"{len(attributions)} attributions for responses of {int(lengths.sum())} tokens together")
    if (prompt_lengths is None) != (prompt_attributions is None):
        raise ValueError("prompt_lengths and prompt_attributions go together: give both or neither")
    _check_sizes("attributions", attributions, lengths)
    if prompt_lengths is not None and prompt_attributions is not None:
        if not len(prompt_lengths) == len(prompt_attributions) == len(lengths):
            raise ValueError(
                f"{len(prompt_lengths)} prompt_lengths and {len(prompt_attributions)} prompt_attributions for "
                f"{len(lengths)} responses: expected one of each for each response"
            )
        _check_sizes("prompt_attributions", prompt_attributions, np.ones_like(lengths))


def _check_sizes(what: str, values: np.ndarray, lengths: np.ndarray) -> None:
    """Refuse numbers that cannot be an L1 norm; NaN fails every comparison."""
    bad = np.flatnonzero(~((values >= 0) & (values < np.inf)))
    if bad.size:
        ends = np.cumsum(lengths)
        response = int(np.searchsorted(ends, bad[0], side="right"))
        token = int(bad[0] - ends[response] + lengths[response])
        raise ValueError(
            f"{what}: {values[bad[0]]} at response {response}, token {token}: expected a finite number of at least 0; "
            f"{bad.size} such values"
        )
