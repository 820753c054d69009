"""What a commit of computed rows records, and the refusal of a table that stays empty."""

from pipeline.workers.quarantine import quarantine_path
from pipeline.workers.request import DONE, Request, Target
from weights_store import WeightStore
from weights_store.errors import ScoringError


def check_filled(request: Request, target: Target, num_pairs: int) -> None:
    """Refuse to go on if no pair could be computed.

    Raises:
        ScoringError: The target's table does not exist.
    """
    if not WeightStore(request.tokens.store).table(target.table).exists():
        where = quarantine_path(request.tokens.table)
        raise ScoringError(f"none of {num_pairs} pairs could be {DONE[request.stage]}; see {where}")


def commit_metadata(
    target: Target, num_pairs: int, num_tokens: int, wall_s: float, engine: dict[str, object]
) -> dict[str, object]:
    """Return what a commit records: identity and lineage, counts, seconds of computing, how the engine ran."""
    statistics = {"num_pairs": num_pairs, "num_tokens": num_tokens, "wall_s": round(wall_s, 3)}
    return {**target.metadata, "statistics": statistics, "engine": engine}
