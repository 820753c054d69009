"""Which tokens are at an end of their estimator's clamp, from what a version of a weight dataset recorded of its settings."""

import math
from collections.abc import Mapping

import numpy as np

from weights_store.schemas import Side
from weights_store.tables.metadata import CommitMetadata

_ROUNDING = 2.0**-12
"""Stored weights have 12 bits of mantissa: relative errors of at most 2^-13."""
_READS: dict[str, set[str]] = {
    **{key: {"lower", "upper"} for key in ("tis", "reversed", "threshold", "threshold_and_scale")},
    **{key: {"k", "mu", "lower", "upper"} for key in ("head", "random")},
    "origin": set(),
}
"""The settings that say where the clamp is, by estimator; commits of other programs may lack them."""


def clamped(
    metadata: CommitMetadata, side: Side, weights: np.ndarray, logratios: np.ndarray | None = None
) -> np.ndarray | None:
    """Return -1 for tokens at or below the lower end of the clamp, 1 at or above the upper one, else 0: `[N]` int8.

    The ends are those of the score that is clamped: a rejected token at the lower end of `tis` has the largest weight. There
    are as many such tokens as the build counted, because it weighed the stored log-probs. The scores of `head` and `random` are
    not stored: there a token is at an end if it has the weight of the end, as exactly as weights are stored.

    `weights` and `logratios` (log π+ − log π−, nats) are `[N]` float32. Returns None if the estimator has no clamp, or if it
    cannot be known: no log-ratios or settings, or weights without scores that were transformed.
    """
    settings = weight_settings(metadata)
    estimator = str(settings.get("estimator"))
    if not settings.keys() >= _READS.get(estimator, {"no clamp"}):
        return None
    if estimator in ("head", "random") and not settings.get("transforms"):
        return _by_weight(settings, side, weights)
    if logratios is None:
        return None
    z = logratios if side == "chosen" else -logratios
    match estimator:
        case "tis" | "reversed":
            scores = logratios if estimator == "tis" else -logratios
            scores = scores * np.float32(_scale(metadata, settings, estimator))
            return _ends(scores, _number(settings, "lower"), _number(settings, "upper"))
        case "threshold_and_scale":
            return _ends(z, _number(settings, "lower"), _number(settings, "upper"))
        case "threshold":
            return _ends(z, max(0.0, _number(settings, "lower")), _number(settings, "upper"))
        case "origin":
            return _ends(z, 0.0, math.inf)
    return None


def weight_settings(metadata: CommitMetadata) -> Mapping[str, object]:
    """Return the settings of `[weights]` that determined a version; empty if it recorded none."""
    return metadata.get("identity", {}).get("settings", {}).get("weights", {})


def _ends(scores: np.ndarray, lower: float, upper: float) -> np.ndarray:
    return (scores >= np.float32(upper)).astype(np.int8) - (scores <= np.float32(lower)).astype(np.int8)


def _by_weight(settings: Mapping[str, object], side: Side, weights: np.ndarray) -> np.ndarray:
    """Weights are k * exp(mu * score), with -mu on rejected tokens."""
    mu = _number(settings, "mu") * (1 if side == "chosen" else -1)
    lower, upper = (_number(settings, "k") * math.exp(mu * _number(settings, end)) for end in ("lower", "upper"))

    def is_at(end: float) -> np.ndarray:
        return (np.abs(weights - np.float32(end)) <= np.float32(end * _ROUNDING)).astype(np.int8)

    return is_at(upper) - is_at(lower)


def _scale(metadata: CommitMetadata, settings: Mapping[str, object], estimator: str) -> float:
    """Return the factor of the scores before the clamp, given or fitted."""
    statistics = metadata.get("statistics", {})
    if "spread" in settings:
        return statistics["spread"][estimator]["scale"]
    if settings.get("scale") == "calibrated":
        return statistics["held_out"][estimator]["scale"]
    return _number(settings, "scale", 1.0)


def _number(settings: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = settings.get(key, default)
    assert isinstance(value, int | float), f"settings with {key} = {value!r}"
    return float(value)
