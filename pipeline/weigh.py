"""Stage weigh: log-probs of the contrastive pair to token weights, on flat arrays, without a loop over tokens.

Weights are computed from the stored log-probs, so that another estimator or clamp is a derivation on the CPU.
EOS is a token like any other. Nothing here is normalised: the paper's weights are not.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from weights_store.checksums import mix

Side = Literal["chosen", "rejected"]


@dataclass(frozen=True, slots=True)
class SideScores:
    """What is known of all response tokens of one side, flat over the pairs, `[N]` each.

    The log-probs are needed by `tis`, `sepo` and `reversed`; `lengths`, tokens of each response `[B]`, by `sepo` alone;
    `token_keys`, 64-bit hashes of (pair, side, position), by `random` alone.
    """

    side: Side
    num_tokens: int
    positive_logps: np.ndarray | None = None
    negative_logps: np.ndarray | None = None
    lengths: np.ndarray | None = None
    token_keys: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class ClampSettings:
    """k, mu, L and U of TIS-DPO."""

    k: float = 1.0
    mu: float = 1.0
    lower: float = -0.5
    upper: float = 1.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SideWeights:
    """Weights of one side, flat `[N]` float32, and how many log-ratios were at each end of the clamp."""

    token_weights: np.ndarray
    num_at_lower: int
    num_at_upper: int


def weigh(scores: SideScores, estimator: str, settings: ClampSettings) -> SideWeights:
    """Return the token weights of one side.

    Args:
        scores: Flat log-probs of the contrastive pair.
        estimator: `tis`: w = k * exp(mu * clamp(log pi+ - log pi-, L, U)), mu < 0 on rejected tokens (TIS-DPO,
            arXiv 2410.04350, eq. 19 of the submission; the clamp stands before mu). `reversed`: the same with pi+ and pi-
            swapped, an ablation that should hurt. `random`: the log-ratio is drawn from U(L, U) instead, the same for the
            same token whatever is built around it. `uniform`: 1.
        settings: k, mu, L, U and the seed.

    Raises:
        ValueError: The estimator is unknown.
    """
    if estimator == "uniform":
        return SideWeights(np.ones(scores.num_tokens, dtype=np.float32), 0, 0)
    logratios = _drawn(scores, settings) if estimator == "random" else _clampable(scores, estimator)
    mu = settings.mu if scores.side == "chosen" else -settings.mu
    token_weights = np.clip(logratios, np.float32(settings.lower), np.float32(settings.upper))
    token_weights *= np.float32(mu)  # in place: the memory traffic is what costs
    np.exp(token_weights, out=token_weights)
    token_weights *= np.float32(settings.k)
    return SideWeights(
        token_weights,
        int(np.count_nonzero(logratios <= settings.lower)),
        int(np.count_nonzero(logratios >= settings.upper)),
    )


def select(scores: SideScores, share: float) -> SideWeights:
    """Return 1 for the tokens that SePO trains on, 0 for all others: estimator `sepo`.

    Of a chosen response these are the tokens with the highest log pi+ - log pi-, of a rejected one those with the lowest (SePO,
    arXiv 2408.13518, by its release; there the score is that of a DPO model over its SFT start, here of the contrastive pair).
    Of n tokens max(1, floor(share * n)) are selected: the release takes floor(share * n), which leaves short responses without
    any. Of equal scores the earlier token is selected. The first response token counts like the others; the release can never
    select it.

    Args:
        scores: Flat log-probs of the contrastive pair, and the lengths of the responses.
        share: Of each response's tokens, above 0, at most 1.
    """
    assert scores.lengths is not None, "a selection is made response by response"
    logratios = _logratios(scores)
    responses = np.repeat(np.arange(len(scores.lengths)), scores.lengths)
    # One integer per token, by response and then by score: each response keeps its span. One stable sort of integers is eight
    # times as fast as np.lexsort, and breaks ties by position.
    keys = responses.astype(np.uint64) << np.uint64(32) | _sortable(
        -logratios if scores.side == "chosen" else logratios
    )
    order = np.argsort(keys, kind="stable")
    starts = np.cumsum(scores.lengths) - scores.lengths
    ranks = np.arange(scores.num_tokens) - starts[responses]
    counts = np.maximum(1, (share * scores.lengths).astype(np.int64))
    token_weights = np.zeros(scores.num_tokens, dtype=np.float32)
    token_weights[order[ranks < counts[responses]]] = 1
    return SideWeights(token_weights, 0, 0)


def _sortable(values: np.ndarray) -> np.ndarray:
    """Return uint32 in the order of float32 values: negative ones have all bits turned, others the sign alone; -0 is 0."""
    bits = (values + np.float32(0)).view(np.uint32)
    return bits ^ np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def _drawn(scores: SideScores, settings: ClampSettings) -> np.ndarray:
    """Return log-ratios from U(L, U), flat `[N]` float32 nats."""
    assert scores.token_keys is not None, "random weights need keys"
    drawn = _uniform(scores.token_keys, settings.seed)
    return (settings.lower + (settings.upper - settings.lower) * drawn).astype(np.float32)


def _clampable(scores: SideScores, estimator: str) -> np.ndarray:
    """Return the log-ratios that `tis` or `reversed` clamp, flat `[N]` float32 nats."""
    if estimator not in ("tis", "reversed"):
        raise ValueError(
            f"unknown estimator {estimator!r}: expected tis, uniform, random or reversed; sepo is `select`"
        )
    logratios = _logratios(scores)
    return logratios if estimator == "tis" else -logratios


def _logratios(scores: SideScores) -> np.ndarray:
    """Return log pi+ - log pi-, flat `[N]` float32 nats."""
    assert scores.positive_logps is not None, "no log-probs of pi+"
    assert scores.negative_logps is not None, "no log-probs of pi-"
    return np.subtract(scores.positive_logps, scores.negative_logps, dtype=np.float32)


def token_keys(pair_ids: list[str], side: Side, lengths: np.ndarray) -> np.ndarray:
    """Return one 64-bit key per token, flat `[N]` uint64: a hash of pair, side and position.

    Args:
        pair_ids: One per pair, 32 hex digits.
        side: Which response.
        lengths: Tokens of each response, `[B]`.
    """
    pairs = np.array([int(pair_id[:16], 16) for pair_id in pair_ids], dtype=np.uint64)
    offsets = np.cumsum(lengths) - lengths
    positions = (np.arange(int(lengths.sum())) - np.repeat(offsets, lengths)).astype(np.uint64)
    salt = np.uint64(1 if side == "chosen" else 2) << np.uint64(62)
    return mix(np.repeat(mix(pairs), lengths) + positions + salt)


def _uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each key, float32, independent of the keys around it."""
    mixed = mix(keys + mix(np.full(1, seed, dtype=np.uint64)))
    return ((mixed >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)
