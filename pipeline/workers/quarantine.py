"""Pairs that a model cannot take go to the quarantine of their dataset, with the reason."""

from typing import Any

import pyarrow as pa

from pipeline.workers.request import Request, Target
from weights_store import WeightStore
from weights_store.schemas import QUARANTINE, Reason


def unscorable_row(row: dict[str, Any], detail: str) -> dict[str, Any]:
    """Return the quarantine row of a pair of the tokens table."""
    return {
        "source_row": row["source_row"],
        "pair_id": row["pair_id"],
        "reason": Reason.UNSCORABLE.value,
        "detail": detail,
        "raw": row["prompt"][:2000],
    }


def quarantine_path(tokens_table: str) -> str:
    """Return the quarantine that belongs to a tokens table."""
    return tokens_table.replace("tokens/", "quarantine/", 1)


def quarantine(request: Request, target: Target, rows: list[dict[str, Any]]) -> None:
    """Put unscorable pairs into quarantine, once each, however often scoring is repeated."""
    table = WeightStore(request.store).table(quarantine_path(request.tokens_table))
    marked = [{**row, "detail": f"{target.table}: {row['detail']}"} for row in rows]
    table.append(pa.Table.from_pylist(marked, QUARANTINE), table.metadata())
