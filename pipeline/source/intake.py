"""Reads the whole source into pairs, sorted by pair_id, and rows for quarantine.

Called by prepare and by the dry run. Does not know the store: the pairs are compared with it in `compare.py`.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice

import pyarrow as pa

from pipeline.recipe import DatasetSection
from pipeline.source.external_sort import ExternalSort
from pipeline.source.messages import Unusable
from pipeline.source.pairs import read_pair
from pipeline.source.splits import load_split_rows
from weights_store.errors import InputError
from weights_store.fingerprint import canonical_json
from weights_store.messages import logger
from weights_store.schemas import QUARANTINE

_log = logger(__name__)

ROWS_PER_BATCH = 2000
"""Rows of the source that are Python objects at a time."""
_RAW_CHARACTERS = 2000
PAIRS = pa.schema([("pair_id", pa.string()), ("source_row", pa.int64()), ("split", pa.string()), ("pair", pa.string())])


@dataclass
class Intake:
    """The pairs of a source (JSON text, sorted by pair_id) and the rows that are no pairs, with counts of the reasons."""

    dataset: DatasetSection
    pairs: ExternalSort
    unusable: ExternalSort
    reasons: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0

    def read(self) -> None:
        """Read every row of the source.

        Raises:
            InputError: The source cannot be read.
        """
        rows = load_split_rows(self.dataset)
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            pairs, unusable = [], []
            for row in batch:
                try:
                    if row.reason is not None:
                        raise Unusable(row.reason, row.detail)
                    pair = read_pair(row.value or {}, self.dataset)
                    text = canonical_json(asdict(pair))
                    pairs.append(
                        {"pair_id": pair.pair_id, "source_row": row.source_row, "split": row.split, "pair": text}
                    )
                except Unusable as problem:
                    raw = row.raw or json.dumps(row.value, default=str, ensure_ascii=True)
                    self.reasons[problem.reason.value] += 1
                    unusable.append(quarantine_row(row.source_row, raw, problem))
            self.num_rows += len(batch)
            self.pairs.add(pa.Table.from_pylist(pairs, PAIRS))
            self.unusable.add(pa.Table.from_pylist(unusable, QUARANTINE))
            if len(batch) == ROWS_PER_BATCH:
                _log.info(f"prepare: {self.num_rows} rows read, {self.pairs.num_rows} of them are pairs")

    def no_usable_pair(self, reasons: Counter[str]) -> InputError:
        """Return the error for a source in which no row can be used."""
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "the source is empty"
        return InputError(f"dataset.source {self.dataset.source}: no usable pair in {self.num_rows} rows ({counts})")


def quarantine_row(source_row: int, raw: str, problem: Unusable) -> dict[str, object]:
    """Return the quarantine record of a row of the source."""
    return {
        "source_row": source_row,
        "pair_id": None,
        "reason": problem.reason.value,
        "detail": _storable(problem.detail),
        "raw": stored_raw(raw),
    }


def stored_raw(text: str) -> str:
    """Return what quarantine keeps of a row: its first 2,000 characters."""
    return _storable(text[:_RAW_CHARACTERS])


def _storable(text: str) -> str:
    """Return `text` with lone surrogates, which Parquet cannot hold, made visible as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
