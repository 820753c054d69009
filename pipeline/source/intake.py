"""Reads the whole source into pairs, sorted by pair_id, and rows for quarantine.

Called by prepare and by the dry run. Does not know the store: the pairs are compared with it in `compare.py`.
"""

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.dataset_section import DatasetSection
from pipeline.source.answers import read_pairs
from pipeline.source.columns import Columns, resolve_columns
from pipeline.source.external_sort import ExternalSort
from pipeline.source.load import open_source
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from pipeline.source.rows import RawRow, Source, batches, with_split
from weights_store.errors import InputError
from weights_store.messages import logger
from weights_store.schemas import QUARANTINE, Reason

_log = logger(__name__)

ROWS_PER_BATCH = 2000
"""Rows of the source that are Python objects at a time."""
_BATCH_CHARACTERS = 16 << 20
_SAY_EVERY_S = 10.0
_RAW_CHARACTERS = 2000
_EXAMPLE_CHARACTERS = 100
PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("source_row", pa.int64()),
        ("split", pa.string()),
        ("pair", pa.string()),
        ("chosen_score", pa.float32()),
        ("rejected_score", pa.float32()),
    ]
)


def read_source(dataset: DatasetSection) -> Iterator[tuple[RawRow, Pair | Unusable]]:
    """Yield each row of a recipe's source with its pair, or with the reason why it has none.

    Raises:
        InputError: The source cannot be read, or lacks a column.
    """
    source = open_source(dataset)
    yield from pairs_of(source, resolve_columns(dataset, source))


def pairs_of(
    source: Source, columns: Columns, others: Collection[str] = ()
) -> Iterator[tuple[RawRow, Pair | Unusable]]:
    """Yield each row of an opened source with its pair, or with the reason why it has none.

    A row with several answers comes once for each of its pairs. The rows have the columns that are needed, and `others`.
    """
    for row in source.rows({*columns.needed(), *others}):
        row = with_split(row, columns.split)
        if row.reason is not None:
            yield row, Unusable(row.reason, row.detail)
            continue
        try:
            yield from ((row, found) for found in read_pairs(row.value or {}, columns))
        except RecursionError:
            yield row, Unusable(Reason.UNPARSABLE_JSON, "its values are nested too deeply")


@dataclass
class Intake:
    """The pairs of a source (JSON text, sorted by pair_id) and the rows that are no pairs, with counts of the reasons."""

    dataset: DatasetSection
    source: Source
    columns: Columns
    pairs: ExternalSort
    unusable: ExternalSort
    reasons: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    """A row with several answers counts once for each of its pairs."""
    num_unscored: int = 0
    """Pairs without a score on one side or on both."""
    num_odd_scores: int = 0
    """Scores that are no numbers that float32 can hold."""
    num_ignored_prompts: int = 0
    """Pairs whose prompt column contradicts the chats beside it, and is a prompt by its name only."""
    examples: dict[str, str] = field(default_factory=dict)
    """What the first unusable row of each reason looks like."""

    def read(self) -> None:
        """Read every row of the source.

        Raises:
            InputError: The source cannot be read.
        """
        rows, said_at = pairs_of(self.source, self.columns), time.monotonic()
        for batch in batches(rows, ROWS_PER_BATCH, _BATCH_CHARACTERS, _num_characters):
            pairs, unusable = [], []
            for row, found in batch:
                if isinstance(found, Pair):
                    pairs.append(_pair_record(row, found))
                    self._count_scores(row, found)
                    self._count_ignored_prompt(row, found)
                else:
                    raw = row.raw or _raw_text(row)
                    self.reasons[found.reason.value] += 1
                    self.add_example(found, row.source_row, raw)
                    unusable.append(quarantine_row(row.source_row, raw, found))
            self.num_rows += len(batch)
            self.pairs.add(pa.Table.from_pylist(pairs, PAIRS))
            self.unusable.add(pa.Table.from_pylist(unusable, QUARANTINE))
            if time.monotonic() - said_at > _SAY_EVERY_S:  # nobody knows how many there are
                said_at = time.monotonic()
                _log.info(f"prepare: {self.num_rows} rows read, {self.pairs.num_rows} of them are pairs")
        self._warn()

    def _warn(self) -> None:
        """Say what was left out of the pairs."""
        if self.num_ignored_prompts:
            _log.warning(
                f"prepare: column {self.columns.prompt!r} is not read in {self.num_ignored_prompts:,} pairs, because it is not "
                f"the prompt of the chats in {' and '.join(map(repr, self.columns.responses))}; "
                f'{self.examples["ignored prompt"]}; set dataset.prompt_column to another column, or to "" for none'
            )
        if self.num_odd_scores:
            _log.warning(
                f"prepare: {self.num_odd_scores:,} scores are stored as null, because they are no finite numbers of float32; "
                f"{self.examples['odd score']}"
            )

    def _count_scores(self, row: RawRow, pair: Pair) -> None:
        scores = {self.columns.chosen_score: pair.chosen_score, self.columns.rejected_score: pair.rejected_score}
        self.num_unscored += None in (pair.chosen_score, pair.rejected_score)
        for column, score in scores.items():
            value = (row.value or {}).get(column or "")
            if score is None and value is not None:
                self.num_odd_scores += 1
                self.examples.setdefault("odd score", f"the first one, in row {row.source_row}, is {str(value)[:40]!r}")

    def _count_ignored_prompt(self, row: RawRow, pair: Pair) -> None:
        if pair.ignores_prompt:
            self.num_ignored_prompts += 1
            self.examples.setdefault("ignored prompt", f"the first one is in row {row.source_row}")

    def add_example(self, problem: Unusable, source_row: int, raw: str) -> None:
        """Keep the first unusable row of each reason for `explain`."""
        start = f"{raw[:_EXAMPLE_CHARACTERS]}…" if len(raw) > _EXAMPLE_CHARACTERS else raw
        reason = problem.reason.value
        self.examples.setdefault(reason, f"{reason}: row {source_row}: {problem.detail}, in {start}")

    def explain(self, reasons: Counter[str]) -> str:
        """Return how often each reason occurs, in brackets, and an example of each."""
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "the source is empty"
        examples = [self.examples[reason] for reason, _ in reasons.most_common() if reason in self.examples]
        return _storable("; ".join([f"({counts})", *examples]))

    def no_usable_pair(self, reasons: Counter[str]) -> InputError:
        """Return the error for a source in which no row can be used, with one example of each reason."""
        what = f"dataset.source {self.dataset.source}: no usable pair in {self.num_rows} rows"
        return InputError(f"{what} {self.explain(reasons)}")


def _num_characters(found: tuple[RawRow, Pair | Unusable]) -> int:
    return found[1].num_characters if isinstance(found[1], Pair) else 0


def _pair_record(row: RawRow, pair: Pair) -> dict[str, object]:
    return {
        "pair_id": pair.pair_id,
        "source_row": row.source_row,
        "split": row.split,
        "pair": pair.to_json(),
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
    }


def _raw_text(row: RawRow) -> str:
    try:
        return json.dumps(row.value, default=str, ensure_ascii=True)
    except (RecursionError, ValueError):
        return "(nested too deeply to be shown)"


def quarantine_row(source_row: int, raw: str, problem: Unusable, pair_id: str | None = None) -> dict[str, object]:
    """Return the quarantine record of a row of the source, or of one pair in it."""
    # With the pair: several pairs may stand in one row, and row and detail are the key of the table.
    detail = problem.detail if pair_id is None else f"{problem.detail} (pair {pair_id})"
    return {
        "source_row": source_row,
        "pair_id": pair_id,
        "reason": problem.reason.value,
        "detail": _storable(detail),
        "raw": stored_raw(raw),
    }


def stored_raw(text: str) -> str:
    """Return what quarantine keeps of a row: its first 2,000 characters."""
    return _storable(text[:_RAW_CHARACTERS])


def _storable(text: str) -> str:
    """Return `text` with lone surrogates, which Parquet cannot hold, made visible as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
