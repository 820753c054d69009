"""The weight store: names, listings and versions of weight datasets, as Polars frames.

The surface that analysts use; the tables behind it are in `table.py`.
"""

import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa

from weights_store import schemas
from weights_store.errors import NotFoundError, SettingsError
from weights_store.location import Location
from weights_store.tables.commits import Commit
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion
from weights_store.views.diff import Diff, diff_tables
from weights_store.views.export import export_table
from weights_store.views.lineage import lineage
from weights_store.views.token_texts import Tokenizer
from weights_store.views.token_view import scan_tokens

_SCHEMAS: dict[str, pa.Schema] = {
    "tokens": schemas.TOKENS,
    "logps": schemas.LOGPS,
    "attributions": schemas.ATTRIBUTIONS,
    "anchors": schemas.ANCHORS,
    "weights": schemas.WEIGHTS,
    "quarantine": schemas.QUARANTINE,
}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


def check_name(name: str) -> str:
    """Return `name` when it may name a dataset: lower-case parts of letters, digits, `.`, `_`, `-`, joined by `/`.

    Raises:
        SettingsError: It may not.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise SettingsError(
            f"bad name {name!r}: expected lower-case letters, digits, '.', '_', '-', with '/' between parts, "
            "for example hh-harmless/tis-dpo"
        )
    return name


def split_name(text: str) -> tuple[str, int | None]:
    """Split `name@version` into name and version; the version is None where none is given.

    Raises:
        SettingsError: The name or the version is malformed.
    """
    name, at, version = text.partition("@")
    if at and not version.isdecimal():
        raise SettingsError(f"bad version in {text!r}: expected NAME@NUMBER, for example hh-harmless/tis-dpo@3")
    return check_name(name), int(version) if at else None


@dataclass(frozen=True)
class WeightStore:
    """A store by the URI of its root folder.

    Opening is free: nothing is read until a method needs it.
    """

    uri: str | Path

    @cached_property
    def root(self) -> Location:
        """Where the store lies.

        Raises:
            SettingsError: The URI names a scheme that is not spoken here, or carries credentials.
        """
        return Location(str(self.uri))

    def table(self, path: str) -> Table:
        """Return one table by its path under the root, for example `weights/hh-harmless/tis-dpo`.

        Raises:
            SettingsError: The path is malformed or its first part is no kind of table.
        """
        kind, _, rest = path.partition("/")
        if kind not in _SCHEMAS:
            raise SettingsError(f"no kind of table {kind!r}: expected one of {', '.join(_SCHEMAS)}")
        check_name(rest)
        return Table(self.root, path, _SCHEMAS[kind], schemas.KEYS[kind])

    def tables(self, kind: str) -> Iterator[Table]:
        """Yield the tables of one kind, by name."""
        yield from self._tables_under(kind)

    def _tables_under(self, path: str) -> Iterator[Table]:
        """Look one level at a time: a listing of all files of an object store would take minutes."""
        for name in (self.root / path).folders():
            below = f"{path}/{name}"
            if _NAME.fullmatch(name) is None:
                continue
            if (self.root / below).exists("_delta_log"):
                yield self.table(below)
            else:
                yield from self._tables_under(below)

    def resolve(self, name: str, version: int | None = None) -> TableVersion:
        """Return the reference to one version of a weight dataset, the newest by default.

        Raises:
            NotFoundError: No such store, name or version; the message names what there is.
        """
        return self._weights(name).reference(version)

    def scan(self, name: str, version: int | None = None) -> pl.LazyFrame:
        """Return one version of a weight dataset as a lazy frame, columns as in `schemas.WEIGHTS`.

        Raises:
            NotFoundError: No such store, name or version.
        """
        return self._weights(name).scan(version)

    def scan_tokens(self, name: str, version: int | None = None, tokenizer: Tokenizer | None = None) -> pl.LazyFrame:
        """Return one row per response token of one version of a weight dataset, lazily, chosen responses first.

        Columns: `pair_id`, `side` ("chosen" or "rejected"), `position` (0-based in the response), `token_id`, `token` (its
        text, with a tokenizer only), `weight`, and in nats `ref_logp`, `logp_pos`, `logp_neg` (the contrastive pair; null
        where the estimator used none). Conditions on `pair_id` reach the files of every table.

        Args:
            name: The weight dataset.
            version: Which version; the newest by default.
            tokenizer: The model's tokenizer (anything with `decode`), or the texts by id as a mapping or a sequence.

        Raises:
            NotFoundError: No such store, name or version, or a table that the weights were made from is gone.
            MismatchError: When collected: an id is not in the tokenizer.
        """
        return scan_tokens(self, self.resolve(name, version), tokenizer)

    def lineage(self, name: str, version: int | None = None) -> pl.DataFrame:
        """Return everything one version of a weight dataset came from, up to the raw pairs, each thing once.

        One row per table version, model and source: `depth` (0 is the weight dataset itself), `role`, `kind` ("table",
        "model" or "source"), `name`, `version`, `fingerprint` (12 hex digits), `rows`, `created`. What has left the store
        since has no `rows` and no `created`.

        Raises:
            NotFoundError: No such store, name or version.
        """
        return lineage(self, self.resolve(name, version))

    def diff(self, a: str, b: str) -> Diff:
        """Compare two weight datasets, each as `name` or `name@version`, range by range in bounded memory.

        Raises:
            NotFoundError: No such store, name or version.
            SettingsError: A name is malformed.
        """
        old, new = (self.resolve(*split_name(text)) for text in (a, b))
        return diff_tables(self.table(old.table), old.version, self.table(new.table), new.version)

    def export(
        self,
        name: str,
        folder: str | Path,
        version: int | None = None,
        format: Literal["parquet", "jsonl"] = "parquet",
        tokenizer: Tokenizer | None = None,
    ) -> builtins.list[Path]:
        """Write one version of a weight dataset into a new local folder, for programs that do not know this store.

        `parquet`: plain files of bounded size with the columns of `schemas.WEIGHTS`, as `datasets` reads them. The tokenizer
        is not used.

        `jsonl`: the layout of the official TIS-DPO release, one file per split, one object per line: `prompt`, `chosen`,
        `rejected` (text) and `chosen_weight`, `rejected_weight` (one number per response token, the last EOS left out: the
        release gives it weight 0). Its loader negates `chosen_weight`, so the chosen weights stand there negated, and
        `transform.method=origin` trains on exactly the weights of this store; its default transform would replace them by
        ones. The release tokenises the text again and checks lengths only: pairs whose text does not come back as the same
        tokens stop it. Without a tokenizer there is no text: `prompt_ids`, `chosen_ids`, `rejected_ids` stand in its place, and
        the release cannot read the file. Left out in either case: reference log-probs, pair weights, anchors, `pair_id`.

        Either way `tokenweights.json` names the version and its fingerprint. Returns the files, that one last.

        Args:
            name: The weight dataset.
            folder: Where to; it appears whole or not at all.
            version: Which version; the newest by default.
            format: `parquet` or `jsonl`.
            tokenizer: For the texts of `jsonl`, see `scan_tokens`.

        Raises:
            NotFoundError: No such store, name or version.
            InputError: The folder is there and not empty, or the format is unknown.
            MismatchError: An id is not in the tokenizer, or (`jsonl`) the version records no EOS id.
            DamageError: A shard is not what was committed.
        """
        weights = self.resolve(name, version)
        return export_table(self.table(weights.table), weights, Path(folder), format, tokenizer)

    def list(self) -> pl.DataFrame:
        """Return one row per weight dataset: name, newest version, estimator, pairs, tokens, fingerprint, time.

        Raises:
            NotFoundError: There is no store at the URI.
        """
        self._check_exists()
        newest = {table.path.removeprefix("weights/"): table.history(limit=1) for table in self.tables("weights")}
        rows = [_summary(name, commit) for name, commits in newest.items() for commit in commits]
        return pl.DataFrame(rows, schema=_SUMMARY)

    def history(self, name: str) -> pl.DataFrame:
        """Return one row per version of a weight dataset, newest first, with what changed in its recipe.

        Raises:
            NotFoundError: No such store or name.
        """
        rows = [_summary(name, commit) for commit in self._weights(name).history()]
        return pl.DataFrame(rows, schema=_SUMMARY)

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Return what the commit of one version of a weight dataset recorded.

        Raises:
            NotFoundError: No such store, name or version.
        """
        return self._weights(name).metadata(version)

    def _weights(self, name: str) -> Table:
        check_name(name)
        self._check_exists()
        table = self.table(f"weights/{name}")
        if not table.exists():
            known = [other.path.removeprefix("weights/") for other in self.tables("weights")]
            listed = ", ".join(known) if known else "none yet"
            raise NotFoundError(f"no weight dataset {name!r} in {self.root}; there are: {listed}")
        return table

    def _check_exists(self) -> None:
        if not any((self.root / kind).exists() for kind in _SCHEMAS):
            raise NotFoundError(f"no store at {self.root}: expected a folder that `tokenweights build` has written")


_SUMMARY: dict[str, Any] = {
    "name": pl.String,
    "version": pl.Int64,
    "estimator": pl.String,
    "contrast": pl.String,
    "pairs": pl.Int64,
    "response_tokens": pl.Int64,
    "fingerprint": pl.String,
    "created": pl.Datetime("ms", "UTC"),
    "changes": pl.String,
}


def _summary(name: str, commit: Commit) -> dict[str, Any]:
    assert commit.metadata is not None, "histories hold our own commits"
    metadata = commit.metadata
    settings = metadata["identity"]["settings"]
    return {
        "name": name,
        "version": commit.version,
        "estimator": settings["weights"]["estimator"],
        "contrast": settings["contrast"].get("method"),
        "pairs": metadata["statistics"]["num_pairs"],
        "response_tokens": metadata["statistics"]["num_response_tokens"],
        "fingerprint": metadata["fingerprint"][:12],
        "created": commit.timestamp_ms,
        "changes": "; ".join(metadata.get("changes", [])),
    }
