# ruff: noqa: ARG001
"""STAND-INS for the survey, the doctor and the clamps until they are merged; delete this file then.

Each has the name and the arguments of what will replace it. They say nothing that is not true: an empty survey, no diagnosis,
no token at an end of a clamp.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from weights_store.inspection.doctor import Diagnosis
from weights_store.inspection.survey import SideSurvey, Survey
from weights_store.location import Location
from weights_store.schemas import Side
from weights_store.tables.metadata import CommitMetadata
from weights_store.tables.table_reader import TableVersion


def survey(root: Location, weights: TableVersion) -> Survey:
    """Return a survey of no tokens."""
    side = SideSurvey(0, 0, 1.0, np.array([0.5, 2.0]), np.zeros(1, np.int64), np.full(20, np.nan), None, None, 1.0)
    columns = {"token_id": pl.Int32, "side": pl.String, "count": pl.Int64}
    tokens = pl.DataFrame(schema={**columns, "mean_weight": pl.Float64, "share_of_weight": pl.Float64})
    return Survey(side, side, tokens)


def diagnose(root: Location, weights: TableVersion, found: Survey) -> Sequence[Diagnosis]:
    """Return nothing."""
    return ()


def clamped(
    metadata: CommitMetadata, side: Side, weights: np.ndarray, logratios: np.ndarray | None = None
) -> np.ndarray | None:
    """Return None: no clamp is known."""
    return None
