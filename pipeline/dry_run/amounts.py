"""How many pairs and tokens the stages after prepare will have. Called by `plan.py`; writes nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import polars as pl
import pyarrow.compute as pc

from pipeline.dry_run.source import Overlap, Survey
from pipeline.stages.prepare import Preparation
from pipeline.workers.missing import missing_pairs
from weights_store import Table, TableVersion
from weights_store.schemas import Reason

TO_BE_COMPUTED = "to be computed"
"""The fingerprint of a version that does not exist yet."""


class Amount(NamedTuple):
    """Pairs, and their tokens: prompt, chosen and rejected, each once."""

    num_pairs: int
    num_tokens: int
    is_exact: bool


@dataclass(frozen=True)
class Outlook:
    """The pairs that a build will have: those of the newest version, changed by what the survey found in the source."""

    start: Preparation
    found: Survey

    @property
    def tokens(self) -> TableVersion:
        """The version of the tokens table that the build will use; its fingerprint may be `TO_BE_COMPUTED`."""
        table, found = self.start.tokens, self.found
        if found.base is not None and not found.num_new and not found.num_gone:
            return table.reference()
        return TableVersion(str(table.root), table.path, table.version() or 0, TO_BE_COMPUTED)

    def all(self) -> Amount:
        """Return the amount of all pairs. Of pairs that left the source only the number is known, so it is then an estimate."""
        found = self.found
        return Amount(found.num_pairs, round(sum(self.num_tokens())), found.is_exact and not found.num_gone)

    def num_tokens(self) -> tuple[float, float]:
        """Return the prompt tokens and the response tokens of all pairs."""
        found = self.found
        num_old = found.num_pairs - found.num_new
        share = num_old / (num_old + found.num_gone) if num_old else 0.0
        num_prompt_tokens, num_response_tokens = self._stored_tokens
        return (
            num_prompt_tokens * share + found.new_tokens[0] * found.num_new,
            num_response_tokens * share + found.new_tokens[1] * found.num_new,
        )

    def missing_from(self, table: Table | None) -> Amount:
        """Return the amount that has no row in a stage's table. None: the table is not known yet, so everything is missing."""
        if table is None or not table.exists():
            return self.all()
        found = self.found
        overlap = found.overlaps.get(table.path, Overlap())
        num_pairs = max(0, found.num_new - overlap.num_new_present)
        num_tokens = num_pairs * sum(found.new_tokens)
        if found.base is not None:
            for part in missing_pairs(self.start.tokens.reference(), table):
                wanted = part.filter(~pl.col("pair_id").is_in(list(overlap.gone_absent)))
                num_pairs += wanted.height
                num_tokens += int(wanted["num_tokens"].sum())
        return Amount(num_pairs, round(num_tokens), found.is_exact)

    def num_unscorable(self, tables: Sequence[str]) -> int:
        """Return the pairs that are in quarantine because one of these tables could not get a row for them."""
        if not self.start.quarantine.exists():
            return 0
        by_one = pl.any_horizontal(pl.col("detail").str.starts_with(f"{path}: ") for path in tables)
        rows = self.start.quarantine.scan().filter((pl.col("reason") == Reason.UNSCORABLE.value) & by_one)
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
