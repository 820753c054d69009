"""What prepare would find in a source, without writing anything. Called by `outlook.py`.

The source is read and sorted as prepare does it, and compared with the newest version of its tokens table one range of pair_ids
at a time, in bounded memory. Pairs are counted one by one; of the new ones at most `SAMPLE_PAIRS` are tokenised, and stand for
the others.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.source.pairs import Unusable
from pipeline.stages.prepare import (
    Intake,
    Preparation,
    account_of,
    comparable_version,
    known_rows,
    no_usable_pair,
    recorded_source,
    standing_of,
    stored_raw,
)
from weights_store import Table
from weights_store.schemas import Reason
from weights_store.tables.key_ranges import KeyRange

SAMPLE_PAIRS = 200
_ROWS_PER_BATCH = 2000


@dataclass
class Overlap:
    """How the pairs of the source stand to one table of log-probs."""

    num_new_present: int = 0
    """New pairs that it has already: they had left and came back."""
    gone_absent: set[str] = field(default_factory=set)
    """Pairs that have left and that it does not have."""


@dataclass(frozen=True)
class Survey:
    """A source against the newest version of its tokens table.

    Args:
        num_rows: Rows of the source.
        num_pairs: Pairs that the next version will have.
        num_new: Pairs among them to be tokenised.
        num_gone: Pairs of the newest version that have left the source.
        base: The version whose rows can be kept; None where there is none, or it was read in another way.
        writes_all: All rows are written anew, not only the new ones.
        is_same: Prepare would write nothing.
        is_exact: Every new pair was tokenised; else the sample stands for the others.
        new_tokens: Mean of prompt and response tokens of the sample.
        overlaps: By path, with each table of log-probs.
        seconds: What reading all and tokenising what is new takes on this machine.
    """

    num_rows: int
    num_pairs: int
    num_new: int
    num_gone: int
    base: int | None
    writes_all: bool
    is_same: bool
    is_exact: bool
    new_tokens: tuple[float, float]
    overlaps: dict[str, Overlap]
    seconds: float


def survey(start: Preparation, tables: list[Table]) -> Survey:
    """Read the source and compare it with the newest version.

    Args:
        start: Of the recipe.
        tables: Tables of log-probs over the same pairs.

    Raises:
        InputError: The source cannot be read, or no row of it can be used.
    """
    started = time.monotonic()
    with start.intake() as intake:
        count = _Count(start, tables)
        for piece, rows in intake.pairs.ranges():
            count.add(piece, rows)
        read_s = time.monotonic() - started
        return count.result(intake, read_s)


class _Count:
    """Counts how the pairs of a source stand to the newest version, range by range."""

    def __init__(self, start: Preparation, tables: list[Table]) -> None:
        self.start = start
        self.tables = [table for table in tables if table.exists()]
        self.recorded = recorded_source(start.tokens, start.quarantine)
        self.base = comparable_version(start.tokens.version(), self.recorded, start.source)
        self.standings: Counter[str] = Counter()
        self.num_gone = 0
        self.overlaps = {table.path: Overlap() for table in self.tables}
        self.refused = dict(self._refused()) if self.base is not None else {}
        self.refused_again: Counter[str] = Counter()
        self.refused_texts: list[str] = []
        self.sample = _Sample()

    def _refused(self) -> Iterator[tuple[int, tuple[bytes, str]]]:
        """Yield what the tokenizer has refused before, by row of the source: a digest of the kept text, and the reason."""
        reasons = (Reason.PROMPT_TOO_LONG, Reason.RESPONSE_TOO_LONG, Reason.TEMPLATE_MISMATCH)
        is_refusal = pl.col("reason").is_in([*reasons, Reason.CHOSEN_EQUALS_REJECTED])
        rows = self.start.quarantine.scan().filter(is_refusal).select("source_row", "raw", "reason").collect()
        yield from ((row, (_digest(raw), reason)) for row, raw, reason in rows.iter_rows())

    def add(self, piece: KeyRange, rows: pa.Table) -> None:
        """Count one range of the source."""
        known = known_rows(self.start.tokens, self.base, piece)
        in_source: set[str] = set()
        fresh: list[str] = []
        for begin in range(0, rows.num_rows, _ROWS_PER_BATCH):
            for row in rows.slice(begin, _ROWS_PER_BATCH).to_pylist():
                standing = standing_of(row, known, in_source)
                if standing == "new" and self._was_refused(row):
                    continue
                self.standings[standing] += 1
                if standing == "new":
                    fresh.append(row["pair_id"])
                    self.sample.add(row["pair"])
        gone = known.keys() - in_source
        self.num_gone += len(gone)
        for table in self.tables:
            present = set(piece.of(table.scan()).select("pair_id").collect()["pair_id"])
            self.overlaps[table.path].num_new_present += sum(pair_id in present for pair_id in fresh)
            self.overlaps[table.path].gone_absent |= gone - present

    def _was_refused(self, row: dict[str, Any]) -> bool:
        before = self.refused.get(row["source_row"])
        if before is None or before[0] != _digest(stored_raw(row["pair"])):
            return False
        self.refused_again[before[1]] += 1
        if len(self.refused_texts) < SAMPLE_PAIRS:
            self.refused_texts.append(row["pair"])
        return True

    def result(self, intake: Intake, read_s: float) -> Survey:
        """Tokenise the sample and put everything together."""
        num_fresh, num_refused = self.standings["new"], self.refused_again.total()
        is_exact = num_fresh + num_refused <= SAMPLE_PAIRS
        trial = _Trial()
        if is_exact:  # also what was refused before: only the beginning of its text is known to be the same
            trial.run(intake, self.sample.texts + self.refused_texts)
            num_new, refused = trial.num_usable, trial.reasons
        else:
            trial.run(intake, self.sample.texts)
            num_new, refused = round(num_fresh * trial.usable_share), trial.reasons + self.refused_again
        reasons = intake.reasons + Counter({Reason.DUPLICATE_PAIR.value: self.standings["duplicate"]}) + refused
        num_pairs = self.standings["stays"] + self.standings["moved"] + num_new
        if not num_pairs and is_exact:
            raise no_usable_pair(intake, reasons)
        writes_all = self.base is None or bool(self.num_gone or self.standings["moved"])
        account = account_of(self.start.source, intake.num_rows, reasons)
        return Survey(
            num_rows=intake.num_rows,
            num_pairs=num_pairs,
            num_new=num_new,
            num_gone=self.num_gone,
            base=self.base,
            writes_all=writes_all,
            is_same=not num_new and not writes_all and self.recorded == account,
            is_exact=is_exact,
            new_tokens=trial.mean_tokens,
            overlaps=self.overlaps,
            seconds=read_s + trial.load_s + trial.pair_s * (num_fresh + num_refused),
        )


class _Sample:
    """At most `SAMPLE_PAIRS` texts out of all that are added, each equally likely; the same ones every time."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._num_seen = 0
        self._random = random.Random(0)

    def add(self, text: str) -> None:
        self._num_seen += 1
        if len(self.texts) < SAMPLE_PAIRS:
            self.texts.append(text)
        elif (place := self._random.randrange(self._num_seen)) < SAMPLE_PAIRS:
            self.texts[place] = text


@dataclass
class _Trial:
    """Tokenises some pairs and measures."""

    num_tried: int = 0
    num_usable: int = 0
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    load_s: float = 0.0
    pair_s: float = 0.0

    def run(self, intake: Intake, texts: list[str]) -> None:
        if not texts:
            return
        started = time.monotonic()
        assert intake.tokenizer.eos_token_id >= 0, "asked for so that the tokenizer is loaded"
        loaded = time.monotonic()
        for text in texts:
            self.num_tried += 1
            try:
                columns, _, _ = intake.tokenize(text)
            except Unusable as problem:
                self.reasons[problem.reason.value] += 1
                continue
            self.num_usable += 1
            self.num_prompt_tokens += len(columns["prompt_ids"])
            self.num_response_tokens += len(columns["chosen_ids"]) + len(columns["rejected_ids"])
        self.load_s, self.pair_s = loaded - started, (time.monotonic() - loaded) / len(texts)

    @property
    def usable_share(self) -> float:
        return self.num_usable / self.num_tried if self.num_tried else 1.0

    @property
    def mean_tokens(self) -> tuple[float, float]:
        usable = max(1, self.num_usable)
        return self.num_prompt_tokens / usable, self.num_response_tokens / usable


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
