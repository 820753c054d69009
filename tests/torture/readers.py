"""Everything that reads a store, each as a function that returns what it read.

A reader of a damaged store returns what it returned before the damage, or raises one of our errors. Readers that write, like
publish, leave new files behind; `damage_trials.py` removes them.
"""

import contextlib
import io
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

import tokenweights
from pipeline.dry_run.plan import plan
from pipeline.stages.contrast import contrast
from pipeline.stages.prepare import prepare
from pipeline.stages.publish import Ingredients, Published, publish
from pipeline.stages.report import report_file, write_report
from pipeline.workers.missing import missing_pairs, pairs_of
from pipeline.workers.request import EngineSettings, Request, Target
from tests.torture.sound_store import SoundStore
from train.config import DataConfig
from train.data.dataset import PairDataset, open_weights
from weights_store import Table, TableVersion
from weights_store.catalog import list_tables
from weights_store.checks.vacuum import vacuum
from weights_store.errors import TokenweightsError
from weights_store.names import quarantine_path
from weights_store.tables.compaction import optimize

TABLES = ("tokens", "logps", "attributions", "anchors", "quarantine", "weights")
_NO_TRAINING = "/no/interpreter"
"""Where models are missing, the stage fails with one line instead of training for a minute."""
_PUBLISHED = ("toy/tis", "toy/ti", "toy/uniform")


class RefusedError(TokenweightsError):
    """A command ended with exit code 1 and one line, or a file is not there."""


@dataclass(frozen=True)
class Place:
    """Where a damage is: the table, None outside of tables; `scratch` is an empty folder for a reader's own files.

    `rows` are the newest rows of every table before any damage, `files` the paths of all files.
    """

    made: SoundStore
    path: str | None
    scratch: Path
    rows: Mapping[str, pa.Table]
    files: Collection[str]

    @property
    def weights(self) -> list[str]:
        """The weight datasets to read: the damaged one, or those made from the damaged table."""
        if self.path is not None and self.path.startswith("weights/"):
            return [self.path.removeprefix("weights/")]
        return list(_PUBLISHED[:2])

    @property
    def build(self) -> str:
        """A weight dataset whose build reads the damaged table."""
        of_ti = ("attributions", "anchors", "weights/toy/ti")
        return "toy/ti" if self.path is not None and self.path.startswith(of_ti) else "toy/tis"

    @property
    def table(self) -> Table:
        assert self.path is not None
        return self.made.store.table(self.path)


def _train(place: Place) -> object:
    """Every row as the trainer gets it, of the newest and the first version."""
    (name,) = place.weights
    read = []
    for text in (name, f"{name}@0", f"{name}@1"):
        config = DataConfig(store=place.made.uri, weights=text)
        source = open_weights(config)
        with_anchors = name == "toy/ti"
        pairs = PairDataset(source, config, vocab_size=320, with_ref_top=True, with_anchors=with_anchors)
        read.append(
            (str(source.reference), source.filled_columns(), [_values(pairs[row]) for row in range(len(pairs))])
        )
    return read


def _values(value: object) -> object:
    """Return the fields of pairs as plain values."""
    if isinstance(value, list):
        return [_values(each) for each in value]
    if isinstance(value, np.ndarray):
        return value.tobytes()
    fields = getattr(value, "__dataclass_fields__", None)
    return value if fields is None else {name: _values(getattr(value, name)) for name in fields}


def _publish(place: Place) -> object:
    """The same weights once more, from the tables that may be damaged, under a new name."""
    return [_published(place, name, f"again/{name.rpartition('/')[2]}") for name in place.weights]


def _publish_on_top(place: Place) -> object:
    """A build that finds everything done."""
    return [_published(place, name, name) for name in place.weights]


def _published(place: Place, name: str, new_name: str) -> object:
    recipe = place.made.recipe("toy/ti" if name == "toy/ti" else "toy/tis")
    made = place.made.store.metadata(name)
    parents = {parent["role"]: place.made.store.table(parent["table"]).reference() for parent in made["parents"]}
    section = recipe.uniform if name == "toy/uniform" else recipe.weights
    section = section.model_copy(update={"name": new_name})
    published = publish(recipe, section, Ingredients(**parents))
    rows = _rows_of(place.made.store.table(published.weights.table), published.weights)
    return published.weights.fingerprint, published.is_new, published.statistics, rows


def _fill(place: Place) -> object:
    """What workers would compute: pairs that a table lacks, and the ids of all pairs for a table that is not there."""
    store, read = place.made.store, []
    (tokens,) = (table.reference() for table in store.tables("tokens"))
    scored = [table for kind in ("logps", "attributions", "anchors") for table in store.tables(kind)]
    wanted = [table for table in scored if place.path in (table.path, tokens.table) or _is_quarantine(place)]
    for table in (*wanted, store.table("logps/new/scorer")):
        target = Target("ref", table.path, None, {})
        request = Request("score", tokens, "model", [target], 1200, EngineSettings("float32"))
        parts = [part for part in missing_pairs(tokens, table) if part.height]
        missing = pl.concat(parts) if parts else pl.DataFrame()
        pairs = pairs_of(request, target, missing) if missing.height else []
        read.append((table.path, missing, _values(sorted(pairs, key=lambda pair: pair.pair_id))))
    return read


def _is_quarantine(place: Place) -> bool:
    return place.path is not None and place.path.startswith("quarantine/")


def _prepare(place: Place) -> object:
    """A build of the last source and one of the source before; the pairs of both are there."""
    builds = [place.made.recipe("toy/tis", build) for build in (2, 1)]
    prepared = [prepare(recipe, place.made.model) for recipe in builds]
    tables = [
        place.made.store.table(path) for path in (prepared[0].tokens.table, quarantine_path(prepared[0].tokens.table))
    ]
    counts = [(made.num_source_rows, made.num_pairs, made.quarantined, made.num_new_pairs) for made in prepared]
    return counts, [pl.concat(_frames(table, None)).sort(table.key) for table in tables]


def _plan(place: Place) -> object:
    """What a build would do."""
    return [vars(stage) for stage in plan(place.made.recipe(place.build))]


def _diff(place: Place) -> object:
    return [vars(place.made.store.diff(f"{name}@0", f"{name}@2")) for name in place.weights]


def _scan_tokens(place: Place) -> object:
    store = place.made.store
    return [store.scan_tokens(name, version, checked=True).collect() for name in place.weights for version in (None, 0)]


def _export(place: Place) -> object:
    read = []
    for name in place.weights:
        for version, form in ((None, "parquet"), (0, "parquet"), (None, "jsonl")):
            folder = place.scratch / f"{name.rpartition('/')[2]}-{version}-{form}"
            paths = place.made.store.export(name, folder, version, form)
            read.append({path.name: path.read_bytes() for path in paths})
    return read


def _lineage(place: Place) -> object:
    return place.made.store.lineage(place.build)


def _list(place: Place) -> object:
    return place.made.store.list(), [place.made.store.history(name) for name in place.weights]


def _show(place: Place) -> object:
    texts = [text for name in place.weights for text in (name, f"{name}@0")]
    return [_command("show", text, "--json", "--store", place.made.uri) for text in texts]


def _quarantine(place: Place) -> object:
    return _command("quarantine", "toy", "--json", "--store", place.made.uri)


def _command(*arguments: str) -> object:
    """Return the JSON that a command prints."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = tokenweights.main(list(arguments))
    if code:
        assert error.getvalue().startswith("error: "), error.getvalue()
        raise RefusedError(error.getvalue())
    return json.loads(out.getvalue())


def _report(place: Place) -> object:
    """The report of the newest version, written once more."""
    pages = []
    for name in place.weights:
        store = place.made.store
        weights, metadata = store.resolve(name), store.metadata(name)
        report = Path(place.made.uri, "reports", report_file(name, weights.version))
        report.unlink(missing_ok=True)
        settings = place.made.recipe(name).weights.result_settings() if name != "toy/uniform" else {"estimator": "1"}
        statistics = metadata["statistics"]
        published = Published(weights, name, statistics, metadata["changes"], False, None, settings)
        write_report(published, place.made.model)
        pages.append(report.read_bytes())
    return pages


def _append(place: Place) -> object:
    """A writer that finds all its rows there; if it finds them missing, they are twice in the table."""
    table = place.table
    return _rows_of(table, table.append(place.rows[table.path], {"fingerprint": "torture"}))


def _optimize(place: Place) -> object:
    made = optimize(place.table)
    return _rows_of(place.table, made or place.table.reference())


def _rows_of(table: Table, reference: TableVersion) -> pl.DataFrame:
    return pl.concat(_frames(table, reference.version)).sort(table.key)


def _frames(table: Table, version: int | None) -> list[pl.DataFrame]:
    return [pl.DataFrame(pl.from_arrow(part)) for part in table.batches(version)]


def _vacuum(place: Place) -> object:
    """The files that would be deleted."""
    return [(orphan.table, orphan.name) for orphan in vacuum(place.made.store, retention_hours=0.0)]


def _contrast(place: Place) -> object:
    """The contrastive models that the next build would score with: all that changes a log-prob."""
    settings = place.made.recipe("toy/tis").contrast_settings.model_copy(update={"python": _NO_TRAINING})
    pair = contrast(settings, place.made.model, place.made.store.resolve("toy/uniform"))
    folders = [scorer.model for scorer in pair.scorers.values()]
    return [(folder / name).read_bytes() for folder in folders for name in ("config.json", "model.safetensors")]


def _open_files(place: Place) -> object:
    """What people and other programs see who open the files of models and reports; a missing one hides from nobody."""
    paths = {name: Path(place.made.uri, name) for name in place.files if name.startswith(("models/", "reports/"))}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        raise RefusedError(f"no file {missing[0]}")
    return {name: path.read_bytes() for name, path in paths.items()}


@dataclass(frozen=True)
class Reader:
    """One reader, and the folders of a store that it reads."""

    name: str
    read: Callable[[Place], object]
    folders: tuple[str, ...]
    is_ours: bool = True
    """Whether our code reads: then it has to see every damage, not only where `verify` finds none."""


READERS = [
    Reader("train", _train, ("weights",)),
    Reader("publish", _publish, TABLES),
    Reader("publish on top", _publish_on_top, TABLES),
    Reader("prepare", _prepare, ("tokens", "quarantine")),
    Reader("plan", _plan, (*TABLES, "models")),
    Reader("workers", _fill, ("tokens", "logps", "attributions", "anchors", "quarantine")),
    Reader("append", _append, TABLES),
    Reader("optimize", _optimize, TABLES),
    Reader("vacuum", _vacuum, TABLES),
    Reader("diff", _diff, ("weights",)),
    Reader("export", _export, (*TABLES, "models")),  # the rows of weights, and the lineage of all
    Reader("scan_tokens", _scan_tokens, ("weights", "logps")),
    Reader("lineage", _lineage, (*TABLES, "models")),
    Reader("ls, history", _list, ("weights",)),
    Reader("show", _show, ("weights",)),
    Reader("quarantine", _quarantine, ("quarantine",)),
    Reader("report", _report, ("weights",)),
    Reader("contrast", _contrast, ("models", "weights")),
    Reader("open files", _open_files, ("models", "reports"), is_ours=False),
]


def readers_of(folder: str) -> list[Reader]:
    """Return the readers of what lies in a folder of a store, such as `logps` or `models`."""
    return [reader for reader in READERS if folder in reader.folders]


def same(left: Any, right: Any) -> bool:
    """Return whether two readings hold the same values."""
    if isinstance(left, pl.DataFrame):
        return isinstance(right, pl.DataFrame) and left.schema == right.schema and left.equals(right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def known_rows(made: SoundStore) -> dict[str, pa.Table]:
    """Return the newest rows of every table."""
    return {table.path: pa.concat_tables(table.batches()) for table in list_tables(made.store.root)}
