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

import pyarrow as pa

from pipeline.chat import ChatTokenizer
from pipeline.load import RawRow, content_fingerprint, load_rows
from pipeline.pairs import Unusable, read_pair
from pipeline.provenance import provenance
from pipeline.recipe import DatasetSection, Recipe
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import InputError
from weights_store.fingerprint import canonical_json, fingerprint
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
    source = {
        "content": content_fingerprint(recipe.dataset),
        "source": recipe.dataset.source,
        "max_pairs": recipe.dataset.max_pairs,
    }
    done = _already_done(tokens, quarantine, source)
    if done is not None:
        return done

    sorter = _Sorter(recipe.dataset, tokenizer, context, set(tokens.pair_ids().to_list()))
    batches = list(sorter.sort(load_rows(recipe.dataset), report))
    if not sorter.kept:
        reasons = _counts_text(sorter.reasons)
        raise InputError(
            f"dataset.source {recipe.dataset.source}: no usable pair in {sorter.num_rows} rows ({reasons})"
        )
    new_rows = pa.Table.from_batches(batches, TOKENS)
    if (
        not new_rows.num_rows
        and sorter.known == sorter.kept
        and _recorded(tokens, quarantine) == sorter.account(source)
    ):
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
    reference = _write_tokens(tokens, new_rows, sorter, metadata)
    return Prepared(reference, sorter.num_rows, len(sorter.kept), dict(sorter.reasons), new_rows.num_rows)


def _write_tokens(tokens: Table, new_rows: pa.Table, sorter: "_Sorter", metadata: dict[str, Any]) -> TableVersion:
    vanished = sorter.known - sorter.kept
    if vanished:
        old = tokens.scan().collect().to_arrow().cast(TOKENS)
        stays = pa.array([pair_id in sorter.kept for pair_id in old["pair_id"].to_pylist()])
        new_rows = pa.concat_tables([old.filter(stays), new_rows])
    statistics = {
        "num_source_rows": sorter.num_rows,
        "num_pairs": len(sorter.kept),
        "quarantined": dict(sorter.reasons),
        "num_new_pairs": new_rows.num_rows,
        "prompts_cut": sorter.prompts_cut,
        "responses_cut": sorter.responses_cut,
    }
    content = fingerprint({"cut": metadata["cut"], "pairs": sorted(sorter.kept)})
    record = {**metadata, "fingerprint": content, "statistics": statistics}
    if vanished:
        return tokens.replace(new_rows, record)
    if tokens.exists() and not new_rows.num_rows:  # the same pairs from other rows: a version that records just that
        return tokens.replace(tokens.scan().collect().to_arrow(), record)
    return tokens.append(new_rows, record)


@dataclass
class _Sorter:
    """Sorts raw rows into new tokenised pairs, pairs already known, and quarantine."""

    dataset: DatasetSection
    tokenizer: ChatTokenizer
    context: int
    known: set[str]
    kept: set[str] = field(default_factory=set)
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
            self.kept.add(pair_id)
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
        self.kept.add(pair_id)
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
    if (
        source["content"] is None
        or recorded is None
        or any(recorded[key] != source[key] for key in ("content", "max_pairs"))
    ):
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
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text_config = config.get("text_config")
    return {**config, **text_config} if isinstance(text_config, dict) else config


def _model_context(folder: Path) -> int:
    return int(_model_config(folder).get("max_position_embeddings", 1 << 20))


def _vocab_size(folder: Path) -> int:
    try:
        return int(_model_config(folder)["vocab_size"])
    except KeyError as error:
        raise InputError(f"model {folder}: config.json has no vocab_size") from error
