"""How many pairs and tokens the stages will have, from what `source.py` found. Called by `plan.py`; writes nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import polars as pl
import pyarrow.compute as pc

from pipeline.stages.prepare import Preparation
from pipeline.stages.publish import TO_BE_COMPUTED
from pipeline.workers.missing import missing_pairs
from weights_store import Table, TableVersion
from weights_store.schemas import OF_LATER_STAGES


class Amount(NamedTuple):
    """Pairs, and their tokens: prompt, chosen and rejected, each once."""

    num_pairs: int
    num_tokens: int
    is_exact: bool


@dataclass
class Overlap:
    """How the pairs of the source relate to the table of one model."""

    num_new_present: int = 0
    """New pairs that the table already has: they left the source and came back."""
    gone_absent: set[str] = field(default_factory=set)
    """Pairs that have left the source and that the table does not have."""


@dataclass(frozen=True)
class Outlook:
    """The pairs that a build will have: those of the newest version of the tokens table, changed as the source says."""

    start: Preparation
    num_rows: int
    num_pairs: int
    """Pairs that the next version will have."""
    num_new: int = 0
    num_gone: int = 0
    """Pairs of the newest version that have left the source."""
    base: int | None = None
    """The version whose rows can be kept."""
    writes_all: bool = False
    """Prepare would rewrite all rows, not only append the new ones."""
    is_same: bool = False
    """Prepare would write nothing."""
    is_exact: bool = True
    """Every new pair was tokenised, not only a sample."""
    new_tokens: tuple[float, float] = (0.0, 0.0)
    """Mean of prompt tokens and of response tokens of a new pair."""
    overlaps: dict[str, Overlap] = field(default_factory=dict)
    """By the path of each table that a model has filled for these pairs."""

    @property
    def tokens(self) -> TableVersion:
        """The version of the tokens table that the build will use; its fingerprint may be `TO_BE_COMPUTED`."""
        table = self.start.tokens
        if self.base is not None and not self.num_new and not self.num_gone:
            return table.reference()
        return TableVersion(str(table.root), table.path, table.version() or 0, TO_BE_COMPUTED)

    def all(self) -> Amount:
        """Return the amount of all pairs. Of pairs that left the source only the number is known, so it is then an estimate."""
        return Amount(self.num_pairs, round(sum(self.num_tokens())), self.is_exact and not self.num_gone)

    def num_tokens(self) -> tuple[float, float]:
        """Return the prompt tokens and the response tokens of all pairs."""
        num_old = self.num_pairs - self.num_new
        share = num_old / (num_old + self.num_gone) if num_old else 0.0
        num_prompt_tokens, num_response_tokens = self._stored_tokens
        return (
            num_prompt_tokens * share + self.new_tokens[0] * self.num_new,
            num_response_tokens * share + self.new_tokens[1] * self.num_new,
        )

    def missing_from(self, table: Table | None) -> Amount:
        """Return the amount that has no row in a stage's table. None: the table is not known yet, so everything is missing."""
        if table is None or not table.exists():
            return self.all()
        overlap = self.overlaps.get(table.path, Overlap())
        num_pairs = max(0, self.num_new - overlap.num_new_present)
        num_tokens = num_pairs * sum(self.new_tokens)
        if self.base is not None:
            for part in missing_pairs(self.start.tokens.reference(), table):
                wanted = part.filter(~pl.col("pair_id").is_in(list(overlap.gone_absent)))
                num_pairs += wanted.height
                num_tokens += int(wanted["num_tokens"].sum())
        return Amount(num_pairs, round(num_tokens), self.is_exact)

    def num_unscorable(self, tables: Sequence[str]) -> int:
        """Return the pairs that are in quarantine because one of these tables could not get a row for them."""
        if not self.start.quarantine.exists():
            return 0
        by_one = pl.any_horizontal(pl.col("detail").str.starts_with(f"{path}: ") for path in tables)
        rows = self.start.quarantine.scan().filter(pl.col("reason").is_in(OF_LATER_STAGES) & by_one)
        return int(rows.select(pl.col("pair_id").n_unique()).collect().item())

    @cached_property
    def _stored_tokens(self) -> tuple[int, int]:
        """Prompt tokens and response tokens of the newest version, from the lengths of its lists, a row group at a time."""
        counts: Counter[str] = Counter()
        if self.start.tokens.exists():
            columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
            for rows in self.start.tokens.batches(columns=columns):
                counts.update({name: pc.sum(pc.list_value_length(rows[name])).as_py() or 0 for name in columns})
        return counts["prompt_ids"], counts["chosen_ids"] + counts["rejected_ids"]
