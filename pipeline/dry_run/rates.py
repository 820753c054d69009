"""How fast a stage was in a store, from what its commits recorded. Called by `plan.py`."""

from collections.abc import Iterator

from pipeline.workers.request import Stage
from pipeline.workers.supervise import FOLDERS
from weights_store import Table, WeightStore

_MEASURED_COMMITS = 20


def tokens_per_s(store: WeightStore, stage: Stage, role: str) -> float | None:
    """Return the rate of a stage's last 20 commits for models in one role; None if the store has none.

    Tokens are those of prompt, chosen and rejected, each once per pair. The start of the model is not in the rate.
    """
    measured = [commit for table in store.tables(FOLDERS[stage]) for commit in _measured(table, role)]
    last = sorted(measured, reverse=True)[:_MEASURED_COMMITS]
    return sum(num_tokens for _, num_tokens, _ in last) / sum(wall_s for _, _, wall_s in last) if last else None


def _measured(table: Table, role: str) -> Iterator[tuple[int, int, float]]:
    """Yield time, tokens and seconds of the commits that say how long they took."""
    for commit in table.history(limit=_MEASURED_COMMITS):
        metadata = commit.metadata or {}
        statistics = metadata.get("statistics", {})
        num_tokens, wall_s = statistics.get("num_tokens"), statistics.get("wall_s")
        is_compaction = bool(commit.removed)  # it repeats the statistics of the commit before it
        if metadata.get("role") == role and num_tokens and wall_s and commit.added and not is_compaction:
            yield commit.timestamp_ms or 0, num_tokens, wall_s
