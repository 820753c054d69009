"""Stage prepare: raw rows to tokens, unusable rows to quarantine.

A tokens table is named for its dataset and for everything that decides how text becomes ids (tokenizer, template, limits), so
that tokens of two kinds never mix. The newest version holds exactly the usable pairs of the source as it is now. New pairs are
tokenised and appended. When pairs have left the source or changed their row, all rows are rewritten.

The source is read once and sorted by pair_id. Then old and new pairs are compared one range of ids at a time.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl
import pyarrow as pa

from pipeline.chat.pair_ids import Limits, TokenizedPair
from pipeline.chat.tokenizer import RENDERING_VERSION, ChatTokenizer, model_number
from pipeline.dataset_section import DatasetSection
from pipeline.provenance import provenance
from pipeline.recipe import Recipe
from pipeline.source.columns import Columns, resolve_columns
from pipeline.source.compare import Account, kept_version
from pipeline.source.external_sort import ExternalSort
from pipeline.source.intake import PAIRS, Intake
from pipeline.source.load import open_source
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from pipeline.source.rows import Source
from pipeline.stages.prepare_ranges import CURRENT, RangeMerger, RangeTokenizer
from pipeline.workers.driver import drive
from weights_store import Table, TableVersion, WeightStore
from weights_store.digests import digest_once
from weights_store.errors import ConflictError, InputError
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.messages import Progress, logger, show
from weights_store.names import quarantine_path, tokens_path
from weights_store.processes.spread import Spread, in_turn
from weights_store.schemas import OF_LATER_STAGES, QUARANTINE, SCHEMA_VERSION
from weights_store.tables.metadata import SourceRecord
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_MAX_TRIES = 5
_UNKNOWN_CONTEXT = 1 << 20
_RANGE_BYTES = 32 << 20
"""Arrow bytes of the pairs that are tokenised as one piece of work."""
_COLUMNS = (
    *("prompt", "input", "system", "chosen", "rejected", "completion", "label"),
    *("chosen_score", "rejected_score", "split"),
)
_READING = {*(f"{name}_column" for name in _COLUMNS), "transcript", "many_answers", "split"}
"""Settings that decide how rows are read."""


@dataclass(frozen=True)
class Prepared:
    """What prepare hands on."""

    tokens: TableVersion
    num_source_rows: int
    num_pairs: int
    quarantined: dict[str, int]
    num_new_pairs: int


def prepare(recipe: Recipe, model_folder: Path, spread: Spread | None = None) -> Prepared:
    """Bring the tokens and quarantine tables up to the recipe's source.

    `spread` does the work on the ranges of pair_ids; None: on Ray if the recipe says so, which a child process drives, else
    here, one after the other.

    Raises:
        InputError: The source or the model's tokenizer cannot be used, or no row of the source can.
        ConflictError: Other builds of the same dataset kept winning the race for the next version.
        StageError: The Ray failed.
    """
    start = Preparation.of(recipe, model_folder)
    done = start.already_done()
    if done is not None:
        return done
    if spread is None and recipe.score.executor == "ray":
        return drive("preparing pairs", recipe.score, prepare, recipe, model_folder)
    for path, changes in start.other_cuts():
        _log.info(f"prepare: {start.tokens.path} is a new table; unlike {path}: {'; '.join(changes)}")
    start.tokenizer.check()
    vocab_size = model_number(model_folder, "vocab_size")
    if vocab_size is None:
        raise InputError(f"model {model_folder}: config.json has no vocab_size")
    metadata = {
        "cut": start.cut,
        "source": start.source,
        "tokenizer": start.tokenizer.properties(vocab_size),
        "recipe": recipe.model_dump(),
        "parents": [],
        **provenance(),
    }
    with start.intake() as intake:
        for _ in range(_MAX_TRIES - 1):
            with suppress(ConflictError):  # another build of this dataset was faster: compare with what it wrote
                return _Update(start, intake, metadata, spread or in_turn).run()
        return _Update(start, intake, metadata, spread or in_turn).run()


@dataclass(frozen=True)
class Preparation:
    """What is known before a row is read: the two tables of the recipe's pairs, and what determines their content."""

    dataset: DatasetSection
    needs_scores: bool
    """Whether the weights are made from annotators' scores of both responses."""
    needs_two_responses: str | None
    """What the recipe asks for that unpaired rows cannot give, and what to ask for instead; None for nothing."""
    learns_from: str | None
    """The split whose labels contrastive models or estimator `head` learn; None for all pairs, or if nothing learns them."""
    weight_columns: Mapping[str, str]
    """Columns that stage annotate reads, see `Recipe.weight_columns`."""
    tokenizer: ChatTokenizer
    context: int
    """Longest sequence of the model, in tokens."""
    cut: dict[str, object]
    """Everything that decides how text becomes ids."""
    asked: dict[str, object]
    """What the recipe says of the source, and the fingerprint of the file."""
    store: WeightStore
    tokens: Table
    quarantine: Table

    @classmethod
    def of(cls, recipe: Recipe, model_folder: Path) -> "Preparation":
        """Look at the recipe's source and the model's tokenizer.

        Raises:
            InputError: The model's tokenizer cannot be used.
        """
        dataset, path = recipe.dataset, Path(recipe.dataset.source)
        tokenizer = ChatTokenizer(
            model_folder, recipe.model.chat_template, recipe.model.template_date, dataset.unprinted_keys
        )
        context = model_number(model_folder, "max_position_embeddings") or _UNKNOWN_CONTEXT
        cut = {
            "schema_version": SCHEMA_VERSION,
            "rendering_version": RENDERING_VERSION,
            "tokenizer": tokenizer.rendering_fingerprint,
            "template_date": tokenizer.template_date,
            "unprinted_keys": sorted(dataset.unprinted_keys),
            "context": context,
            **dataset.model_dump(include={"max_prompt_tokens", "max_response_tokens", "long_response"}),
        }
        asked: dict[str, object] = {
            "content": digest_once(path) if path.is_file() else None,
            "max_pairs": dataset.max_pairs,
            "settings": dataset.model_dump(mode="json", include=_READING),
        }
        store = WeightStore(recipe.store.uri)
        tokens = store.table(tokens_path(f"{dataset.name}-{fingerprint(cut)[:12]}"))
        quarantine = store.table(quarantine_path(tokens.path))
        needs = (recipe.needs_scores, recipe.needs_two_responses, recipe.learns_from, recipe.weight_columns)
        return cls(dataset, *needs, tokenizer, context, cut, asked, store, tokens, quarantine)

    @cached_property
    def opened(self) -> Source:
        """The source, opened when it is first needed.

        Raises:
            InputError: It cannot be read.
        """
        return open_source(self.dataset)

    @cached_property
    def columns(self) -> Columns:
        """The columns of the source, found in a first look at its rows.

        Raises:
            InputError: A column is not there.
        """
        return resolve_columns(self.dataset, self.opened, self.weight_columns)

    @cached_property
    def source(self) -> SourceRecord:
        """What is recorded of the source: also how its rows are read, which only a look at them tells."""
        reading = {**self.columns.record(), "split": self.dataset.split}
        return {**self.asked, "reading": reading}  # type: ignore[typeddict-item]

    def already_done(self) -> Prepared | None:
        """Return the newest version if it was made from the same bytes. A hub dataset is always read again.

        Raises:
            InputError: The weights need scores or second responses that its pairs lack, or the contrastive models a split that
                it lacks.
        """
        recorded = Account.recorded(self.tokens, self.quarantine)
        if recorded is None or self.asked["content"] is None or not self.is_recorded_in(self.quarantine):
            return None
        if not self.is_recorded_in(self.tokens):
            return None
        statistics = self.tokens.metadata()["statistics"]
        if not {"num_scored_pairs", "num_pairs_by_split"} <= statistics.keys():
            return None  # of a store from before these were recorded: the source is read again
        num_pairs = statistics["num_pairs"]
        self._check_layout("completion" in self.tokens.metadata()["source"]["reading"])
        if self.needs_scores:
            self._check_scores(num_pairs - statistics["num_scored_pairs"], num_pairs)
        if self.learns_from is not None:
            self.check_split(statistics["num_pairs_by_split"])
        return Prepared(self.tokens.reference(), recorded.num_source_rows, num_pairs, recorded.quarantined, 0)

    def is_recorded_in(self, table: Table) -> bool:
        """Return whether the newest version of a table was made from this source, read with these settings."""
        recorded: dict[str, object] = {**table.metadata()["source"]}
        return all(recorded.get(key) == value for key, value in self.asked.items())

    def other_cuts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the other tokens tables of this dataset and what differs there: why a new table is needed."""
        if self.tokens.exists():
            return
        for other in self.store.tables("tokens"):
            # A first commit that met a full disk leaves a folder without any version.
            if other.path.rpartition("-")[0] == tokens_path(self.dataset.name) and other.exists():
                yield other.path, explain_difference(other.metadata()["cut"], self.cut)

    @contextmanager
    def intake(self) -> Iterator[Intake]:
        """Read the whole source, and keep it until the end of the `with` block.

        Raises:
            InputError: The source cannot be read, or the weights need scores or second responses that its pairs lack.
        """
        self._check_layout(self.columns.completion is not None)
        with ExternalSort(PAIRS, "pair_id", "source_row") as pairs, ExternalSort(QUARANTINE, "source_row") as unusable:
            intake = Intake(self.dataset, self.opened, self.columns, pairs, unusable)
            intake.read()
            if self.needs_scores:
                self._check_scores(intake.num_unscored, pairs.num_rows)
            yield intake

    def _check_scores(self, num_lacking: int, num_pairs: int) -> None:
        """Refuse pairs without scores before a model has started: publish would refuse them after all scoring."""
        if not num_lacking:
            return
        raise InputError(
            f"weights.pair_weight 'quality' needs annotators' scores of both responses, and {num_lacking:,} of {num_pairs:,} "
            f"pairs of dataset.source {self.dataset.source} lack one. Name the columns that hold them in "
            "dataset.chosen_score_column and dataset.rejected_score_column, remove such pairs from the source, or set "
            "weights.pair_weight to 'margin' or 'none'"
        )

    def _check_layout(self, is_unpaired: bool) -> None:
        """Refuse unpaired rows before a model has started, if the weights compare two responses."""
        if is_unpaired and self.needs_two_responses:
            raise InputError(
                f"dataset.source {self.dataset.source} has one response in a row, and {self.needs_two_responses}"
            )

    def check_split(self, num_pairs: Mapping[str, int]) -> None:
        """Check that the split whose labels are learnt is there, given the number of pairs of each split.

        Raises:
            InputError: There is no pair of it.
        """
        if self.learns_from is not None and self.learns_from not in num_pairs:
            found = ", ".join(f"{split} ({count:,} pairs)" for split, count in sorted(num_pairs.items()))
            raise InputError(
                f"the weights learn from split {self.learns_from!r}, of which there is no pair; {self.dataset.source} "
                f"has {found}. Name one of them in contrast.split"
            )

    @property
    def limits(self) -> Limits:
        """How long a pair may be."""
        dataset = self.dataset
        return Limits(
            dataset.max_prompt_tokens, dataset.max_response_tokens, dataset.long_response == "cut", self.context
        )

    def tokenize(self, pairs: Iterable[Pair]) -> Iterator[TokenizedPair | Unusable]:
        """Yield the ids of each pair, or why it has none.

        It may be over a limit of the recipe or the model, or the chat template cannot render it.

        Raises:
            InputError: The chat template has broken its limits of time or memory too often.
        """
        return self.tokenizer.tokenize_pairs(pairs, self.limits)


class _Update:
    """One try to bring the two tables from their newest versions to the source."""

    def __init__(self, start: Preparation, intake: Intake, metadata: dict[str, object], spread: Spread) -> None:
        self.start = start
        self.spread = spread
        self.tokens = start.tokens
        self.intake = intake
        self.metadata = metadata
        self.base = start.tokens.version()
        self.quarantine_base = start.quarantine.version()
        self.recorded = Account.recorded(start.tokens, start.quarantine)
        self.kept = kept_version(self.base, self.recorded, start.source)
        self.reasons = Counter(intake.reasons)
        self.statistics = Counter(num_pairs=0, num_new_pairs=0, num_new_prompts_cut=0, num_new_responses_cut=0)
        self.notes: Counter[str] = Counter()
        self.splits: Counter[str] = Counter()
        self.pair_ids = hashlib.sha256()
        self.old_rows_stay = True

    def run(self) -> Prepared:
        with ExternalSort(QUARANTINE, "source_row") as unusable:
            fresh = self._write_fresh(unusable)
            num_pairs, num_new = self.statistics["num_pairs"], self.statistics["num_new_pairs"]
            if not num_pairs:
                self._commit_quarantine(unusable)
                raise self.intake.no_usable_pair(self.reasons)
            self.start.check_split(self.splits)
            account = Account(self.start.source, self.intake.num_rows, dict(self.reasons))
            is_same = not num_new and self.old_rows_stay and self.recorded == account
            is_same &= self.recorded is not None and self.start.is_recorded_in(self.start.quarantine)
            if not is_same:
                # Quarantine first: if the build dies in between, the tokens are still the old ones and the next run does both.
                self._commit_quarantine(unusable)
        tokens = self.tokens.reference(self.base) if is_same else self._commit_tokens(fresh)
        return Prepared(tokens, account.num_source_rows, num_pairs, account.quarantined, num_new)

    def _write_fresh(self, unusable: ExternalSort) -> list[ShardRecord]:
        """Tokenise the new pairs into shards that nobody sees yet; add what cannot be, and duplicates, to `unusable`."""
        start = self.start
        work = RangeTokenizer(self.tokens, self.kept, start.tokenizer, start.limits, start.dataset.has_splits)
        writer = self.tokens.writer()
        num_done, started = 0, time.monotonic()
        for found in self.spread(work, self.intake.pairs.ranges(_RANGE_BYTES)):
            writer.take(found.written)
            num_done += found.num_rows
            show(Progress("prepare", num_done, self.intake.pairs.num_rows, time.monotonic() - started, "pairs"))
            unusable.add(pa.Table.from_pylist(found.unusable, QUARANTINE))
            for example in found.examples.values():
                self.intake.add_example(*example)
            self.old_rows_stay &= found.old_rows_stay
            self.pair_ids.update(found.digested)
            for total, more in (
                (self.reasons, found.reasons),
                (self.statistics, found.counts),
                (self.splits, found.splits),
                (self.notes, found.notes),
            ):
                total.update(more)
        for note, num_pairs in sorted(self.notes.items()):
            _log.info(f"prepare: in {num_pairs} new pairs: {note}")
        return writer.finish()

    def _commit_quarantine(self, unusable: ExternalSort) -> None:
        quarantine = self.start.quarantine
        if self.kept is not None and self.quarantine_base is not None:  # what later stages have refused stays
            of_later_stages = pl.col("reason").is_in(OF_LATER_STAGES)
            old = quarantine.scan(self.quarantine_base).filter(of_later_stages).collect()
            unusable.add(old.to_arrow().select(QUARANTINE.names).cast(QUARANTINE))
        for _, rows in self.intake.unusable.ranges():
            unusable.add(rows)
        writer = quarantine.writer()
        for _, rows in unusable.ranges():
            writer.write(rows)
        record = {
            **self.metadata,
            "fingerprint": fingerprint([self.start.cut, self.start.source["content"]]),
            "statistics": {
                "num_source_rows": self.intake.num_rows,
                "num_pairs": self.statistics["num_pairs"],
                "reasons": dict(self.reasons),
            },
        }
        quarantine.commit(writer.finish(), record, self.quarantine_base, mode="overwrite")

    def _commit_tokens(self, fresh: list[ShardRecord]) -> TableVersion:
        reading, pairs = self.start.source["reading"], self.pair_ids.hexdigest()
        content = {"cut": self.start.cut, "reading": reading, "pairs": pairs}
        counts = {"num_source_rows": self.intake.num_rows, "quarantined": dict(self.reasons)}
        statistics = {**counts, **self.statistics, "num_pairs_by_split": dict(self.splits)}
        record = {**self.metadata, "fingerprint": fingerprint(content), "statistics": statistics}
        if self.kept != self.base:  # the old rows were read in another way
            return self.tokens.commit(fresh, record, self.base, mode="overwrite")
        if self.old_rows_stay:
            return self.tokens.commit(fresh, record, self.base)
        reference = self.tokens.commit(self._merge(fresh), record, self.base, mode="overwrite")
        for shard in fresh:
            self.tokens.location.delete(shard.name)
        return reference

    def _merge(self, fresh: list[ShardRecord]) -> list[ShardRecord]:
        """Write all rows: the old ones that are still in the source, with their row and scores as they are now, and the new."""
        ranges = self.intake.pairs.ranges(_RANGE_BYTES)
        parts = ((piece, rows.select(["pair_id", *CURRENT])) for piece, rows in ranges)
        writer = self.tokens.writer()
        for written in self.spread(RangeMerger(self.tokens, self.kept, fresh), parts):
            writer.take(written)
        return writer.finish()
