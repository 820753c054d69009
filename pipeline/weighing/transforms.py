"""Transforms of token weights, which a recipe may apply after the estimator: pure functions on flat arrays.

All take the weights of one side, flat over its responses, `[N]` float32 and at least 0, and `lengths`, the tokens of each
response, `[B]`, at least 1; and return weights of the same kind.
"""

from typing import Literal

import numpy as np

TransformName = Literal["position", "smooth", "shrink", "decay", "mean_one"]
TRANSFORM_SETTINGS: dict[TransformName, tuple[str, ...]] = {
    "position": ("position_bins",),
    "smooth": ("smooth_over", "smooth_window"),
    "shrink": (),
    "decay": ("decay_gamma",),
    "mean_one": (),
}
"""The keys of a recipe's [weights] that each transform reads."""


def positions(lengths: np.ndarray) -> np.ndarray:
    """Return the position of each token in its response, `[N]`, from 0."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sum over each response, `[B]` float64; here one may have no tokens, and sum 0."""
    found, is_there = np.zeros(len(lengths)), lengths > 0
    if is_there.any():  # of an empty slice `reduceat` would return the value behind it
        found[is_there] = np.add.reduceat(values, (np.cumsum(lengths) - lengths)[is_there], dtype=np.float64)
    return found


def means(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the mean over each response, `[B]` float64."""
    return sums(values, lengths) / lengths


def mean_one(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return w / mean(w) in each response; if all weights are 0 they stay 0."""
    found = means(weights, lengths)
    factors = np.divide(1.0, found, out=np.ones_like(found), where=found > 0)
    return (weights * np.repeat(factors, lengths)).astype(np.float32)


def decay(weights: np.ndarray, lengths: np.ndarray, gamma: float) -> np.ndarray:
    """Return w_t * gamma^t, t from 1, so that the first token has gamma^1 (D2PO, arXiv 2502.14340, as in its release)."""
    powers = np.float64(gamma) ** np.arange(1, int(lengths.max()) + 1)
    return weights * powers.astype(np.float32)[positions(lengths)]


def smooth(weights: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over `window` tokens (an odd number) with each token in the middle; at the ends over fewer tokens."""
    at = np.arange(len(weights))
    ends = np.cumsum(lengths)
    low = np.maximum(at - window // 2, np.repeat(ends - lengths, lengths))
    high = np.minimum(at + window // 2 + 1, np.repeat(ends, lengths))
    before = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    return ((before[high] - before[low]) / (high - low)).astype(np.float32)


def smooth_words(weights: np.ndarray, word_starts: np.ndarray) -> np.ndarray:
    """Return the mean over the tokens of each word; `word_starts` is `[N]` bool, True at the start of each response."""
    starts = np.flatnonzero(word_starts)
    sizes = np.diff(starts, append=len(weights))
    return np.repeat(means(weights, sizes), sizes).astype(np.float32)


def shrink(weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return exp(f * log w), f = max(0, 1 - noise / mean(x^2)) in each response: the noisier it is, the closer to 1.

    Noise is von Neumann's estimate from successive differences of x = log w (Annals of Mathematical Statistics 12, 1941):
    sum of (x_t - x_(t-1))^2 over 2 (n - 1). Slow changes along the response count as signal, jumps from token to token as
    noise; f has the form of James and Stein. A response of one token stays as it is.

    Raises:
        ValueError: A weight is 0, which has no log.
    """
    num_zeros = len(weights) - np.count_nonzero(weights)
    if num_zeros:
        raise ValueError(
            f"transform 'shrink' takes the log of weights: expected all above 0, got {num_zeros} of {len(weights)} that are 0. "
            "Remove 'shrink' from weights.transforms, or choose another estimator"
        )
    logs = np.log(weights, dtype=np.float64)
    steps = np.diff(logs, prepend=logs[:1])
    steps[np.cumsum(lengths)[:-1]] = 0  # not from one response to the next
    noise = means(steps**2, lengths) * lengths / (2 * np.maximum(lengths - 1, 1))
    size = means(logs**2, lengths)
    share = np.divide(noise, size, out=np.zeros_like(size), where=size > 0)
    return np.exp(logs * np.repeat(np.maximum(0.0, 1.0 - share), lengths)).astype(np.float32)


def position_sums(weights: np.ndarray, lengths: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of weights at each relative position, `[num_bins]` float64, and the number of tokens there."""
    bins = _position_bins(lengths, num_bins)
    return np.bincount(bins, weights, num_bins), np.bincount(bins, minlength=num_bins)


def divide_by_position(weights: np.ndarray, lengths: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Return w divided by the dataset's mean weight at its relative position, so that every position has mean 1.

    `curve` is that mean over all responses of this side, `[num_bins]`. Where it is 0, all weights are 0 and stay 0.
    """
    factors = np.divide(1.0, curve, out=np.ones_like(curve), where=curve > 0)
    return (weights * factors[_position_bins(lengths, len(curve))]).astype(np.float32)


def _position_bins(lengths: np.ndarray, num_bins: int) -> np.ndarray:
    """Return the bin of each token, `[N]`, by the middle of the token: a single token is in the middle of its response."""
    middles = 2 * positions(lengths) + 1
    return middles * num_bins // (2 * np.repeat(lengths.astype(np.int64), lengths))
