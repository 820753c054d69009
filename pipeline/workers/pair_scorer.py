"""Scores pairs: rows of the tokens table in, per-token log-probs of both responses out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.engine.contract import Engine
from pipeline.engine.score_once import ScoredSequence, Scores, score_once
from pipeline.source.chat import Condition
from pipeline.workers.quarantine import unscorable_row
from pipeline.workers.request import Request, Target
from weights_store.errors import InputError, ScoringError
from weights_store.messages import logger
from weights_store.schemas import LOGPS

_log = logger(__name__)


class PairScorer:
    """The request's engine and tokenizer: rows of the tokens table in, rows of a logps table out.

    Args:
        request: What is scored with what.

    Raises:
        InputError: vLLM cannot load the model, or a target wants more likely tokens than the vocabulary has.
        OutOfMemoryError: There is not enough memory for the engine.
    """

    def __init__(self, request: Request) -> None:
        from pipeline.engine.vllm_engine import EngineSettings, VllmEngine
        from pipeline.source.chat import ChatTokenizer

        conditioned = any(target.condition for target in request.targets)
        self._tokenizer = ChatTokenizer(Path(request.tokenizer), request.chat_template) if conditioned else None
        _log.info(f"starting the engine for {request.model}")
        self._settings = {key: value for key, value in request.engine.items() if key != "restarts"}
        self._restarts = request.engine.get("restarts", [])
        self.engine: Engine = VllmEngine(Path(request.model), EngineSettings(**self._settings))
        top_k = max((target.top_k for target in request.targets), default=0)
        if top_k > self.engine.vocab_size:
            raise InputError(
                f"score.top_k is {top_k}, the vocabulary of {request.model} has {self.engine.vocab_size} ids"
            )

    @property
    def record(self) -> dict[str, Any]:
        """How the engine runs, for the lineage: none of it but the dtype changes numbers."""
        return {**self._settings, "way": self.engine.way, "restarts": self._restarts}

    def under_condition(self, rows: pl.DataFrame, target: Target) -> pl.DataFrame:
        """Put the target's contrastive prompt into the prompts; null where the chat has no place for it."""
        if target.condition is None or self._tokenizer is None:
            return rows
        condition = Condition(**target.condition)  # type: ignore[arg-type]
        prompt_ids = self._tokenizer.conditioned_prompt_ids(rows["prompt"].to_list(), condition)
        return rows.with_columns(pl.Series("prompt_ids", prompt_ids, pl.List(pl.Int32)))

    def fill_in(
        self, rows: pl.DataFrame, target: Target, progress: Callable[[float], None] = lambda share: None
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the log-probs of the pairs that could be scored, and a quarantine row for each other."""
        return self.score(rows, progress, target.top_k)

    def score(
        self, rows: pl.DataFrame, progress: Callable[[float], None] = lambda share: None, top_k: int = 0
    ) -> tuple[pa.Table, list[dict[str, Any]]]:
        """Return the log-probs of the pairs that could be scored, and a quarantine row for each other.

        Args:
            rows: Of the tokens table.
            progress: Gets the share of the rows that is done, 0 to 1.
            top_k: How many of the likeliest tokens at each place are scored as well.
        """
        good: list[dict[str, Any]] = []
        unscorable: list[dict[str, Any]] = []
        for row in rows.iter_rows(named=True):
            problem = why_not(row, self.engine.max_tokens, self.engine.vocab_size)
            if problem is None:
                good.append(row)
            else:
                unscorable.append(unscorable_row(row, problem))
        sequences = [
            ScoredSequence(row["prompt_ids"], row[f"{side}_ids"], top_k=top_k)
            for row in good
            for side in ("chosen", "rejected")
        ]
        replies = score_once(sequences, lambda wanted: self.engine.score(wanted, _counter(wanted, progress)))
        scored: list[dict[str, Any]] = []
        for row, chosen, rejected in zip(good, replies[::2], replies[1::2], strict=True):
            if isinstance(chosen, ScoringError) or isinstance(rejected, ScoringError):
                sides = (("chosen", chosen), ("rejected", rejected))
                refused = [f"{side}: {reply}" for side, reply in sides if isinstance(reply, ScoringError)]
                unscorable.append(unscorable_row(row, "; ".join(refused)))
                continue
            scored.append({"pair_id": row["pair_id"], **_columns("chosen", chosen), **_columns("rejected", rejected)})
        columns = {name: [row[name] for row in scored] for name in LOGPS.names}
        return pa.Table.from_pydict(columns, LOGPS), unscorable


def why_not(row: dict[str, Any], max_tokens: int, vocab_size: int) -> str | None:
    """Return why a pair cannot be computed. The model must not see it: some of these would kill an engine."""
    if row["prompt_ids"] is None:
        return "the chat has no place for the contrastive prompt"
    ids = (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    if not all(ids):
        return "prompt or response has no tokens"
    longest = len(ids[0]) + max(len(ids[1]), len(ids[2]))
    if longest > max_tokens:
        return f"prompt and response have {longest} tokens, the model takes {max_tokens}"
    if min(map(min, ids)) < 0 or max(map(max, ids)) >= vocab_size:
        return f"a token id is outside the model's vocabulary of {vocab_size}"
    return None


def _columns(side: str, scores: Scores) -> dict[str, np.ndarray | None]:
    """Return the columns of one response; those of the likeliest tokens are flat, null where there are none."""
    has_top = scores.top_ids.shape[1] > 0
    return {
        f"{side}_logps": scores.logps,
        f"{side}_top_ids": scores.top_ids.ravel() if has_top else None,
        f"{side}_top_logps": scores.top_logps.ravel() if has_top else None,
    }


def _counter(sequences: list[ScoredSequence], progress: Callable[[float], None]) -> Callable[[int], None]:
    total, done = sum(sequence.num_wanted for sequence in sequences), 0

    def count(num_tokens: int) -> None:
        nonlocal done
        done += num_tokens
        progress(min(1.0, done / total))

    return count
