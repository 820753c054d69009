"""Scores pairs: per-token log-probs of both responses, by the engine of a request."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.engine.contract import Engine
from pipeline.engine.replies import NOT_FINITE
from pipeline.engine.score_once import Reply, Scores, Shared
from pipeline.workers.pair_row import PairRow, QuarantineRow, why_not
from pipeline.workers.request import Request, Target, Worker
from weights_store.errors import InputError, ScoringError
from weights_store.messages import logger
from weights_store.schemas import LOGPS, SIDES

_log = logger(__name__)

_GIVE_UP_AFTER = 32
"""So many pairs without a finite log-prob, and none with, are the fault of the model."""


class PairScorer(Worker):
    """The request's engine: pairs in, rows of a logps table out.

    Raises:
        InputError: vLLM cannot load the model, or a target asks for more tokens per position than the vocabulary has.
        MissingExtraError: vLLM is not installed.
        OutOfMemoryError: There is not enough memory for the engine.
    """

    def __init__(self, request: Request) -> None:
        from pipeline.engine.vllm_engine import VllmEngine

        _log.info(f"starting the engine for {request.model}")
        self._request, self._model = request, request.model
        self.engine: Engine = VllmEngine(Path(request.model), request.engine)
        self._num_not_finite: int | None = 0  # None once a pair was scored
        top_k = max((target.top_k for target in request.targets), default=0)
        if top_k > self.engine.vocab_size:
            raise InputError(
                f"score.top_k is {top_k}, the vocabulary of {request.model} has {self.engine.vocab_size} ids"
            )

    @property
    def record(self) -> dict[str, object]:
        """How the engine runs, for the lineage; only the dtype changes numbers."""
        settings = {**asdict(self._request.engine), "batch_tokens": self.engine.batch_tokens}
        del settings["num_halvings"]
        return {**settings, "way": self.engine.way, "restarts": self._request.restarts}

    def use(self, model: str) -> None:
        """Go on with another model: the engine stays, its weights are exchanged.

        Raises:
            EngineError: This vLLM cannot exchange weights; a new engine can load them.
        """
        if model != self._model:
            _log.info(f"the engine goes on with the weights of {model}")
            self.engine.load(Path(model))
            self._model, self._num_not_finite = model, 0

    def fill_in(
        self, pairs: Sequence[PairRow], target: Target, progress: Callable[[float], None] = lambda share: None
    ) -> tuple[pa.Table, list[QuarantineRow]]:
        """Return the log-probs of the pairs that could be scored, and a quarantine row for each other.

        Raises:
            ScoringError: The model has given nothing but NaN and infinities so far.
        """
        return self.begin(pairs, target, progress)()

    def begin(
        self, pairs: Sequence[PairRow], target: Target, progress: Callable[[float], None] = lambda share: None
    ) -> Callable[[], tuple[pa.Table, list[QuarantineRow]]]:
        """Queue pairs in the engine, behind those begun before; the function that is returned does what `fill_in` does."""
        finish = begin_pairs(self.engine, pairs, target.top_k, progress)

        def checked() -> tuple[pa.Table, list[QuarantineRow]]:
            scored, unscorable = finish()
            self._check_finite(scored.num_rows, unscorable)
            return scored, unscorable

        return checked

    def _check_finite(self, num_scored: int, unscorable: Sequence[QuarantineRow]) -> None:
        if num_scored or self._num_not_finite is None:
            self._num_not_finite = None
            return
        not_finite = [row for row in unscorable if NOT_FINITE in row["detail"]]
        self._num_not_finite += len(not_finite)
        if self._num_not_finite >= _GIVE_UP_AFTER:
            raise ScoringError(
                f"the model {self._model} gives no finite log-probs: none for the first {self._num_not_finite} pairs, "
                f"for example pair {not_finite[0]['pair_id']}, {not_finite[0]['detail']}; its weights hold NaN or infinities, "
                f"or overflow in {self._request.engine.dtype}: check the files, or set score.dtype"
            )


def score_pairs(engine: Engine, pairs: Sequence[PairRow]) -> tuple[pa.Table, list[QuarantineRow]]:
    """Return rows of a logps table for the pairs that could be scored, and a quarantine row for each other."""
    return begin_pairs(engine, pairs)()


def begin_pairs(
    engine: Engine,
    pairs: Sequence[PairRow],
    top_k: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Callable[[], tuple[pa.Table, list[QuarantineRow]]]:
    """Queue pairs in an engine, and return a function that waits for them and returns what `score_pairs` does.

    If `top_k` > 0, the rows have the k most likely tokens at each position too.
    """
    problems = [why_not(pair, engine.vocab_size, engine.max_tokens) for pair in pairs]
    good = [pair for pair, problem in zip(pairs, problems, strict=True) if problem is None]
    shared = Shared([sequence for pair in good for sequence in pair.sequences(top_k)])
    wait = engine.begin(shared.wanted, as_share(sum(each.num_wanted for each in shared.wanted), progress))

    def finish() -> tuple[pa.Table, list[QuarantineRow]]:
        replies = shared.replies(wait(), engine.score)
        scored, refused = _rows(good, replies)
        unscorable = [pair.unscorable(problem) for pair, problem in zip(pairs, problems, strict=True) if problem]
        return scored, unscorable + refused

    return finish


def _rows(pairs: Sequence[PairRow], replies: Sequence[Reply]) -> tuple[pa.Table, list[QuarantineRow]]:
    """Return rows of a logps table, and a quarantine row for each pair with a response that has no scores."""
    scored: list[dict[str, object]] = []
    unscorable: list[QuarantineRow] = []
    for pair, chosen, rejected in zip(pairs, replies[::2], replies[1::2], strict=True):
        if isinstance(chosen, Scores) and isinstance(rejected, Scores):
            scored.append({"pair_id": pair.pair_id, **_columns("chosen", chosen), **_columns("rejected", rejected)})
        else:
            sides = zip(SIDES, (chosen, rejected), strict=True)
            refused = [f"{side}: {reply}" for side, reply in sides if isinstance(reply, ScoringError)]
            unscorable.append(pair.unscorable("; ".join(refused)))
    return pa.Table.from_pylist(scored, LOGPS), unscorable


def _columns(side: str, scores: Scores) -> dict[str, np.ndarray | None]:
    """Return the columns of one response; those of the most likely tokens are flat, or null if nobody asked for them."""
    has_top = scores.top_ids.shape[1] > 0
    return {
        f"{side}_logps": scores.logps,
        f"{side}_top_ids": scores.top_ids.ravel() if has_top else None,
        f"{side}_top_logps": scores.top_logps.ravel() if has_top else None,
    }


def as_share(total: int, progress: Callable[[float], None]) -> Callable[[int], None]:
    """Return a function that adds up what is done and calls `progress` with its share of the total, 0 to 1."""
    done = 0

    def count(num_done: int) -> None:
        nonlocal done
        done += num_done
        progress(min(1.0, done / total))

    return count
