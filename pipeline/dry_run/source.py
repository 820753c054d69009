"""What prepare would find in a source, without writing anything. Called by `plan.py`.

The source is read, sorted and compared with the newest version of its tokens table, as prepare does it. Every pair is counted,
but at most `SAMPLE_PAIRS` of the new ones are tokenised; they stand for the others.
"""

import random
from collections import Counter

import polars as pl

from pipeline.dry_run.amounts import Outlook, Overlap
from pipeline.source.compare import Account, ComparedRange, compared_ranges, kept_version
from pipeline.source.intake import Intake, stored_raw
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from pipeline.stages.prepare import Preparation
from pipeline.workers.supervise import FOLDERS
from weights_store.fingerprint import fingerprint_text
from weights_store.messages import logger
from weights_store.names import name_of
from weights_store.schemas import Reason

_log = logger(__name__)

SAMPLE_PAIRS = 200
_REFUSALS = (
    Reason.PROMPT_TOO_LONG,
    Reason.RESPONSE_TOO_LONG,
    Reason.TEMPLATE_MISMATCH,
    Reason.TEMPLATE_IGNORES,
    Reason.ALREADY_TEMPLATED,
    Reason.CONTROL_TOKENS,
    Reason.BAD_TOOLS,
    Reason.EMPTY_RESPONSE,
    Reason.CHOSEN_EQUALS_REJECTED,
)


def survey(start: Preparation) -> Outlook:
    """Compare the source with the newest version, and read it if need be.

    Raises:
        InputError: The source cannot be read, or no row of it can be used.
    """
    done = start.already_done()
    if done is not None:
        return Outlook(start, done.num_source_rows, done.num_pairs, base=done.tokens.version, is_same=True)
    start.tokenizer.check()
    with start.intake() as intake:
        return _Count(start, intake).result()


class _Count:
    def __init__(self, start: Preparation, intake: Intake) -> None:
        self.start = start
        self.intake = intake
        self.recorded = Account.recorded(start.tokens, start.quarantine)
        self.base = kept_version(start.tokens.version(), self.recorded, start.source)
        self.standings: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.num_fresh = 0
        """New pairs, without what the tokenizer has refused before."""
        self.num_gone = 0
        filled = (table for folder in FOLDERS.values() for table in start.store.tables(folder))
        of_pairs = f"{name_of(start.tokens.path)}/"
        self.tables = [table for table in filled if name_of(table.path).startswith(of_pairs) and table.exists()]
        self.overlaps = {table.path: Overlap() for table in self.tables}
        self.refused: dict[tuple[int, str], str] = {}
        """What the tokenizer has refused before: the reason by source row and fingerprint of the stored text."""
        if self.base is not None:
            rows = start.quarantine.scan().filter(pl.col("reason").is_in(_REFUSALS))
            columns = rows.select("source_row", "raw", "reason").collect()
            self.refused = {(row, fingerprint_text(raw)): reason for row, raw, reason in columns.iter_rows()}
        self.refused_again: Counter[str] = Counter()
        self.refused_texts: list[tuple[int, str]] = []
        self.sample: list[tuple[int, str]] = []
        """Source row and text of pairs to tokenise."""
        self.random = random.Random(0)

    def result(self) -> Outlook:
        for part in compared_ranges(self.intake.pairs, self.start.tokens, self.base):
            self._add(part)
        self.start.check_split(self.splits)
        is_exact = self.num_fresh + self.refused_again.total() <= SAMPLE_PAIRS
        if is_exact:  # what was refused before is tried again: quarantine has only the beginning of its text
            self.sample += self.refused_texts
            self.refused_again.clear()
        lengths, refused = self._tokenize_sample()
        num_new = len(lengths) if is_exact else round(self.num_fresh * len(lengths) / max(1, len(self.sample)))
        duplicates = Counter({Reason.DUPLICATE_PAIR.value: self.standings["duplicate"]})
        reasons = self.intake.reasons + duplicates + refused + self.refused_again
        num_pairs = self.standings["stays"] + self.standings["moved"] + num_new
        if not num_pairs and is_exact:
            raise self.intake.no_usable_pair(reasons)
        if not lengths and self.sample:
            _log.warning(
                f"prepare: none of {len(self.sample)} pairs in a sample can be used {self.intake.explain(refused)}"
            )
        means = [sum(column) / len(lengths) for column in zip(*lengths, strict=True)] or [0.0, 0.0]
        writes_all = self.base is None or bool(self.num_gone or self.standings["moved"])
        account = Account(self.start.source, self.intake.num_rows, dict(reasons))
        return Outlook(
            self.start,
            num_rows=self.intake.num_rows,
            num_pairs=num_pairs,
            num_new=num_new,
            num_gone=self.num_gone,
            base=self.base,
            writes_all=writes_all,
            is_same=not num_new and not writes_all and self.recorded == account,
            is_exact=is_exact,
            new_tokens=(means[0], means[1]),
            overlaps=self.overlaps,
        )

    def _add(self, part: ComparedRange) -> None:
        self.standings.update(part.rows["standing"])
        self.splits.update(part.rows["split"])
        new: set[str] = set()
        for pair_id, row, text in part.rows.filter(standing="new").select("pair_id", "source_row", "pair").iter_rows():
            reason = self.refused.get((row, fingerprint_text(stored_raw(text))))
            if reason is None:
                new.add(pair_id)
                self.num_fresh += 1
                # Reservoir sampling: each new pair is equally likely to be in the sample, the same ones every time.
                if len(self.sample) < SAMPLE_PAIRS:
                    self.sample.append((row, text))
                elif (place := self.random.randrange(self.num_fresh)) < SAMPLE_PAIRS:
                    self.sample[place] = (row, text)
            else:
                self.refused_again[reason] += 1
                self.refused_texts = [*self.refused_texts, (row, text)][:SAMPLE_PAIRS]
        gone = set(part.gone)
        self.num_gone += len(gone)
        for table in self.tables:
            present = set(table.scan(within=part.piece).select("pair_id").collect()["pair_id"])
            self.overlaps[table.path].num_new_present += len(new & present)
            self.overlaps[table.path].gone_absent |= gone - present

    def _tokenize_sample(self) -> tuple[list[tuple[int, int]], Counter[str]]:
        """Return prompt and response tokens of each pair that can be used, and why the others cannot."""
        lengths: list[tuple[int, int]] = []
        reasons: Counter[str] = Counter()
        pairs = (Pair.from_json(text) for _, text in self.sample)
        for (row, text), tokens in zip(self.sample, self.start.tokenize(pairs), strict=True):
            if isinstance(tokens, Unusable):
                reasons[tokens.reason.value] += 1
                self.intake.add_example(tokens, row, text)
            else:
                lengths.append((len(tokens.prompt_ids), len(tokens.chosen_ids) + len(tokens.rejected_ids)))
        return lengths, reasons
