"""Stage prepare: raw rows to tokens, unusable rows to quarantine.

A tokens table is named for the dataset and for what cuts it into ids (tokenizer, template, limits), so that different cuts
never mix. Its newest version holds exactly the usable pairs of the source as it is now: new pairs are tokenised and appended;
when pairs have left the source, a new version without them is written.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline.chat import ChatTokenizer
from pipeline.load import RawRow, content_fingerprint, load_rows
from pipeline.pairs import Unusable, read_pair
from pipeline.provenance import provenance
from pipeline.recipe import DatasetSection, Recipe
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import InputError
from weights_store.fingerprint import canonical_json, fingerprint, load_json
from weights_store.schemas import QUARANTINE, SCHEMA_VERSION, TOKENS, Reason

_RAW_CHARACTERS = 2000
_ROWS_PER_BATCH = 2000


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


def prepare(recipe: Recipe, model_folder: Path, report: Callable[[str], None] = print) -> Prepared:
    """Bring the tokens and quarantine tables up to the recipe's source.

    Raises:
        InputError: The source or the model's tokenizer cannot be used, or no row of the source can.
    """
    tokenizer = ChatTokenizer(model_folder, recipe.model.chat_template)
    context = _model_context(model_folder)
    cut = _cut_settings(recipe.dataset, tokenizer, context)
    key = f"{recipe.dataset.name}-{fingerprint(cut)[:12]}"
    store = WeightStore(recipe.store.uri)
    tokens, quarantine = store.table(f"tokens/{key}"), store.table(f"quarantine/{key}")
    source = _source_settings(recipe.dataset)
    done = _already_done(tokens, quarantine, source)
    if done is not None:
        return done

    recorded = _recorded(tokens, quarantine)
    read_alike = recorded is not None and recorded["reading"] == source["reading"]
    sorter = _Sorter(recipe.dataset, tokenizer, context, _known_rows(tokens) if read_alike else {})
    batches = list(sorter.sort(load_rows(recipe.dataset), report))
    if not sorter.kept:
        reasons = _counts_text(sorter.reasons)
        raise InputError(
            f"dataset.source {recipe.dataset.source}: no usable pair in {sorter.num_rows} rows ({reasons})"
        )
    new_rows = pa.Table.from_batches(batches, TOKENS)
    if not new_rows.num_rows and sorter.known == sorter.kept and recorded == sorter.account(source):
        return Prepared(tokens.reference(), sorter.num_rows, len(sorter.kept), dict(sorter.reasons), num_new_pairs=0)
    metadata = {
        "cut": cut,
        "source": source,
        "tokenizer": tokenizer.properties(_vocab_size(model_folder)),
        "recipe": recipe.model_dump(),
        "parents": [],
        **provenance(),
    }
    # Quarantine first: should the build die in between, the tokens are still the old ones and the next run does both again.
    quarantine.replace(pa.Table.from_pylist(sorter.quarantined, QUARANTINE), _quarantine_metadata(metadata, sorter))
    reference = _write_tokens(tokens, new_rows, sorter, metadata, whole=not read_alike)
    return Prepared(reference, sorter.num_rows, len(sorter.kept), dict(sorter.reasons), new_rows.num_rows)


def _write_tokens(
    tokens: Table, new_rows: pa.Table, sorter: "_Sorter", metadata: dict[str, Any], whole: bool
) -> TableVersion:
    """Append the new rows; write all rows when some have left, stand elsewhere in the source, or are read differently."""
    statistics = {
        "num_source_rows": sorter.num_rows,
        "num_pairs": len(sorter.kept),
        "quarantined": dict(sorter.reasons),
        "num_new_pairs": new_rows.num_rows,
        "num_new_prompts_cut": sorter.prompts_cut,
        "num_new_responses_cut": sorter.responses_cut,
    }
    content = {"cut": metadata["cut"], "reading": metadata["source"]["reading"], "pairs": sorted(sorter.kept)}
    record = {**metadata, "fingerprint": fingerprint(content), "statistics": statistics}
    if whole and tokens.exists():
        return tokens.replace(new_rows, record)
    if not tokens.exists() or (
        sorter.kept.keys() > sorter.known.keys() and sorter.known.items() <= sorter.kept.items()
    ):
        return tokens.append(new_rows, record)
    old = tokens.scan().collect()
    stays = old.with_columns(
        source_row=pl.col("pair_id").replace_strict(sorter.kept, default=None, return_dtype=pl.Int64)
    )
    stays = stays.filter(pl.col("source_row").is_not_null())
    return tokens.replace(pa.concat_tables([stays.to_arrow().select(TOKENS.names).cast(TOKENS), new_rows]), record)


def _source_settings(dataset: DatasetSection) -> dict[str, Any]:
    """Return what is recorded of the source: its content, and how its rows are read."""
    columns = ("prompt_column", "chosen_column", "rejected_column", "chosen_score_column", "rejected_score_column")
    return {
        "content": content_fingerprint(dataset),
        "max_pairs": dataset.max_pairs,
        "reading": {name: getattr(dataset, name) for name in (*columns, "split")},
    }


def _known_rows(tokens: Table) -> dict[str, int]:
    """Return the pairs of the newest version with their row in the source."""
    if not tokens.exists():
        return {}
    return dict(tokens.scan().select("pair_id", "source_row").collect().iter_rows())


@dataclass
class _Sorter:
    """Sorts raw rows into new tokenised pairs, pairs already known, and quarantine."""

    dataset: DatasetSection
    tokenizer: ChatTokenizer
    context: int
    known: dict[str, int]  # pair_id to source row, of the table's newest version
    kept: dict[str, int] = field(default_factory=dict)  # the same for the source as it is now
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0

    def sort(self, rows: Iterator[RawRow], report: Callable[[str], None]) -> Iterator[pa.RecordBatch]:
        """Yield record batches of new tokenised pairs; the rest is counted in the fields."""
        batch: list[dict[str, Any]] = []
        for row in rows:
            self.num_rows += 1
            try:
                tokenised = self._one(row)
            except Unusable as problem:
                self._quarantine(row, problem)
                continue
            if tokenised is not None:
                batch.append(tokenised)
            if len(batch) == _ROWS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(batch, TOKENS)
                batch = []
                report(f"prepare: {self.num_rows} rows read, {len(self.kept)} pairs usable")
        if batch:
            yield pa.RecordBatch.from_pylist(batch, TOKENS)

    def account(self, source: dict[str, Any]) -> dict[str, Any]:
        """Return where the rows came from and where they went, as `_recorded` does for the newest version."""
        return {**source, "num_source_rows": self.num_rows, "quarantined": dict(self.reasons)}

    def _one(self, row: RawRow) -> dict[str, Any] | None:
        """Return the tokenised pair, None when the table already has it."""
        if row.value is None:
            assert row.reason is not None
            raise Unusable(row.reason, row.detail)
        pair = read_pair(row.value, self.dataset)
        pair_id = pair.pair_id
        if pair_id in self.kept:
            raise Unusable(Reason.DUPLICATE_PAIR, f"pair {pair_id} stood in an earlier row")
        if pair_id in self.known:
            self.kept[pair_id] = row.source_row
            return None
        limits = self.dataset
        tokens = self.tokenizer.tokenize_pair(
            pair, limits.max_prompt_tokens, limits.max_response_tokens, limits.long_response == "cut"
        )
        longest = len(tokens.prompt_ids) + max(len(tokens.chosen_ids), len(tokens.rejected_ids))
        if longest >= self.context:  # the engine needs one free position
            raise Unusable(
                Reason.RESPONSE_TOO_LONG,
                f"prompt and response have {longest} tokens, the model's context is {self.context}",
            )
        self.kept[pair_id] = row.source_row
        self.prompts_cut += tokens.prompt_was_cut
        self.responses_cut += tokens.response_was_cut
        return {
            "pair_id": pair_id,
            "prompt": canonical_json(tokens.prompt),
            "prompt_ids": tokens.prompt_ids,
            "chosen_ids": tokens.chosen_ids,
            "rejected_ids": tokens.rejected_ids,
            "chosen_score": pair.chosen_score,
            "rejected_score": pair.rejected_score,
            "source_row": row.source_row,
            "split": self.dataset.split,
        }

    def _quarantine(self, row: RawRow, problem: Unusable) -> None:
        self.reasons[problem.reason.value] += 1
        raw = row.raw or json.dumps(row.value, default=str, ensure_ascii=True)
        record = {
            "source_row": row.source_row,
            "pair_id": None,
            "reason": problem.reason.value,
            "detail": _storable(problem.detail),
            "raw": _storable(raw[:_RAW_CHARACTERS]),
        }
        self.quarantined.append(record)


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


def _recorded(tokens: Table, quarantine: Table) -> dict[str, Any] | None:
    """Return what the newest version recorded of its source; None when there is no complete version."""
    if not tokens.exists() or not quarantine.exists():
        return None
    metadata = tokens.metadata()
    return {**metadata["source"], **{key: metadata["statistics"][key] for key in ("num_source_rows", "quarantined")}}


def _already_done(tokens: Table, quarantine: Table, source: dict[str, Any]) -> Prepared | None:
    """Return the newest version when it was made from the same bytes; hub datasets are always read again."""
    recorded = _recorded(tokens, quarantine)
    if source["content"] is None or recorded is None or any(recorded[key] != source[key] for key in source):
        return None
    num_pairs = tokens.metadata()["statistics"]["num_pairs"]
    return Prepared(
        tokens.reference(), recorded["num_source_rows"], num_pairs, recorded["quarantined"], num_new_pairs=0
    )


def _quarantine_metadata(metadata: dict[str, Any], sorter: _Sorter) -> dict[str, Any]:
    statistics = {"num_source_rows": sorter.num_rows, "reasons": dict(sorter.reasons)}
    return {
        **metadata,
        "fingerprint": fingerprint([metadata["cut"], metadata["source"]["content"]]),
        "statistics": statistics,
    }


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
