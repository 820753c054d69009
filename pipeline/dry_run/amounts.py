"""Which pairs and tokens the stages after prepare will have. Called by `plan.py`; writes nothing.

Where prepare would return the newest version as it is, that version answers; else a survey of the source does.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import polars as pl
import pyarrow.compute as pc

from pipeline.dry_run.source import Overlap, Survey, survey
from pipeline.stages.prepare import Preparation, Prepared
from pipeline.workers.missing import missing_pairs
from pipeline.workers.quarantine import quarantine_path
from pipeline.workers.supervise import FOLDERS
from weights_store import Table, TableVersion
from weights_store.schemas import Reason

TO_BE_COMPUTED = "to be computed"
"""Stands for the fingerprint of a version that is not there yet."""


class Amount(NamedTuple):
    """Pairs, and their tokens: prompt, chosen and rejected, each once."""

    num_pairs: int
    num_tokens: int
    is_exact: bool


@dataclass(frozen=True)
class Outlook:
    """The pairs that a build will have: what prepare would return as it is, or what it would find in the source."""

    start: Preparation
    done: Prepared | None
    found: Survey | None

    @classmethod
    def of(cls, start: Preparation) -> "Outlook":
        """Look whether prepare has anything to do, and read the source if so.

        Raises:
            InputError: The source cannot be read, or no row of it can be used.
        """
        done = start.already_done()
        if done is not None:
            return cls(start, done, None)
        key = start.tokens.path.removeprefix("tokens/")
        tables = [
            table
            for folder in FOLDERS.values()
            for table in start.store.tables(folder)
            if table.path.startswith(f"{folder}/{key}/")
        ]
        return cls(start, None, survey(start, tables))

    @property
    def tokens(self) -> TableVersion:
        """The version of the tokens table that the build will use; its fingerprint may be `TO_BE_COMPUTED`."""
        table, found = self.start.tokens, self.found
        if found is None or (found.base is not None and not found.num_new and not found.num_gone):
            return table.reference()
        return TableVersion(str(table.root), table.path, table.version() or 0, TO_BE_COMPUTED)

    @property
    def num_pairs(self) -> int:
        """Pairs of that version."""
        if self.found:
            return self.found.num_pairs
        assert self.done is not None, "one of the two is there"
        return self.done.num_pairs

    def all(self) -> Amount:
        """Return how much all pairs are."""
        num_tokens, is_exact = self._sum(*self._stored_tokens), self.found is None or self.found.is_exact
        # Of pairs that have left only the number is known: the others are taken to be as long on average.
        return Amount(self.num_pairs, round(sum(num_tokens)), is_exact and not (self.found and self.found.num_gone))

    def num_response_tokens(self) -> int:
        """Return the response tokens among them."""
        return round(self._sum(*self._stored_tokens)[1])

    def response_share(self) -> float:
        """Return the share of response tokens in all tokens, 0 to 1."""
        return self.num_response_tokens() / max(1, self.all().num_tokens)

    def missing_from(self, table: Table | None) -> Amount:
        """Return how much has no row in a stage's table yet; one that does not exist, or is not known yet (None), has none."""
        if table is None or not table.exists():
            return self.all()
        overlap = self.found.overlaps[table.path] if self.found else Overlap()
        num_pairs, num_tokens = 0, 0.0
        if self.found is None or self.found.base is not None:
            for part in missing_pairs(self.start.tokens.reference(), table):
                wanted = part.filter(~pl.col("pair_id").is_in(list(overlap.gone_absent)))
                num_pairs += wanted.height
                num_tokens += int(wanted["num_tokens"].sum())
        if self.found:
            num_new = max(0, self.found.num_new - overlap.num_new_present)
            num_pairs += num_new
            num_tokens += num_new * sum(self.found.new_tokens)
        return Amount(num_pairs, round(num_tokens), self.found is None or self.found.is_exact)

    def num_unscorable(self, tables: Sequence[str]) -> int:
        """Return the pairs that what fills one of these tables has put into quarantine."""
        table = self.start.store.table(quarantine_path(self.start.tokens.path))
        if not table.exists():
            return 0
        by_one = pl.any_horizontal(pl.col("detail").str.starts_with(f"{path}: ") for path in tables)
        rows = table.scan().filter((pl.col("reason") == Reason.UNSCORABLE.value) & by_one)
        return int(rows.select(pl.col("pair_id").n_unique()).collect().item())

    def _sum(self, num_prompt_tokens: int, num_response_tokens: int) -> tuple[float, float]:
        """Return the prompt and response tokens of the build, from those of the newest version."""
        found = self.found
        if found is None:
            return num_prompt_tokens, num_response_tokens
        num_old = found.num_pairs - found.num_new
        stay = num_old / (num_old + found.num_gone) if num_old else 0.0
        return (
            num_prompt_tokens * stay + found.new_tokens[0] * found.num_new,
            num_response_tokens * stay + found.new_tokens[1] * found.num_new,
        )

    @cached_property
    def _stored_tokens(self) -> tuple[int, int]:
        """Prompt and response tokens of the newest version, from the lengths of its lists, a row group at a time."""
        counts: Counter[str] = Counter()
        if self.start.tokens.exists():
            columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
            for rows in self.start.tokens.batches(columns=columns):
                counts.update({name: pc.sum(pc.list_value_length(rows[name])).as_py() or 0 for name in columns})
        return counts["prompt_ids"], counts["chosen_ids"] + counts["rejected_ids"]
