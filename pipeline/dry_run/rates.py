"""How long stages take and how much they write: measured in a store's history, else stated here. Called by `plan.py`.

The stated numbers are of two CPU cores and models of a few million parameters, and say no more than the order of magnitude. A
store's first build replaces those of the stages that run a model over all pairs by its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from pipeline.workers.request import Stage
from pipeline.workers.supervise import FOLDERS
from weights_store import Table, WeightStore

RateSource = Literal["measured", "stated"]

TOKENS_PER_S: dict[Stage, float] = {"score": 20_000, "attribute": 7_000, "anchors": 5_500}
"""Tokens of prompt, chosen and rejected, each once per pair, also where those that are sampled behind the prompt count."""
ENGINE_START_S = 20.0
ATTRIBUTE_START_S = 10.0
"""Until torch and transformers are imported and the model is loaded."""
TRAINED_TOKENS_PER_S = 1_400
"""One contrastive model, forward and backward."""
TRAINING_START_S = 40.0
"""Most of it for measuring a sample before and after."""
WEIGHED_TOKENS_PER_S = 1_000_000
"""Response tokens joined, weighed and written."""
REPORT_S = 5.0

TOKENS_BYTES = 2.4
"""A token of the tokens table, the text of the prompt included."""
LOGPS_BYTES = 2.5
"""A response token in a table of log-probs."""
ATTRIBUTION_BYTES = 2.5
"""A response token in a table of attributions; the same again for its activation."""
ANCHOR_BYTES = 3.6
"""A token of an anchor, id and log-prob; the same in a weight dataset."""
TOP_BYTES = 2.8
"""One of the likeliest tokens at its place, id and log-prob; the same in a weight dataset."""
WEIGHTS_BYTES = 5.1
"""A response token of a weight dataset, everything included."""
QUARANTINE_BYTES = 400
"""A row in quarantine."""
COMMIT_BYTES = 6_000
"""A commit in a table's log."""
REPORT_BYTES = 100_000

_MEASURED_COMMITS = 20


class _Measured(NamedTuple):
    """One commit that says how long it took."""

    timestamp_ms: int
    model: str
    num_tokens: int
    wall_s: float


@dataclass(frozen=True)
class StageHistory:
    """What the newest commits of a stage in a store say about its speed."""

    store: WeightStore
    stage: Stage

    def tokens_per_s(self, model: str | None) -> tuple[float, RateSource]:
        """Return the rate of a model (by fingerprint), else of any model here, else the stated one; the start left out."""
        of_model = [commit for commit in self._commits if commit.model == model]
        commits = (of_model or self._commits)[:_MEASURED_COMMITS]
        if not commits:
            return TOKENS_PER_S[self.stage], "stated"
        return sum(commit.num_tokens for commit in commits) / sum(commit.wall_s for commit in commits), "measured"

    @cached_property
    def _commits(self) -> list[_Measured]:
        return sorted((c for table in self.store.tables(FOLDERS[self.stage]) for c in _measured(table)), reverse=True)


def _measured(table: Table) -> Iterator[_Measured]:
    for commit in table.history(limit=_MEASURED_COMMITS):
        metadata = commit.metadata or {}
        statistics = metadata.get("statistics", {})
        num_tokens, wall_s = statistics.get("num_tokens"), statistics.get("wall_s")
        # Older commits do not say how long they took; compaction repeats what the commit before it said.
        if num_tokens and wall_s and commit.added and not commit.removed:
            yield _Measured(commit.timestamp_ms or 0, metadata["scorer"]["model"], num_tokens, wall_s)


def bytes_per_pair(table: Table) -> float | None:
    """Return the bytes of one row of a table's newest version; None where there is none."""
    records = table.records() if table.exists() else []
    num_rows = sum(record.num_rows for record in records)
    return sum(record.num_bytes for record in records) / num_rows if num_rows else None
