"""What a commit of computed rows records, and the refusal of a table that stays empty."""

from typing import Any

from pipeline.workers.quarantine import quarantine_path
from pipeline.workers.request import Request, Target
from weights_store import WeightStore
from weights_store.errors import ScoringError


def check_filled(request: Request, target: Target, num_pairs: int) -> None:
    """Refuse to go on with nothing at all.

    Raises:
        ScoringError: The target's table does not exist.
    """
    if not WeightStore(request.store).table(target.table).exists():
        done = {"score": "scored", "attribute": "attributed", "anchors": "given an anchor"}[request.stage]
        raise ScoringError(f"none of {num_pairs} pairs could be {done}; see {quarantine_path(request.tokens_table)}")


def commit_metadata(
    target: Target, num_pairs: int, num_tokens: int, wall_s: float, engine: dict[str, Any]
) -> dict[str, Any]:
    """Return what a commit records: identity and lineage, counts, seconds of computing, how the engine ran."""
    statistics = {"num_pairs": num_pairs, "num_tokens": num_tokens, "wall_s": round(wall_s, 3)}
    return {**target.metadata, "statistics": statistics, "engine": engine}
