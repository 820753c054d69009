"""From a weight dataset up to the raw pairs: every table version, model and source it came from, each once.

Everything is read from what commits recorded; nothing is hashed again. What has left the store since keeps its row, with no
number of rows and no time.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from weights_store.errors import NotFoundError
from weights_store.tables.commits import Commit, read_commit
from weights_store.tables.table import Table

if TYPE_CHECKING:
    from weights_store.store import WeightStore
    from weights_store.tables.table_reader import TableVersion

_CONTRAST_RECORD = "contrast.json"
_SIDES = {"positive_logps": "positive", "negative_logps": "negative"}
_SCHEMA: dict[str, Any] = {
    "depth": pl.Int64,
    "role": pl.String,
    "kind": pl.String,
    "name": pl.String,
    "version": pl.Int64,
    "fingerprint": pl.String,
    "rows": pl.Int64,
    "created": pl.Datetime("ms", "UTC"),
}


def lineage(store: "WeightStore", weights: "TableVersion") -> pl.DataFrame:
    """Return the ancestry of one version of a weight dataset, see `WeightStore.lineage`."""
    walk = _Walk(store)
    walk.table(0, "weights", weights.as_parent(), {})
    rows = [{**row, "fingerprint": row["fingerprint"] and row["fingerprint"][:12]} for row in walk.rows.values()]
    return pl.DataFrame(rows, schema=_SCHEMA)


class _Thing(NamedTuple):
    """One table version, model or source; the columns of the result but for `depth`."""

    role: str
    kind: str
    name: str | None
    version: int | None
    fingerprint: str | None
    rows: int | None = None
    created: int | None = None  # ms since 1970


@dataclass
class _Walk:
    """Depth first, so that what a thing was made from stands right below it, one deeper."""

    store: "WeightStore"
    rows: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    def table(self, depth: int, role: str, parent: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
        """Add one table version and all it came from; `recipe` is that of the weight dataset below."""
        table, version = self.store.table(parent["table"]), parent["version"]
        commit = _commit(table, version, parent["fingerprint"])
        num_rows = None if commit is None else sum(record.num_rows for record in table.records(version))
        created = None if commit is None else commit.timestamp_ms
        thing = _Thing(role, "table", table.path, version, parent["fingerprint"], num_rows, created)
        if not self._add(depth, thing) or commit is None or commit.metadata is None:
            return
        metadata = commit.metadata
        recipe = metadata.get("recipe", recipe)
        for above in metadata.get("parents", []):
            self.table(depth + 1, above.get("role", above["table"].partition("/")[0]), above, recipe)
        if "scorer" in metadata:
            self._model(depth + 1, role, metadata["scorer"]["model"], recipe)
        if "source" in metadata:
            self._source(depth + 1, metadata)
            self._quarantine(depth + 1, table, metadata)

    def _model(self, depth: int, role: str, fingerprint: str, recipe: Mapping[str, Any]) -> None:
        """Add a scorer's model; for one that was trained here also what it was trained on."""
        side = _SIDES.get(role)
        trained = list(self._trained(side, fingerprint, recipe)) if side else []
        if not trained:
            self._add(depth, _Thing("model", "model", recipe.get("model", {}).get("path"), None, fingerprint))
            return
        for name, record, created in trained:
            known = record.get("fingerprint", fingerprint if len(trained) == 1 else None)
            label = f"{side} model" if len(trained) == 1 else f"{side} model, one of {len(trained)}"
            if not self._add(depth, _Thing(label, "model", name, None, known, None, created)):
                continue
            identity = record["identity"]
            origin = {"table": identity["table"], "version": record["version"], "fingerprint": record["data"]}
            self.table(depth + 1, "trained on", origin, recipe)
            start = recipe.get("model", {}).get("path")
            self._add(depth + 1, _Thing("started from", "model", start, None, identity["model"]))

    def _trained(
        self, side: str, fingerprint: str, recipe: Mapping[str, Any]
    ) -> Iterator[tuple[str, dict[str, Any], int | None]]:
        """Yield the contrastive models in the store that the recipe means: more than one when the data has grown since.

        A record that holds the model's own fingerprint settles it.
        """
        settings = recipe.get("contrast", {})
        uniform = f"weights/{recipe.get('dataset', {}).get('name')}/uniform"
        models = self.store.root / "models"
        for name in models.folders():
            try:
                record = json.loads((models / name).read(_CONTRAST_RECORD))
            except FileNotFoundError:
                continue
            identity = record["identity"]
            is_meant = identity["side"] == side and identity["table"] == uniform
            is_meant &= all(settings.get(key) == value for key, value in identity["training"].items())
            if is_meant and record.get("fingerprint", fingerprint) == fingerprint:
                yield f"models/{name}", record, _modified_ms(models / name, _CONTRAST_RECORD)

    def _source(self, depth: int, metadata: Mapping[str, Any]) -> None:
        name = metadata.get("recipe", {}).get("dataset", {}).get("source")
        num_rows = metadata.get("statistics", {}).get("num_source_rows")
        self._add(depth, _Thing("source", "source", name, None, metadata["source"].get("content"), num_rows))

    def _quarantine(self, depth: int, tokens: Table, metadata: Mapping[str, Any]) -> None:
        """Add the newest version of the quarantine that was made from the same source, cut the same way."""
        table = self.store.table(tokens.path.replace("tokens/", "quarantine/", 1))
        if not table.exists():
            return
        for commit in table.history():
            made = commit.metadata or {}
            if (made.get("cut"), made.get("source")) == (metadata.get("cut"), metadata["source"]):
                num_rows = sum(record.num_rows for record in table.records(commit.version))
                mark, created = made["fingerprint"], commit.timestamp_ms
                self._add(depth, _Thing("quarantine", "table", table.path, commit.version, mark, num_rows, created))
                return

    def _add(self, depth: int, thing: _Thing) -> bool:
        """Add one thing; return whether it was new. Models are the same when their content is, wherever they lie."""
        place = None if thing.kind == "model" and thing.fingerprint else (thing.name, thing.version)
        same = (thing.kind, place, thing.fingerprint)
        if same in self.rows:
            return False
        self.rows[same] = {"depth": depth, **thing._asdict()}
        return True


def _commit(table: Table, version: int, fingerprint: str) -> Commit | None:
    """Return the commit of a parent, None when the store no longer has that version or another stands in its place."""
    try:
        table.reference(version)
    except NotFoundError:
        return None
    commit = read_commit(table.location, version)
    is_same = commit.metadata is not None and commit.metadata["fingerprint"] == fingerprint
    return commit if is_same else None


def _modified_ms(folder: Any, name: str) -> int | None:
    modified = folder.filesystem.get_file_info(name).mtime_ns
    return None if modified is None else modified // 1_000_000
