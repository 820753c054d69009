"""Pairs that a model cannot take go to the quarantine of their dataset, with the reason."""

import pyarrow as pa

from pipeline.workers.pair_row import QuarantineRow
from pipeline.workers.request import Request, Target
from weights_store import WeightStore
from weights_store.schemas import QUARANTINE


def quarantine_path(tokens_table: str) -> str:
    """Return the quarantine that belongs to a tokens table."""
    return tokens_table.replace("tokens/", "quarantine/", 1)


def quarantine(request: Request, target: Target, rows: list[QuarantineRow]) -> None:
    """Put unscorable pairs into quarantine, once each, however often scoring is repeated."""
    if not rows:
        return
    table = WeightStore(request.tokens.store).table(quarantine_path(request.tokens.table))
    marked = [{**row, "detail": f"{target.table}: {row['detail']}"} for row in rows]
    table.append(pa.Table.from_pylist(marked, QUARANTINE), table.metadata())
