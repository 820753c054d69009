"""What follows the computation of a chunk: its commit, the quarantine of pairs that a model cannot take, and the progress."""

import time
from collections.abc import Callable

import polars as pl
import pyarrow as pa

from pipeline.workers.pair_row import QuarantineRow
from pipeline.workers.request import DONE, Request, Stage, Target
from weights_store import WeightStore
from weights_store.errors import ScoringError
from weights_store.messages import Progress, show
from weights_store.names import quarantine_path
from weights_store.schemas import QUARANTINE


def commit_metadata(
    target: Target, num_pairs: int, num_tokens: int, wall_s: float, engine: dict[str, object]
) -> dict[str, object]:
    """Return what a commit records: identity and lineage, counts, seconds of computing, how the engine ran."""
    statistics = {"num_pairs": num_pairs, "num_tokens": num_tokens, "wall_s": round(wall_s, 3)}
    return {**target.metadata, "statistics": statistics, "engine": engine}


def quarantine(request: Request, target: Target, rows: list[QuarantineRow]) -> None:
    """Put unscorable pairs into quarantine, once each, however often scoring is repeated."""
    if not rows:
        return
    table = WeightStore(request.tokens.store).table(quarantine_path(request.tokens.table))
    # With the pair: several pairs may stand in one row of the source, and row and detail are the key of the table.
    marked = [{**row, "detail": f"{target.table}: {row['detail']} (pair {row['pair_id']})"} for row in rows]
    table.append(pa.Table.from_pylist(marked, QUARANTINE), table.metadata())


class Appender:
    """Puts chunk after chunk into the table of a target, and what could not be computed into quarantine."""

    def __init__(self, request: Request, target: Target) -> None:
        self._request, self._target = request, target
        self._table = WeightStore(request.tokens.store).table(target.table)
        # Holds none of the pairs to come, so an append looks only at what others have added since.
        self._known = self._table.version()

    def append(self, filled: pa.Table, unscorable: list[QuarantineRow], metadata: dict[str, object]) -> None:
        """Commit the rows of one chunk."""
        quarantine(self._request, self._target, unscorable)
        if filled.num_rows:
            reference = self._table.append(filled, metadata, self._known)
            if reference.version == (0 if self._known is None else self._known + 1):
                self._known = reference.version  # nobody else has written: the next append need not look at ours


def check_filled(request: Request, target: Target, num_pairs: int) -> None:
    """Refuse to go on if no pair could be computed.

    Raises:
        ScoringError: The target's table does not exist.
    """
    store, where = WeightStore(request.tokens.store), quarantine_path(request.tokens.table)
    if store.table(target.table).exists() and store.table(target.table).num_rows():
        return
    of_target = store.table(where).scan().filter(pl.col("detail").str.starts_with(f"{target.table}: "))
    first = of_target.sort("source_row").head(1).collect()
    example = (
        f", for example row {first['source_row'][0]}: {first['detail'][0].partition(': ')[2]}" if first.height else ""
    )
    raise ScoringError(
        f"none of {num_pairs} pairs could be {DONE[request.stage]} with {request.model_of(target)}{example}; see {where}"
    )


class Tally:
    """Counts tokens and shows every change; log handlers decide how often to print. The work began `since_s` ago."""

    def __init__(self, stage: Stage, role: str, num_tokens: int, since_s: float = 0.0) -> None:
        self._name, self._total, self._done = f"{stage} {role}", num_tokens, 0
        self._started = time.monotonic() - since_s
        self._show(0)

    def within(self, num_tokens: int) -> Callable[[float], None]:
        """Return a function that shows a share of the next `num_tokens` as done; several may be going on."""
        own = 0

        def show_share(share: float) -> None:
            nonlocal own
            own, before = int(share * num_tokens), own
            self._done += own - before
            self._show(self._done)

        return show_share

    def add(self, num_tokens: int) -> None:
        """Count tokens that are done and committed."""
        self._done += num_tokens
        self._show(self._done)

    def _show(self, done: int) -> None:
        show(Progress(self._name, done, self._total, time.monotonic() - self._started))
