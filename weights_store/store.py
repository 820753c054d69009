"""The weight store: names, listings and versions of weight datasets, as Polars frames.

The surface that analysts use; the tables behind it are in `table.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from weights_store import schemas
from weights_store.errors import NotFoundError, SettingsError
from weights_store.location import Location
from weights_store.table import Commit, Table, TableVersion

_SCHEMAS: dict[str, pa.Schema] = {
    "tokens": schemas.TOKENS,
    "logps": schemas.LOGPS,
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
