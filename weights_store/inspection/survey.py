"""What one pass over all response tokens of a weight dataset counts, in bounded memory."""

from dataclasses import dataclass

import numpy as np
import polars as pl


@dataclass(frozen=True)
class SideSurvey:
    """The token weights of one side."""

    num_responses: int
    num_tokens: int
    mean_weight: float
    edges: np.ndarray
    """Ends of the histogram's bins, `[K + 1]`, the same for both sides; equal steps of log2 of the weight, but for the ends."""
    counts: np.ndarray
    """Tokens in each bin, `[K]`."""
    weight_by_position: np.ndarray
    """Mean weight by relative position in the response, `[20]`: twentieths, NaN where no response has a token."""
    share_at_lower: float | None
    share_at_upper: float | None
    """Shares of tokens whose score is at or beyond an end of the clamp; None if the estimator has no clamp."""
    effective_share: float
    """Mean over responses of (Σw)² / (T Σw²), in (0, 1]: 1 if all tokens of a response weigh the same."""


@dataclass(frozen=True)
class Survey:
    """Both sides, and the tokens that occur often enough to say something about."""

    chosen: SideSurvey
    rejected: SideSurvey
    tokens: pl.DataFrame
    """One row per token id and side: `token_id`, `side`, `count`, `mean_weight`, `share_of_weight` (of the side's total)."""
