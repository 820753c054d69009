"""Stage prepare: raw rows to tokens, unusable rows to quarantine.

A tokens table is named for its dataset and for everything that decides how text becomes ids (tokenizer, template, limits), so
that tokens of two kinds never mix. The newest version holds exactly the usable pairs of the source as it is now. New pairs are
tokenised and appended. When pairs have left the source or changed their row, all rows are rewritten.

The source is read once and sorted by pair_id. Then old and new pairs are compared one range of ids at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from pipeline.provenance import provenance
from pipeline.recipe import DatasetSection, Recipe
from pipeline.source.chat import ChatTokenizer, TokenizedPair
from pipeline.source.compare import Account, ComparedPair, compared_ranges, kept_version
from pipeline.source.external_sort import ExternalSort
from pipeline.source.intake import PAIRS, ROWS_PER_BATCH, Intake, quarantine_row
from pipeline.source.messages import Unusable
from pipeline.source.pairs import Pair
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError
from weights_store.fingerprint import canonical_json, explain_difference, fingerprint, fingerprint_file, load_json
from weights_store.messages import logger
from weights_store.names import quarantine_path, tokens_path
from weights_store.schemas import QUARANTINE, SCHEMA_VERSION, TOKENS, Reason
from weights_store.tables.metadata import SourceRecord
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_MAX_TRIES = 5
_UNKNOWN_CONTEXT = 1 << 20
_COLUMNS = {"prompt_column", "chosen_column", "rejected_column", "chosen_score_column", "rejected_score_column"}
_READING = {*_COLUMNS, "split"}
"""Settings that decide how rows are read."""


@dataclass(frozen=True)
class Prepared:
    """What prepare hands on."""

    tokens: TableVersion
    num_source_rows: int
    num_pairs: int
    quarantined: dict[str, int]
    num_new_pairs: int


def prepare(recipe: Recipe, model_folder: Path) -> Prepared:
    """Bring the tokens and quarantine tables up to the recipe's source.

    Raises:
        InputError: The source or the model's tokenizer cannot be used, or no row of the source can.
        ConflictError: Other builds of the same dataset kept winning the race for the next version.
    """
    start = Preparation.of(recipe, model_folder)
    done = start.already_done()
    if done is not None:
        return done
    for path, changes in start.other_cuts():
        _log.info(f"prepare: {start.tokens.path} is a new table; unlike {path}: {'; '.join(changes)}")
    vocab_size = _model_number(model_folder, "vocab_size")
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
                return _Update(start, intake, metadata).run()
        return _Update(start, intake, metadata).run()


@dataclass(frozen=True)
class Preparation:
    """What is known before a row is read: the two tables of the recipe's pairs, and what determines their content."""

    dataset: DatasetSection
    tokenizer: ChatTokenizer
    context: int
    """Longest sequence of the model, in tokens."""
    cut: dict[str, object]
    """Everything that decides how text becomes ids."""
    source: SourceRecord
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
        tokenizer = ChatTokenizer(model_folder, recipe.model.chat_template)
        context = _model_number(model_folder, "max_position_embeddings") or _UNKNOWN_CONTEXT
        cut = {
            "schema_version": SCHEMA_VERSION,
            "tokenizer": tokenizer.rendering_fingerprint,
            "context": context,
            **dataset.model_dump(include={"max_prompt_tokens", "max_response_tokens", "long_response"}),
        }
        source: SourceRecord = {
            "content": fingerprint_file(path) if path.is_file() else None,
            "max_pairs": dataset.max_pairs,
            "reading": dataset.model_dump(include=_READING),
        }
        store = WeightStore(recipe.store.uri)
        tokens = store.table(tokens_path(f"{dataset.name}-{fingerprint(cut)[:12]}"))
        quarantine = store.table(quarantine_path(tokens.path))
        return cls(dataset, tokenizer, context, cut, source, store, tokens, quarantine)

    def already_done(self) -> Prepared | None:
        """Return the newest version if it was made from the same bytes. A hub dataset is always read again."""
        recorded = Account.recorded(self.tokens, self.quarantine)
        if recorded is None or self.source["content"] is None or recorded.source != self.source:
            return None
        num_pairs = self.tokens.metadata()["statistics"]["num_pairs"]
        return Prepared(self.tokens.reference(), recorded.num_source_rows, num_pairs, recorded.quarantined, 0)

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
            InputError: The source cannot be read.
        """
        with ExternalSort(PAIRS, "pair_id", "source_row") as pairs, ExternalSort(QUARANTINE, "source_row") as unusable:
            intake = Intake(self.dataset, pairs, unusable)
            intake.read()
            yield intake

    def tokenize(self, pair: Pair) -> TokenizedPair:
        """Return the ids of a pair.

        Raises:
            Unusable: The pair is over a limit of the recipe or the model, or the chat template cannot render it.
        """
        limits, can_cut = self.dataset, self.dataset.long_response == "cut"
        return self.tokenizer.tokenize_pair(
            pair, limits.max_prompt_tokens, limits.max_response_tokens, can_cut, self.context
        )


class _Update:
    """One try to bring the two tables from their newest versions to the source."""

    def __init__(self, start: Preparation, intake: Intake, metadata: dict[str, object]) -> None:
        self.start = start
        self.tokens = start.tokens
        self.intake = intake
        self.metadata = metadata
        self.base = start.tokens.version()
        self.quarantine_base = start.quarantine.version()
        self.recorded = Account.recorded(start.tokens, start.quarantine)
        self.kept = kept_version(self.base, self.recorded, start.source)
        self.reasons = Counter(intake.reasons)
        self.statistics = Counter(num_pairs=0, num_new_pairs=0, num_new_prompts_cut=0, num_new_responses_cut=0)
        self.pair_ids = hashlib.sha256()
        self.old_rows_stay = True

    def run(self) -> Prepared:
        with ExternalSort(QUARANTINE, "source_row") as unusable:
            fresh = self._write_fresh(unusable)
            num_pairs, num_new = self.statistics["num_pairs"], self.statistics["num_new_pairs"]
            if not num_pairs:
                raise self.intake.no_usable_pair(self.reasons)
            account = Account(self.start.source, self.intake.num_rows, dict(self.reasons))
            is_same = not num_new and self.old_rows_stay and self.recorded == account
            if not is_same:
                # Quarantine first: if the build dies in between, the tokens are still the old ones and the next run does both.
                self._commit_quarantine(unusable)
        tokens = self.tokens.reference(self.base) if is_same else self._commit_tokens(fresh)
        return Prepared(tokens, account.num_source_rows, num_pairs, account.quarantined, num_new)

    def _write_fresh(self, unusable: ExternalSort) -> list[ShardRecord]:
        """Tokenise the new pairs into shards that nobody sees yet; add what cannot be, and duplicates, to `unusable`."""
        writer = self.tokens.writer()
        for part in compared_ranges(self.intake.pairs, self.tokens, self.kept):
            self.old_rows_stay &= part.gone.is_empty() and "moved" not in part.rows["standing"]
            for batch in part.rows.iter_slices(ROWS_PER_BATCH):
                tokenised, problems = self._tokenize(batch)
                writer.write(pa.Table.from_pylist(tokenised, TOKENS))
                unusable.add(pa.Table.from_pylist(problems, QUARANTINE))
                self.statistics["num_new_pairs"] += len(tokenised)
                if tokenised:
                    _log.info(f"prepare: {self.statistics['num_new_pairs']} new pairs tokenised")
        return writer.finish()

    def _tokenize(self, batch: pl.DataFrame) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        """Return the tokens rows of the new pairs, and the quarantine rows of what cannot be used."""
        tokenised, problems = [], []
        for row in map(ComparedPair._make, batch.iter_rows()):
            try:
                if row.standing == "duplicate":
                    raise Unusable(Reason.DUPLICATE_PAIR, f"pair {row.pair_id} stood in an earlier row")
                if row.standing == "new":
                    tokenised.append(self._tokens_row(row))
            except Unusable as problem:
                self.reasons[problem.reason.value] += 1
                problems.append(quarantine_row(row.source_row, row.pair, problem))
                continue
            self.statistics["num_pairs"] += 1
            self.pair_ids.update(row.pair_id.encode())
        return tokenised, problems

    def _tokens_row(self, row: ComparedPair) -> dict[str, object]:
        pair = Pair(**json.loads(row.pair))
        tokens = self.start.tokenize(pair)
        self.statistics["num_new_prompts_cut"] += tokens.prompt_was_cut
        self.statistics["num_new_responses_cut"] += tokens.response_was_cut
        return {
            "pair_id": row.pair_id,
            "prompt": canonical_json(tokens.prompt),
            "prompt_ids": tokens.prompt_ids,
            "chosen_ids": tokens.chosen_ids,
            "rejected_ids": tokens.rejected_ids,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "source_row": row.source_row,
            "split": self.start.dataset.split,
        }

    def _commit_quarantine(self, unusable: ExternalSort) -> None:
        quarantine = self.start.quarantine
        if self.kept is not None and self.quarantine_base is not None:  # what no scorer could score stays
            is_unscorable = pl.col("reason") == Reason.UNSCORABLE.value
            old = quarantine.scan(self.quarantine_base).filter(is_unscorable).collect()
            unusable.add(old.to_arrow().select(QUARANTINE.names).cast(QUARANTINE))
        for _, rows in self.intake.unusable.ranges():
            unusable.add(rows)
        writer = quarantine.writer()
        for _, rows in unusable.ranges():
            writer.write(rows)
        record = {
            **self.metadata,
            "fingerprint": fingerprint([self.start.cut, self.start.source["content"]]),
            "statistics": {"num_source_rows": self.intake.num_rows, "reasons": dict(self.reasons)},
        }
        quarantine.commit(writer.finish(), record, self.quarantine_base, mode="overwrite")

    def _commit_tokens(self, fresh: list[ShardRecord]) -> TableVersion:
        reading, pairs = self.start.source["reading"], self.pair_ids.hexdigest()
        content = {"cut": self.start.cut, "reading": reading, "pairs": pairs}
        counts = {"num_source_rows": self.intake.num_rows, "quarantined": dict(self.reasons)}
        record = {**self.metadata, "fingerprint": fingerprint(content), "statistics": {**counts, **self.statistics}}
        if self.kept != self.base:  # the old rows were read in another way
            return self.tokens.commit(fresh, record, self.base, mode="overwrite")
        if self.old_rows_stay:
            return self.tokens.commit(fresh, record, self.base)
        reference = self.tokens.commit(self._merge(fresh), record, self.base, mode="overwrite")
        for shard in fresh:
            self.tokens.location.delete(shard.name)
        return reference

    def _merge(self, fresh: list[ShardRecord]) -> list[ShardRecord]:
        """Write all rows: the old ones that are still in the source, with their row as it is now, and the new ones."""
        writer = self.tokens.writer()
        old = self.tokens.scan(self.kept)
        new = self.tokens.scan_shards(fresh)
        for piece, rows in self.intake.pairs.ranges():
            first = pl.DataFrame(pl.from_arrow(rows.select(["pair_id", "source_row"]))).unique("pair_id", keep="first")
            stay = piece.of(old).drop("source_row").join(first.lazy(), on="pair_id").select(TOKENS.names)
            merged = pl.concat([stay, piece.of(new).select(TOKENS.names)]).sort("pair_id").collect()
            writer.write(merged.to_arrow())
        return writer.finish()


def _model_number(folder: Path, name: str) -> int | None:
    """Return a number of a model's config.json, where it has one; the text part of a multi-modal model comes first."""
    config = load_json(folder / "config.json")
    text_config = config.get("text_config")
    value = {**config, **text_config}.get(name) if isinstance(text_config, dict) else config.get(name)
    return value if isinstance(value, int) else None
