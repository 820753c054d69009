"""Stage prepare: raw rows to tokens, unusable rows to quarantine.

A tokens table is named for the dataset and for what cuts it into ids (tokenizer, template, limits), so that different cuts
never mix. Its newest version holds exactly the usable pairs of the source as it is now: new pairs are tokenised and appended;
when pairs have left the source, a new version without them is written.

The source is read once and sorted by pair_id; then old and new pairs are compared one range of ids at a time, so that memory
stays bounded however many there are.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from pipeline.provenance import provenance
from pipeline.recipe import DatasetSection, Recipe
from pipeline.source.chat import ChatTokenizer
from pipeline.source.external_sort import ExternalSort
from pipeline.source.load import RawRow, content_fingerprint, load_rows
from pipeline.source.pairs import Pair, Unusable, read_pair
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError
from weights_store.fingerprint import canonical_json, explain_difference, fingerprint, load_json
from weights_store.messages import logger
from weights_store.schemas import QUARANTINE, SCHEMA_VERSION, TOKENS, Reason
from weights_store.tables.key_ranges import KeyRange
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_RAW_CHARACTERS = 2000
_ROWS_PER_BATCH = 2000
_MAX_TRIES = 5
_READ_PAIRS = pa.schema([("pair_id", pa.string()), ("source_row", pa.int64()), ("pair", pa.string())])


@dataclass(frozen=True)
class Prepared:
    """What prepare hands on."""

    tokens: TableVersion
    num_source_rows: int
    num_pairs: int
    quarantined: dict[str, int]
    num_new_pairs: int

    @property
    def dataset_key(self) -> str:
        """Name of the dataset's tables: `<name>-<12 hex digits of the cut>`."""
        return self.tokens.table.removeprefix("tokens/")


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
    metadata = {
        "cut": start.cut,
        "source": start.source,
        "tokenizer": start.tokenizer.properties(_vocab_size(model_folder)),
        "recipe": recipe.model_dump(),
        "parents": [],
        **provenance(),
    }
    with start.intake() as intake:
        for attempt in range(_MAX_TRIES):
            try:
                return _Update(start.tokens, start.quarantine, intake, metadata).run()
            except ConflictError:  # another build of this dataset was faster: compare with what it made
                if attempt == _MAX_TRIES - 1:
                    raise
    raise AssertionError("the loop above returns or raises")


@dataclass(frozen=True)
class Preparation:
    """What is known before a row is read: the two tables of a recipe's pairs, and what determines their content."""

    dataset: DatasetSection
    tokenizer: ChatTokenizer
    context: int
    cut: dict[str, Any]
    source: dict[str, Any]
    store: WeightStore
    tokens: Table
    quarantine: Table

    @classmethod
    def of(cls, recipe: Recipe, model_folder: Path) -> "Preparation":
        """Look at the recipe's source and the model's tokenizer.

        Raises:
            InputError: The model's tokenizer cannot be used.
        """
        tokenizer = ChatTokenizer(model_folder, recipe.model.chat_template)
        context = _model_context(model_folder)
        cut = _cut_settings(recipe.dataset, tokenizer, context)
        key = f"{recipe.dataset.name}-{fingerprint(cut)[:12]}"
        store = WeightStore(recipe.store.uri)
        tokens, quarantine = store.table(f"tokens/{key}"), store.table(f"quarantine/{key}")
        source = _source_settings(recipe.dataset)
        return cls(recipe.dataset, tokenizer, context, cut, source, store, tokens, quarantine)

    def already_done(self) -> Prepared | None:
        """Return the newest version when it was made from the same bytes; hub datasets are always read again."""
        recorded = recorded_source(self.tokens, self.quarantine)
        if self.source["content"] is None or recorded is None:
            return None
        if any(recorded[key] != self.source[key] for key in self.source):
            return None
        num_pairs = self.tokens.metadata()["statistics"]["num_pairs"]
        return Prepared(
            self.tokens.reference(), recorded["num_source_rows"], num_pairs, recorded["quarantined"], num_new_pairs=0
        )

    def other_cuts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield why the pairs of a dataset that the store knows are tokenised anew: a table's path and what differs there."""
        if self.tokens.exists():
            return
        for other in self.store.tables("tokens"):
            if other.path.rpartition("-")[0] == f"tokens/{self.dataset.name}":
                yield other.path, explain_difference(other.metadata()["cut"], self.cut)

    @contextmanager
    def intake(self) -> Iterator["Intake"]:
        """Read the whole source, and keep it until the end of the `with` block.

        Raises:
            InputError: The source cannot be read.
        """
        with (
            ExternalSort(_READ_PAIRS, "pair_id", "source_row") as pairs,
            ExternalSort(QUARANTINE, "source_row") as unusable,
        ):
            intake = Intake(self.dataset, self.tokenizer, self.context, pairs, unusable)
            intake.read(load_rows(self.dataset))
            yield intake


@dataclass
class Intake:
    """Sorts raw rows into pairs, by pair_id, and quarantine; tokenises pairs."""

    dataset: DatasetSection
    tokenizer: ChatTokenizer
    context: int
    pairs: ExternalSort
    unusable: ExternalSort
    reasons: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0

    def read(self, rows: Iterator[RawRow]) -> None:
        """Read every row of the source."""
        pairs: list[dict[str, Any]] = []
        unusable: list[dict[str, Any]] = []
        for row in rows:
            self.num_rows += 1
            try:
                pair = self._pair(row)
                pairs.append(
                    {"pair_id": pair.pair_id, "source_row": row.source_row, "pair": canonical_json(asdict(pair))}
                )
            except Unusable as problem:
                raw = row.raw or json.dumps(row.value, default=str, ensure_ascii=True)
                self.reasons[problem.reason.value] += 1
                unusable.append(_quarantine_row(row.source_row, raw, problem))
            if self.num_rows % _ROWS_PER_BATCH == 0:
                self._add(pairs, unusable)
                pairs, unusable = [], []
                _log.info(f"prepare: {self.num_rows} rows read, {self.pairs.num_rows} of them are pairs")
        self._add(pairs, unusable)

    def _add(self, pairs: list[dict[str, Any]], unusable: list[dict[str, Any]]) -> None:
        self.pairs.add(pa.Table.from_pylist(pairs, _READ_PAIRS))
        self.unusable.add(pa.Table.from_pylist(unusable, QUARANTINE))

    def _pair(self, row: RawRow) -> Pair:
        if row.value is None:
            assert row.reason is not None
            raise Unusable(row.reason, row.detail)
        return read_pair(row.value, self.dataset)

    def tokenize(self, text: str) -> tuple[dict[str, Any], bool, bool]:
        """Return the token columns of a pair (JSON, as read), and whether its prompt and a response were cut.

        Raises:
            Unusable: Over a limit, or the template cannot render this chat.
        """
        pair, limits = Pair(**json.loads(text)), self.dataset
        tokens = self.tokenizer.tokenize_pair(
            pair, limits.max_prompt_tokens, limits.max_response_tokens, limits.long_response == "cut"
        )
        longest = len(tokens.prompt_ids) + max(len(tokens.chosen_ids), len(tokens.rejected_ids))
        if longest >= self.context:  # the engine needs one free position
            raise Unusable(
                Reason.RESPONSE_TOO_LONG,
                f"prompt and response have {longest} tokens, the model's context is {self.context}",
            )
        columns = {
            "prompt": canonical_json(tokens.prompt),
            "prompt_ids": tokens.prompt_ids,
            "chosen_ids": tokens.chosen_ids,
            "rejected_ids": tokens.rejected_ids,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "split": limits.split,
        }
        return columns, tokens.prompt_was_cut, tokens.response_was_cut


class _Update:
    """One try to bring the two tables from their newest versions to the source.

    The new pairs are tokenised into shards that nobody sees yet. They are appended, or, when old pairs have left or stand
    elsewhere in the source, merged with the old rows into a whole new version.
    """

    def __init__(self, tokens: Table, quarantine: Table, intake: Intake, metadata: dict[str, Any]) -> None:
        self.tokens = tokens
        self.quarantine = quarantine
        self.intake = intake
        self.metadata = metadata
        self.base = tokens.version()
        self.quarantine_base = quarantine.version()
        self.recorded = recorded_source(tokens, quarantine)
        self.known = comparable_version(self.base, self.recorded, metadata["source"])
        self.reasons = Counter(intake.reasons)
        self.statistics: Counter[str] = Counter()
        self.pair_ids = hashlib.sha256()
        self.old_rows_stay = True

    def run(self) -> Prepared:
        """Write what has changed.

        Raises:
            InputError: No row of the source can be used.
            ConflictError: Another writer made a version meanwhile.
        """
        with ExternalSort(QUARANTINE, "source_row") as unusable:
            fresh = self._write_fresh(unusable)
            num_pairs = self.statistics["num_pairs"]
            if not num_pairs:
                raise no_usable_pair(self.intake, self.reasons)
            num_new = self.statistics["num_new_pairs"]
            prepared = (self.intake.num_rows, num_pairs, dict(self.reasons), num_new)
            account = account_of(self.metadata["source"], self.intake.num_rows, self.reasons)
            if not num_new and self.old_rows_stay and self.base is not None and self.recorded == account:
                return Prepared(self.tokens.reference(self.base), *prepared)
            # Quarantine first: should the build die in between, the tokens are still the old ones and the next run does both.
            self._commit_quarantine(unusable)
        return Prepared(self._commit_tokens(fresh), *prepared)

    def _write_fresh(self, unusable: ExternalSort) -> list[ShardRecord]:
        writer = self.tokens.writer()
        for piece, rows in self.intake.pairs.ranges():
            known = known_rows(self.tokens, self.known, piece)
            in_source: set[str] = set()
            for start in range(0, rows.num_rows, _ROWS_PER_BATCH):
                batch = rows.slice(start, _ROWS_PER_BATCH).to_pylist()
                tokenised, problems = self._sort(batch, known, in_source)
                writer.write(pa.Table.from_pylist(tokenised, TOKENS))
                unusable.add(pa.Table.from_pylist(problems, QUARANTINE))
                self.statistics["num_new_pairs"] += len(tokenised)
                if tokenised:
                    _log.info(f"prepare: {self.statistics['num_new_pairs']} new pairs tokenised")
            self.old_rows_stay &= known.keys() <= in_source
        return writer.finish()

    def _sort(
        self, rows: list[dict[str, Any]], known: dict[str, int], in_source: set[str]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the new tokenised pairs and the quarantine records among `rows`, which come sorted by pair_id."""
        tokenised, problems = [], []
        for row in rows:
            pair_id = row["pair_id"]
            try:
                standing = standing_of(row, known, in_source)
                if standing == "duplicate":
                    raise Unusable(Reason.DUPLICATE_PAIR, f"pair {pair_id} stood in an earlier row")
                self.old_rows_stay &= standing != "moved"
                if standing == "new":
                    columns, prompt_was_cut, response_was_cut = self.intake.tokenize(row["pair"])
                    tokenised.append({"pair_id": pair_id, "source_row": row["source_row"], **columns})
                    self.statistics["num_new_prompts_cut"] += prompt_was_cut
                    self.statistics["num_new_responses_cut"] += response_was_cut
            except Unusable as problem:
                self.reasons[problem.reason.value] += 1
                problems.append(_quarantine_row(row["source_row"], row["pair"], problem))
                continue
            self.statistics["num_pairs"] += 1
            self.pair_ids.update(pair_id.encode())
        return tokenised, problems

    def _commit_quarantine(self, unusable: ExternalSort) -> None:
        if self.known is not None and self.quarantine_base is not None:  # what no scorer could score stays so
            old = (
                self.quarantine.scan(self.quarantine_base).filter(pl.col("reason") == Reason.UNSCORABLE.value).collect()
            )
            unusable.add(old.to_arrow().select(QUARANTINE.names).cast(QUARANTINE))
        writer = self.quarantine.writer()
        for _, rows in self.intake.unusable.ranges():
            unusable.add(rows)
        for _, rows in unusable.ranges():
            writer.write(rows)
        record = {
            **self.metadata,
            "fingerprint": fingerprint([self.metadata["cut"], self.metadata["source"]["content"]]),
            "statistics": {"num_source_rows": self.intake.num_rows, "reasons": dict(self.reasons)},
        }
        self.quarantine.commit(writer.finish(), record, self.quarantine_base, mode="overwrite")

    def _commit_tokens(self, fresh: list[ShardRecord]) -> TableVersion:
        content = {
            "cut": self.metadata["cut"],
            "reading": self.metadata["source"]["reading"],
            "pairs": self.pair_ids.hexdigest(),
        }
        statistics = {
            "num_source_rows": self.intake.num_rows,
            "quarantined": dict(self.reasons),
            **{name: self.statistics[name] for name in _STATISTICS},
        }
        record = {**self.metadata, "fingerprint": fingerprint(content), "statistics": statistics}
        if self.known is None:
            return self.tokens.commit(fresh, record, self.base, mode="overwrite" if self.base is not None else "append")
        if self.old_rows_stay:
            return self.tokens.commit(fresh, record, self.base)
        merged = self._merge(fresh)
        reference = self.tokens.commit(merged, record, self.base, mode="overwrite")
        for shard in fresh:
            self.tokens.location.delete(shard.name)
        return reference

    def _merge(self, fresh: list[ShardRecord]) -> list[ShardRecord]:
        """Write all rows: the old ones that are still in the source, where they stand now, and the new ones."""
        writer = self.tokens.writer()
        old = self.tokens.scan(self.known)
        new = self.tokens.scan_shards(fresh)
        for piece, rows in self.intake.pairs.ranges():
            first = pl.DataFrame(pl.from_arrow(rows.select(["pair_id", "source_row"]))).unique("pair_id", keep="first")
            stay = piece.of(old).drop("source_row").join(first.lazy(), on="pair_id").select(TOKENS.names)
            merged = pl.concat([stay, piece.of(new).select(TOKENS.names)]).sort("pair_id").collect()
            writer.write(merged.to_arrow().cast(TOKENS))
        return writer.finish()


_STATISTICS = ("num_pairs", "num_new_pairs", "num_new_prompts_cut", "num_new_responses_cut")


def _quarantine_row(source_row: int, raw: str, problem: Unusable) -> dict[str, Any]:
    return {
        "source_row": source_row,
        "pair_id": None,
        "reason": problem.reason.value,
        "detail": _storable(problem.detail),
        "raw": stored_raw(raw),
    }


def stored_raw(text: str) -> str:
    """Return what quarantine keeps of a row: its first characters."""
    return _storable(text[:_RAW_CHARACTERS])


def _source_settings(dataset: DatasetSection) -> dict[str, Any]:
    """Return what is recorded of the source: its content, and how its rows are read."""
    columns = ("prompt_column", "chosen_column", "rejected_column", "chosen_score_column", "rejected_score_column")
    return {
        "content": content_fingerprint(dataset),
        "max_pairs": dataset.max_pairs,
        "reading": {name: getattr(dataset, name) for name in (*columns, "split")},
    }


def _storable(text: str) -> str:
    """Return `text` with lone surrogates, which Parquet cannot hold, made visible as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _cut_settings(dataset: DatasetSection, tokenizer: ChatTokenizer, context: int) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": tokenizer.rendering_fingerprint,
        "context": context,
        "max_prompt_tokens": dataset.max_prompt_tokens,
        "max_response_tokens": dataset.max_response_tokens,
        "long_response": dataset.long_response,
    }


def recorded_source(tokens: Table, quarantine: Table) -> dict[str, Any] | None:
    """Return what the newest version recorded of its source; None when there is no complete version."""
    if not tokens.exists() or not quarantine.exists():
        return None
    metadata = tokens.metadata()
    return {**metadata["source"], **{key: metadata["statistics"][key] for key in ("num_source_rows", "quarantined")}}


def account_of(source: dict[str, Any], num_rows: int, reasons: Mapping[str, int]) -> dict[str, Any]:
    """Return where rows came from and where they went, as `recorded_source` does for the newest version."""
    return {**source, "num_source_rows": num_rows, "quarantined": dict(reasons)}


def comparable_version(base: int | None, recorded: dict[str, Any] | None, source: dict[str, Any]) -> int | None:
    """Return `base` where its rows can be kept, else None.

    Read through other columns or as another split, the old rows say nothing about the new ones.
    """
    return base if recorded and recorded["reading"] == source["reading"] else None


def known_rows(tokens: Table, version: int | None, piece: KeyRange) -> dict[str, int]:
    """Return the pairs that a version has in a range, with their row in the source."""
    if version is None:
        return {}
    return dict(piece.of(tokens.scan(version)).select("pair_id", "source_row").collect().iter_rows())


def standing_of(
    row: dict[str, Any], known: dict[str, int], in_source: set[str]
) -> Literal["new", "stays", "moved", "duplicate"]:
    """Return how a pair of the source stands to the known rows, and note in `in_source` that it has come.

    Rows come sorted by pair_id and row in the source, so that the first of several equal pairs is the one that counts.
    """
    pair_id = row["pair_id"]
    if pair_id in in_source:
        return "duplicate"
    in_source.add(pair_id)
    if pair_id not in known:
        return "new"
    return "stays" if known[pair_id] == row["source_row"] else "moved"


def no_usable_pair(intake: Intake, reasons: Counter[str]) -> InputError:
    """Return the error for a source of which no row can be used."""
    return InputError(
        f"dataset.source {intake.dataset.source}: no usable pair in {intake.num_rows} rows ({_counts_text(reasons)})"
    )


def _counts_text(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "the source is empty"


def _model_config(folder: Path) -> dict[str, Any]:
    config = load_json(folder / "config.json")
    text_config = config.get("text_config")
    return {**config, **text_config} if isinstance(text_config, dict) else config


def _model_context(folder: Path) -> int:
    return int(_model_config(folder).get("max_position_embeddings", 1 << 20))


def _vocab_size(folder: Path) -> int:
    try:
        return int(_model_config(folder)["vocab_size"])
    except KeyError as error:
        raise InputError(f"model {folder}: config.json has no vocab_size") from error
