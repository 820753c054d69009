"""From a weight dataset up to the raw pairs: every table version, model and source it was made from, each once.

Everything comes from what commits recorded; nothing is hashed again. What is no longer in the store keeps its row, without a
number of rows and a time. What pulled weights were made from is shown as the store that pushed them recorded it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import polars as pl

from weights_store.catalog import open_table
from weights_store.checks.model_folders import MODELS, RECORD, ModelRecord, read_model_record
from weights_store.location import Location
from weights_store.names import quarantine_path, weights_path
from weights_store.tables.metadata import CommitMetadata, OriginRecord, Parent, Section
from weights_store.tables.table import Table
from weights_store.tables.table_reader import TableVersion

_MODEL_SIDES = ("positive", "negative")
_TRAINED = ("sft", "dpo")
"""Methods of `contrast` that train their models."""
_COLUMNS = {
    "depth": pl.Int64(),
    "role": pl.String(),
    "kind": pl.String(),
    "name": pl.String(),
    "version": pl.Int64(),
    "fingerprint": pl.String(),
    "num_rows": pl.Int64(),
    "created": pl.Datetime("ms", "UTC"),
}

_Recipe = Mapping[str, Section]


def lineage(root: Location, weights: TableVersion) -> pl.DataFrame:
    """Return the ancestry of one version of a weight dataset, see `WeightStore.lineage`."""
    walk = _Walk(root)
    walk.table(0, "weights", weights.as_parent(), {})
    rows = [{"depth": depth, **thing._asdict()} for depth, thing in walk.found.values()]
    return pl.DataFrame(rows, schema=_COLUMNS)


def origin_text(origin: OriginRecord) -> str:
    """Return where weights were pulled from: a folder, or a repository of the hub at a commit."""
    return f"{origin['place']}@{origin['revision']}" if origin["revision"] else origin["place"]


class _Thing(NamedTuple):
    """One table version, model or source: the columns of the result without `depth`."""

    role: str
    kind: str
    name: str | None
    version: int | None
    fingerprint: str | None
    num_rows: int | None = None
    created: int | None = None  # ms since 1970


@dataclass
class _Walk:
    """Depth first, so that what a thing was made from is right below it, one deeper."""

    root: Location
    found: dict[tuple[object, ...], tuple[int, _Thing]] = field(default_factory=dict)

    def table(self, depth: int, role: str, parent: Parent, recipe: _Recipe) -> None:
        """Add one table version and all that it was made from; `recipe` is that of the weight dataset below it."""
        table, version = open_table(self.root, parent["table"]), parent["version"]
        thing = _Thing(role, "table", table.path, version, parent["fingerprint"])
        commit = table.read_commit(version)
        metadata = commit.metadata
        if metadata is None or metadata["fingerprint"] != parent["fingerprint"]:  # it is gone, or another one is there
            self._add(depth, thing)
            return
        thing = thing._replace(num_rows=table.num_rows(version), created=commit.timestamp_ms)
        if not self._add(depth, thing):
            return
        recipe = metadata.get("recipe", recipe)
        for above in metadata.get("parents", []):
            self.table(depth + 1, above.get("role", above["table"].partition("/")[0]), above, recipe)
        if "origin" in metadata:
            self._origin(depth + 1, metadata["origin"])
        if "scorer" in metadata:
            self._model(depth + 1, role, metadata["scorer"]["model"], recipe)
        if "source" in metadata:
            name = _text(metadata.get("recipe", {}), "dataset", "source")
            num_rows = metadata.get("statistics", {}).get("num_source_rows")
            self._add(depth + 1, _Thing("source", "source", name, None, metadata["source"].get("content"), num_rows))
            self._quarantine(depth + 1, table, metadata)

    def _origin(self, depth: int, origin: OriginRecord) -> None:
        """Add the repository that weights were pulled from, and what its record says that they were made from."""
        self._add(depth, _Thing("pulled from", "source", origin_text(origin), None, None))
        for row in origin["lineage"]:
            created = row.get("created")
            ms = None if created is None else int(datetime.fromisoformat(created).timestamp() * 1000)
            name, version, fingerprint, num_rows = map(row.get, ("name", "version", "fingerprint", "num_rows"))
            thing = _Thing(row["role"], str(row.get("kind")), name, version, fingerprint, num_rows, ms)
            self._add(depth + 1 + row["depth"], thing)

    def _model(self, depth: int, role: str, fingerprint: str, recipe: _Recipe) -> None:
        """Add a scorer's model, and what it was trained on if it was trained here."""
        of_pair = role.removesuffix("_logps").rstrip("0123456789")  # a further pair of prompts has a number
        side = of_pair if of_pair in _MODEL_SIDES else None
        given = _text(recipe, "contrast", f"{side}_model") if side else None
        trained = list(self._trained(side, fingerprint, recipe)) if side else []
        start = _text(recipe, "model", "path")
        if not trained:
            is_gone = side and _text(recipe, "contrast", "method") in _TRAINED
            gone = _Thing(f"{side} model, not in {MODELS}/", "model", None, None, fingerprint)
            there = _Thing(f"{side} model" if given else "model", "model", given or start, None, fingerprint)
            self._add(depth, gone if is_gone else there)
        for name, record, created in trained:
            known = record.get("fingerprint", fingerprint if len(trained) == 1 else None)
            label = f"{side} model" if len(trained) == 1 else f"{side} model, one of {len(trained)}"
            if self._add(depth, _Thing(label, "model", name, None, known, None, created)):
                identity, version = record["identity"], record["version"]
                data: Parent = {"table": identity["table"], "version": version, "fingerprint": record["data"]}
                self.table(depth + 1, "trained on", data, recipe)
                self._add(depth + 1, _Thing("started from", "model", start, None, identity["model"]))

    def _trained(self, side: str, fingerprint: str, recipe: _Recipe) -> Iterator[tuple[str, ModelRecord, int | None]]:
        """Yield name, record and time of the contrastive models that fit the recipe: several if the data has grown since.

        A record with the model's own fingerprint decides.
        """
        settings = recipe.get("contrast", {})
        other = _text(recipe, "contrast", "weights")
        pairs = weights_path(other.partition("@")[0] if other else f"{_text(recipe, 'dataset', 'name')}/uniform")
        models = self.root / MODELS
        for name in models.folders():
            folder = models / name
            record = read_model_record(folder)
            if record is None:
                continue
            identity = record["identity"]
            fits = identity["side"] == side and identity["table"] == pairs
            fits &= all(settings.get(key) == value for key, value in identity["training"].items())
            if fits and record.get("fingerprint", fingerprint) == fingerprint:
                modified_ns = folder.filesystem.get_file_info(RECORD).mtime_ns
                yield f"{MODELS}/{name}", record, None if modified_ns is None else modified_ns // 1_000_000

    def _quarantine(self, depth: int, tokens: Table, metadata: CommitMetadata) -> None:
        """Add the newest version of the quarantine that was made from the same source with the same limits."""
        table = open_table(self.root, quarantine_path(tokens.path))
        for commit in table.history() if table.exists() else ():
            made = commit.metadata or {}
            if (made.get("cut"), made.get("source")) == (metadata.get("cut"), metadata["source"]):
                at, rows, created = commit.version, table.num_rows(commit.version), commit.timestamp_ms
                self._add(depth, _Thing("quarantine", "table", table.path, at, made["fingerprint"], rows, created))
                return

    def _add(self, depth: int, thing: _Thing) -> bool:
        """Add one thing; return whether it was new. Models with the same content are the same, wherever they are."""
        place = None if thing.kind == "model" and thing.fingerprint else (thing.name, thing.version)
        key = (thing.kind, place, thing.fingerprint)
        if key in self.found:
            return False
        self.found[key] = (depth, thing)
        return True


def _text(recipe: _Recipe, section: str, key: str) -> str | None:
    value = recipe.get(section, {}).get(key)
    return None if value is None else str(value)
