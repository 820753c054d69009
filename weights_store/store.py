"""The weight store: names, listings and versions of weight datasets, as Polars frames.

The interface for analysts and programs. The tables behind it are in `tables/`, what it shows in `views/`.
"""

import builtins
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl

from weights_store.catalog import check_store, list_tables, open_table
from weights_store.errors import NotFoundError
from weights_store.inspection.choice import Choice
from weights_store.inspection.doctor import Diagnosis, diagnose
from weights_store.inspection.gather import NotebookView, make_view
from weights_store.inspection.survey import Survey, survey
from weights_store.location import Location, local_path
from weights_store.names import check_name, name_of, split_name, weights_path
from weights_store.tables.commits import Commit
from weights_store.tables.metadata import CommitMetadata
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion
from weights_store.views.diff import Diff, diff_tables
from weights_store.views.export import export_table
from weights_store.views.lineage import lineage
from weights_store.views.quarantine import scan_quarantine
from weights_store.views.token_texts import Tokenizer
from weights_store.views.token_view import scan_tokens

_SUMMARY = {
    "name": pl.String(),
    "version": pl.Int64(),
    "estimator": pl.String(),
    "contrast": pl.String(),
    "num_pairs": pl.Int64(),
    "num_response_tokens": pl.Int64(),
    "fingerprint": pl.String(),
    "created": pl.Datetime("ms", "UTC"),
    "changes": pl.String(),
}


@dataclass(frozen=True)
class WeightStore:
    """A store by the URI of its root folder. Nothing is read until a method needs it.

    Every method that takes a name raises NotFoundError if the store, the name or the version is missing (the message lists the
    known names), and SettingsError if the name is malformed. A version of None is the newest one.
    """

    uri: str | Path

    @cached_property
    def root(self) -> Location:
        """The root folder; raises SettingsError if the scheme of the URI is unknown, or it carries credentials."""
        return Location(str(self.uri))

    def table(self, path: str) -> Table:
        """Return one table by its path under the root, for example `weights/hh-harmless/tis-dpo`.

        Raises:
            SettingsError: The path is malformed, or its first part is not a kind of table.
        """
        return open_table(self.root, path)

    def tables(self, kind: str) -> Iterator[Table]:
        """Yield the tables of one kind, by name."""
        return list_tables(self.root, kind)

    def resolve(self, name: str, version: int | None = None) -> TableVersion:
        """Return the reference to one version of a weight dataset."""
        return self._weights(name).reference(version)

    def scan(self, name: str, version: int | None = None, checked: bool = False) -> pl.LazyFrame:
        """Return one version of a weight dataset as a lazy frame, columns as in `schemas.WEIGHTS`.

        A plain scan reads only what a query needs and compares nothing: damaged values pass. With `checked` the bytes of every
        shard are compared with its commit first, each once per process, at about 1.8 GB/s a core.

        Raises:
            DamageError: Only with `checked`: a shard, or the log, is not what was committed. Names it.
        """
        return self._weights(name).scan(version, checked)

    def files(self, name: str, version: int | None = None) -> builtins.list[str]:
        """Return the Parquet files that are one version of a weight dataset, as absolute paths or URIs, in stored order.

        For programs that read Parquet and no Delta: the folder of a table holds files of other versions too. The files of a
        version never change.

        Raises:
            DamageError: The log is not what was committed.
        """
        table = self._weights(name)
        return [(table.location / record.name).absolute_uri for record in table.records(version)]

    def scan_tokens(
        self, name: str, version: int | None = None, tokenizer: Tokenizer | None = None, checked: bool = False
    ) -> pl.LazyFrame:
        """Return one row per response token of one version of a weight dataset, lazily, chosen responses first.

        Columns: `pair_id`, `side` ("chosen" or "rejected"), `position` (0-based in the response), `token_id`, `token` (its
        text, only with a tokenizer), `weight`, in nats `ref_logp`, `logp_pos`, `logp_neg` (the contrastive pair, the mean
        over several), and `attribution`; null what the estimator did not use. Conditions on `pair_id` reach the files of every
        table.

        The tokenizer is the model's (anything with `decode`), or the texts by id as a mapping or a sequence.

        With `checked` the shards of every table are compared with their commits first, see `scan`.

        Raises:
            NotFoundError: Also if a table that the weights were made from is gone.
            MismatchError: When collected: an id is not in the tokenizer.
            DamageError: See `scan`.
        """
        return scan_tokens(self.root, self.resolve(name, version), tokenizer, checked)

    def lineage(self, name: str, version: int | None = None) -> pl.DataFrame:
        """Return everything that one version of a weight dataset was made from, up to the raw pairs, each thing once.

        One row per table version, model and source: `depth` (0 is the weight dataset itself), `role`, `kind` ("table",
        "model" or "source"), `name`, `version`, `fingerprint`, `num_rows`, `created`. What is no longer in the store has no
        `num_rows` and no `created`.

        Raises:
            DamageError: The record of a contrastive model is damaged.
        """
        return lineage(self.root, self.resolve(name, version))

    def survey(self, name: str, version: int | None = None) -> Survey:
        """Count over all response tokens of one version, in one pass and bounded memory: weights, positions, token ids.

        Everything is compared with its commit first.

        Raises:
            NotFoundError: Also if log-probs that the weights were made from are gone.
            DamageError: A shard is not what was committed, weights and tokens differ in number, or a number is not finite.
        """
        return survey(self.root, self.resolve(name, version))

    def doctor(self, name: str, version: int | None = None) -> builtins.list[Diagnosis]:
        """Return what looks wrong with the weights of one version, warnings first; none if nothing does.

        Takes one `survey`. docs/weights.md lists the findings.

        Raises:
            DamageError: See `survey`.
        """
        weights = self.resolve(name, version)
        return diagnose(survey(self.root, weights), self.table(weights.table).metadata(weights.version))

    def quarantine(self, dataset: str) -> pl.LazyFrame:
        """Return the rows of a dataset that could not be used, lazily, with the columns of `schemas.QUARANTINE`.

        Column `table` names the table and its version: a dataset has one for each choice of limits. `dataset` is the name in
        the recipe, a weight dataset of it, or the path of one quarantine table.
        """
        return scan_quarantine(self.root, dataset)

    def diff(self, a: str, b: str) -> Diff:
        """Compare two weight datasets, each `name` or `name@version`, range by range in bounded memory.

        Raises:
            DamageError: A weight is not a finite number.
        """
        old, new = (self.resolve(*split_name(text)) for text in (a, b))
        return diff_tables(self.table(old.table), old.version, self.table(new.table), new.version)

    def view(
        self,
        name: str,
        other: str | None = None,
        *,
        pairs: Sequence[str] = (),
        worst: int | None = None,
        random: int | None = None,
        search: str | None = None,
        where: str | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> NotebookView:
        """Return pairs of a weight dataset with every number of every token, as a page: a notebook shows it by itself.

        Args:
            name: `name` or `name@version`.
            other: Another one of the same pairs: also its weights are shown, and how far both agree.
            pairs: Beginnings of `pair_id`s. With `search` and `where` it filters; `worst` or `random` then picks.
            worst: How many pairs where the contrastive pair disagrees most with the label (smallest log-ratio of the pair);
                without a contrastive pair those whose weights lie on the fewest tokens (smallest effective share); of two
                datasets those on which they disagree most.
            random: How many random pairs; 20 if neither this, `worst` nor `pairs` is given.
            search: A text in the prompt or a response, in upper or lower case; needs a tokenizer.
            where: A condition in Polars' SQL, for example `split = 'test' AND num_chosen_tokens > 50`. Columns: those of
                `schemas.WEIGHTS`, `source_row`, `num_prompt_tokens`, `num_chosen_tokens`, `num_rejected_tokens`,
                `mean_chosen_weight`, `mean_rejected_weight`, `effective_share`, with a contrastive pair `pair_logratio`
                (nats), of two datasets `disagreement`.
            seed: Another one gives other random pairs; the same one the same pairs, however the table is stored.
            tokenizer: See `scan_tokens`; ids are shown without one.

        Raises:
            SettingsError: `where` is no condition over these columns, or the choice contradicts itself.
            InputError: No pair is left, or a beginning of `pairs` fits no pair or several.
            MismatchError: An id is not in the tokenizer.
            DamageError: A shard is not what was committed.
        """
        here, there = self.resolve(*split_name(name)), None if other is None else self.resolve(*split_name(other))
        choice = Choice(pairs, worst, random, search, where, seed)
        return make_view(self.root, here, there, choice, tokenizer)

    def export(
        self,
        name: str,
        folder: str | Path,
        version: int | None = None,
        format: Literal["parquet", "jsonl", "tinker", "loss_scale"] = "parquet",
        tokenizer: Tokenizer | None = None,
        licence: str | None = None,
    ) -> builtins.list[Path]:
        """Write one version of a weight dataset into a new local folder, for programs that do not know this store.

        `parquet`: plain files `data/SPLIT-00000-of-00003.parquet` of bounded size, as `datasets` finds and reads them. Columns:
        those of `schemas.WEIGHTS`, with a tokenizer `prompt`, `chosen` and `rejected` (text), and `row`, the place of the row
        in the version.

        `jsonl`: the layout of the official TIS-DPO release. One file per split, one object per line: `prompt`, `chosen`,
        `rejected` (text) and `chosen_weight`, `rejected_weight` (one number per response token without the last EOS, which the
        release gives weight 0). The release's loader negates `chosen_weight`, so the file holds the chosen weights negated.
        With `transform.method=origin` it then trains on exactly the weights of this store; its default transform would replace
        them by ones. It tokenises the text again and compares lengths only: a pair whose text gives other tokens stops it.
        Without a tokenizer the file has `prompt_ids`, `chosen_ids`, `rejected_ids` instead of texts, which the release cannot
        read. Not in the file: reference log-probs, pair weights, anchors, `pair_id`.

        `tinker`: each pair as two Datums of the tinker API with the token weights. `loss_scale`: rows of ms-swift; needs a
        tokenizer that can encode. One file per split; docs/trainers.md says what their trainers keep and lose.

        `tokenweights.json` says what the version is, how it was made, the licence of its source (as given, else "unknown"), and
        the SHA-256 of each file. Returns the files, that one last. The folder appears whole or not at all. For the tokenizer
        see `scan_tokens`.

        Raises:
            InputError: The folder exists and is not empty or is in no home folder that is here, the format is unknown,
                (`loss_scale`) the tokenizer is missing or does not fit, or (`tinker`) there is one.
            MismatchError: An id is not in the tokenizer, (`jsonl`) the version records no EOS id, (`loss_scale`) the text of
                a prompt gives other ids, or a format for pairs meets unpaired rows.
            DamageError: A shard is not what was committed.
        """
        weights = self.resolve(name, version)
        return export_table(self.table(weights.table), weights, local_path(str(folder)), format, tokenizer, licence)

    def list(self) -> pl.DataFrame:
        """Return one row per weight dataset: name, newest version, estimator, pairs, tokens, fingerprint, time.

        Weights that no recipe has made, but a program with `Table`, have null for what it did not record.

        Raises:
            NotFoundError: There is no store at the URI.
        """
        check_store(self.root)
        newest = {table.path: table.history(limit=1) for table in self.tables("weights")}
        rows = [_summary(name_of(path), commit) for path, commits in newest.items() for commit in commits]
        return pl.DataFrame(rows, schema=_SUMMARY)

    def history(self, name: str) -> pl.DataFrame:
        """Return one row per version of a weight dataset, newest first, with what changed in its recipe."""
        return pl.DataFrame([_summary(name, commit) for commit in self._weights(name).history()], schema=_SUMMARY)

    def metadata(self, name: str, version: int | None = None) -> CommitMetadata:
        """Return what the commit of one version of a weight dataset recorded."""
        return self._weights(name).metadata(version)

    def _weights(self, name: str) -> Table:
        check_name(name)
        check_store(self.root)
        table = self.table(weights_path(name))
        if not table.exists():
            listed = ", ".join(name_of(other.path) for other in self.tables("weights")) or "none yet"
            raise NotFoundError(f"no weight dataset {name!r} in {self.root}; there are: {listed}")
        return table


def _summary(name: str, commit: Commit) -> dict[str, object]:
    assert commit.metadata is not None, "histories hold our own commits"
    metadata = commit.metadata
    settings, statistics = metadata.get("identity", {}).get("settings", {}), metadata.get("statistics", {})
    num_rows = None if commit.log is None else commit.log["num_rows"]
    return {
        "name": name,
        "version": commit.version,
        "estimator": settings.get("weights", {}).get("estimator"),
        "contrast": settings.get("contrast", {}).get("method"),
        "num_pairs": statistics.get("num_pairs", num_rows),
        "num_response_tokens": statistics.get("num_response_tokens"),
        "fingerprint": metadata["fingerprint"],
        "created": commit.timestamp_ms,
        "changes": "; ".join(metadata.get("changes", [])),
    }
