"""Ridge Bradley-Terry regression on sparse differences of pairs: the rewards of features that predict labels best.

A pair's margin is x . theta, where x is the sum of the features of its chosen minus of its rejected tokens, and its label is
right with probability sigmoid(margin). `fit_ridge` maximises the likelihood of labels, less a penalty: a Gaussian prior.
Called by `head.py`. Pure NumPy, by Newton's method with conjugate gradients, so no matrix of all features is ever built.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_MAX_NEWTON, _MAX_CG, _MAX_HALVINGS = 50, 250, 30


@dataclass(frozen=True, slots=True)
class Blocks:
    """Features with d numbers each, sparse and sorted by feature: entry e adds `values[:, e]`, `[d, E]`, to row `rows[e]`."""

    rows: np.ndarray
    counts: np.ndarray
    """Entries of each feature, `[q]`, at least 1."""
    values: np.ndarray

    def dot(self, theta: np.ndarray, num_rows: int) -> np.ndarray:
        """Return X theta, `[n]`, for theta `[d, q]`."""
        sums = np.zeros(len(self.rows), np.float32)  # of d numbers; memory traffic is the cost
        for values, part in zip(self.values, theta.astype(np.float32), strict=True):
            sums += values * np.repeat(part, self.counts)
        return np.bincount(self.rows, sums, num_rows)

    def transposed_dot(self, r: np.ndarray, power: int) -> np.ndarray:
        """Return the sum over rows of x^power r, `[d * q]`."""
        of_rows, starts = r.astype(np.float32)[self.rows], np.cumsum(self.counts) - self.counts
        products = (_power(values, power) * of_rows for values in self.values)
        return np.concatenate([np.add.reduceat(each, starts, dtype=np.float64) for each in products])


class Design:
    """X, `[n, p + d q]`, sparse: p features with one number in each row that has them, then q features with d numbers.

    Args:
        lengths: Entries of each row, `[n]`.
        columns: Feature of each entry, row by row, `[E]`; every feature from 0 to p - 1 has one.
        values: Its number, `[E]`.
        blocks: The features with d numbers, if there are any.
    """

    def __init__(
        self, lengths: np.ndarray, columns: np.ndarray, values: np.ndarray, blocks: Blocks | None = None
    ) -> None:
        # Entries in both orders: sums over neighbours are several times as fast as sums over scattered ones.
        order = np.argsort(columns, kind="stable")
        rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._lengths, self._columns, self._values = lengths, columns, values
        self._rows_by_column, self._values_by_column = rows[order], values[order]
        counts = np.bincount(columns)
        self._column_starts = np.cumsum(counts) - counts
        self._filled = np.flatnonzero(lengths)
        self._row_starts = (np.cumsum(lengths) - lengths)[self._filled]
        self.num_rows, self.num_columns, self._blocks = len(lengths), len(counts), blocks

    @property
    def num_features(self) -> int:
        """Coefficients: p + d q."""
        return self.num_columns + (0 if self._blocks is None else len(self._blocks.values) * len(self._blocks.counts))

    def dot(self, theta: np.ndarray) -> np.ndarray:
        """Return X theta, `[n]` float64."""
        found = np.zeros(self.num_rows)
        if len(self._filled):
            found[self._filled] = np.add.reduceat(self._values * theta[self._columns], self._row_starts)
        if self._blocks is not None:
            of_blocks = theta[self.num_columns :].reshape(len(self._blocks.values), -1)
            found += self._blocks.dot(of_blocks, self.num_rows)
        return found

    def transposed_dot(self, r: np.ndarray, power: int = 1) -> np.ndarray:
        """Return X' r, or with another power the sum over rows of x^power r, of each feature, `[p + d q]` float64."""
        found = np.zeros(self.num_columns)
        if self.num_columns:
            found = np.add.reduceat(
                _power(self._values_by_column, power) * r[self._rows_by_column], self._column_starts
            )
        return found if self._blocks is None else np.concatenate([found, self._blocks.transposed_dot(r, power)])


def fit_ridge(
    design: Design, fits: np.ndarray, penalties: np.ndarray, start: np.ndarray, tolerance: float = 1e-6
) -> np.ndarray:
    """Return the theta that maximises sum of log sigmoid(x . theta) - sum of penalties * theta^2 / 2, `[p + d q]` float64.

    Args:
        design: What is known of the pairs.
        fits: Which pairs count, `[n]` bool.
        penalties: Above 0, one per coefficient: 1 / variance of its prior.
        start: Where to start; only the time depends on it.
        tolerance: Ends when the gradient is this small, relative to that of the likelihood at 0.
    """
    counts = fits.astype(np.float64)
    enough = tolerance * _norm(design.transposed_dot(0.5 * counts))
    theta, margins = start, design.dot(start)
    for _ in range(_MAX_NEWTON):
        wrong = counts * sigmoid(-margins)
        slope = design.transposed_dot(wrong) - penalties * theta
        if _norm(slope) <= enough:
            break
        step = _newton_step(design, wrong * (1 - wrong), penalties, slope, 0.1)
        along = design.dot(step)
        size = _step_size(lambda s: _objective(counts, penalties, theta + s * step, margins + s * along))  # noqa: B023
        if size == 0:  # rounding: no step is better
            break
        theta, margins = theta + size * step, margins + size * along
    return theta


def _power(values: np.ndarray, power: int) -> np.ndarray:
    return values if power == 1 else values**power


def _newton_step(
    design: Design, curvatures: np.ndarray, penalties: np.ndarray, slope: np.ndarray, tolerance: float
) -> np.ndarray:
    """Return H^-1 slope, nearly, by conjugate gradients preconditioned with the diagonal of H = X' C X + penalties."""
    diagonal = design.transposed_dot(curvatures, 2) + penalties
    step, residual = np.zeros_like(slope), slope
    scaled = residual / diagonal
    direction, size = scaled, _inner(residual, scaled)
    enough = tolerance**2 * size
    for _ in range(_MAX_CG):
        if size <= enough:
            break
        image = design.transposed_dot(curvatures * design.dot(direction)) + penalties * direction
        length = size / _inner(direction, image)
        step = step + length * direction
        residual = residual - length * image
        scaled = residual / diagonal
        size, before = _inner(residual, scaled), size
        direction = scaled + (size / before) * direction
    return step


def _objective(counts: np.ndarray, penalties: np.ndarray, theta: np.ndarray, margins: np.ndarray) -> float:
    """Return what is minimised."""
    return _inner(counts, np.logaddexp(0.0, -margins)) + 0.5 * _inner(penalties, theta**2)


def _step_size(objective: Callable[[float], float]) -> float:
    """Return 1, or the largest half, quarter and so on that is not worse than 0; 0 if none is."""
    at_start = objective(0.0)
    for halvings in range(_MAX_HALVINGS):
        if objective(0.5**halvings) <= at_start:
            return float(0.5**halvings)
    return 0.0


def _inner(left: np.ndarray, right: np.ndarray) -> float:
    """Return the inner product, not by BLAS: its threads would change the last digits, and cost more than they save."""
    return float(np.einsum("i,i->", left, right))


def _norm(values: np.ndarray) -> float:
    return math.sqrt(_inner(values, values))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), without overflow."""
    found: np.ndarray = 0.5 * (1 + np.tanh(0.5 * x))
    return found
