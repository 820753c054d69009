"""Stage annotate: the weights that a user has put into columns of the source, or given to roles, as one per response token.

They have a table of their own, because log-probs hang on the tokens table: weights that are brought to a scored dataset, or
changed, score nothing again. It is named for its pairs and for what the numbers stand for. If the source or the pairs have
changed, all rows are written again. A pair whose weights cannot be used goes to quarantine; its tokens and scores stay.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.chat.tokenizer import ChatTokenizer
from pipeline.marks.cells import CELLS, CellReader, Unit, roles_of
from pipeline.marks.characters import Vocabulary, special_tokens
from pipeline.marks.token_values import RangeAnnotator
from pipeline.provenance import provenance
from pipeline.recipe import Recipe
from pipeline.source.columns import resolve_columns
from pipeline.source.external_sort import ExternalSort
from pipeline.source.load import open_source
from pipeline.workers.driver import drive
from train.model.checkpoint import load_light_tokenizer
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import ConflictError, InputError
from weights_store.fingerprint import fingerprint
from weights_store.messages import Progress, logger, show
from weights_store.names import name_of, quarantine_path
from weights_store.processes.spread import Spread, in_threads, in_turn
from weights_store.schemas import KEYS, QUARANTINE, SCHEMA_VERSION, Reason
from weights_store.tables.checksums import sum_checksums
from weights_store.tables.metadata import AnnotationRecord
from weights_store.tables.shards import ShardRecord

_log = logger(__name__)

_MAX_TRIES = 5
_RANGE_BYTES = 32 << 20
"""Arrow bytes of the cells that are one piece of work."""
_PLACES_BYTES = 8 << 20
"""Of the pair_ids that are held while the source is read."""
_PLACES = pa.schema([("source_row", pa.int64()), ("pair_id", pa.string())])


@dataclass(frozen=True)
class Annotation:
    """The annotations that a recipe asks for, of one version of the tokens table."""

    recipe: Recipe
    tokens: TableVersion

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the source, by `chosen`, `rejected` and `pair`."""
        return {setting.partition("_")[0]: column for setting, column in self.recipe.weight_columns.items()}

    @property
    def unit(self) -> Unit | None:
        """What the numbers of responses stand for; None if only pairs have any."""
        weights = self.recipe.weights
        if "message roles" in weights.inputs():
            return "role"
        if "spans" in weights.estimators:
            return "span"
        unit: Unit | None = getattr(weights, "per") if "column" in weights.estimators else None  # noqa: B009 - of some sections
        return unit

    @property
    def reads_texts(self) -> bool:
        """Whether the texts of the responses are compared with the source; tokens are only counted."""
        return self.unit not in (None, "token")

    @property
    def rest(self) -> float:
        """The weight of characters in no span, or of messages whose role has none; 1 if neither is asked for."""
        return float(getattr(self.recipe.weights, "rest", 1.0)) if self.unit in ("span", "role") else 1.0

    @property
    def roles(self) -> dict[str, float]:
        """The weight of messages by their role."""
        return dict(getattr(self.recipe.weights, "roles", ())) if self.unit == "role" else {}

    @property
    def settings(self) -> dict[str, object]:
        """What determines the numbers, besides the source and the pairs."""
        of_unit = {"unit": self.unit, "rest": self.rest, "roles": self.roles, "columns": self.columns}
        return {"schema_version": SCHEMA_VERSION, **of_unit}

    @property
    def record(self) -> AnnotationRecord:
        """What a commit says of how the numbers were read."""
        return {"settings": self.settings, "source": self._tokens_table.metadata(self.tokens.version)["source"]}

    @property
    def table(self) -> Table:
        """The table of the annotations."""
        path = f"annotations/{name_of(self.tokens.table)}/{fingerprint(self.settings)[:12]}"
        return WeightStore(self.tokens.store).table(path)

    @property
    def is_there(self) -> bool:
        """Whether the newest version was made from the same pairs and the same bytes. A hub dataset is always read again."""
        return self.is_newest() and self.record["source"]["content"] is not None

    def is_newest(self, made: str | None = None) -> bool:
        """Return whether the newest version was made from the same pairs and source, and has the fingerprint `made`."""
        if not self.table.exists():
            return False
        newest = self.table.metadata()
        same_pairs = [parent["fingerprint"] for parent in newest["parents"]] == [self.tokens.fingerprint]
        return same_pairs and newest.get("annotation") == self.record and made in (None, newest["fingerprint"])

    @property
    def _tokens_table(self) -> Table:
        return WeightStore(self.tokens.store).table(self.tokens.table)


def annotate(recipe: Recipe, tokens: TableVersion, model_folder: Path, spread: Spread | None = None) -> TableVersion:
    """Bring the annotations that a recipe asks for up to a version of the tokens table; return their version.

    `spread` does the work on the ranges of pair_ids; None: on Ray if the recipe says so, which a child process drives, else
    here: in threads if tokens are only counted, one range after the other if texts are compared, which takes Python's lock.

    Raises:
        InputError: The source cannot be read or has changed since it was prepared, lacks a column, or no pair has weights that
            can be used.
        ConflictError: Other builds of the same dataset kept winning the race for the next version.
        StageError: The Ray failed.
    """
    wanted = Annotation(recipe, tokens)
    if wanted.is_there:
        return wanted.table.reference()
    if spread is None and recipe.score.executor == "ray":
        return drive("annotating pairs", recipe.score, annotate, recipe, tokens, model_folder)
    spread = spread or (in_turn if wanted.reads_texts else in_threads)
    for _ in range(_MAX_TRIES - 1):
        with suppress(ConflictError):  # another build was faster: it may have made this very version
            return _Update(wanted, model_folder, spread).run()
    return _Update(wanted, model_folder, spread).run()


class _Update:
    """One try to make the next version of the annotations."""

    def __init__(self, wanted: Annotation, model_folder: Path, spread: Spread) -> None:
        self.wanted, self.model_folder, self.spread = wanted, model_folder, spread
        self.table = wanted.table
        self.base = self.table.version()
        store = WeightStore(wanted.tokens.store)
        self.tokens = store.table(wanted.tokens.table)
        self.quarantine = store.table(quarantine_path(wanted.tokens.table))

    def run(self) -> TableVersion:
        with ExitStack() as files:
            cells = files.enter_context(ExternalSort(CELLS, "pair_id"))
            unusable = files.enter_context(ExternalSort(QUARANTINE, "source_row"))
            self._read(cells)
            shards = self._write(cells, unusable)
            num_rows, num_bad = sum(shard.num_rows for shard in shards), unusable.num_rows
            problem = None if shards else self._no_usable_pair(unusable)
            # Quarantine first: if the build dies in between, the next run does both.
            self._quarantine(unusable)
            if problem is not None:
                raise problem
            _log.info(f"annotate: {num_rows:,} pairs have weights of their own, {num_bad:,} are quarantined")
            # A column's checksum is a sum over (key, position, value), so it does not depend on where the shards were cut.
            sums = sum_checksums(shard.sums for shard in shards)
            content = {
                "settings": self.wanted.settings,
                "sums": {name: f"{value:016x}" for name, value in sums.items()},
            }
            made = fingerprint(content)
            if self.wanted.is_newest(made):
                for shard in shards:
                    self.table.location.delete(shard.name)
                return self.table.reference(self.base)
        return self._commit(shards, made, num_rows)

    def _read(self, cells: ExternalSort) -> None:
        """Read the columns of the source, and find the pair of each row."""
        recipe, wanted = self.wanted.recipe, self.wanted
        source = open_source(recipe.dataset)
        columns = None
        if wanted.reads_texts or (wanted.unit and recipe.dataset.many_answers == "combine"):
            columns = resolve_columns(recipe.dataset, source, recipe.weight_columns)
        found = CellReader(wanted.columns, wanted.unit).read(source, columns)
        idle_roles = set(wanted.roles)
        with ExternalSort(_PLACES, "source_row") as places:
            for rows in self.tokens.batches(wanted.tokens.version, _PLACES.names):
                places.add(rows.select(_PLACES.names).cast(_PLACES))
            for rows in _with_pair_ids(found, places):
                cells.add(rows)
                idle_roles -= roles_of(rows) if idle_roles else set()
        if idle_roles:
            _log.warning(
                f"annotate: no response has a message of role {' or '.join(sorted(idle_roles))}, see weights.roles"
            )

    def _write(self, cells: ExternalSort, unusable: ExternalSort) -> list[ShardRecord]:
        wanted, recipe = self.wanted, self.wanted.recipe
        dataset = recipe.dataset
        work = RangeAnnotator(
            self.table,
            self.tokens,
            wanted.tokens.version,
            wanted.columns,
            wanted.unit,
            wanted.rest,
            wanted.roles,
            Vocabulary.of_folder(self.model_folder) if wanted.reads_texts else None,
            self._chat_tokenizer() if wanted.reads_texts else None,
            special_tokens(load_light_tokenizer(self.model_folder)),
            dataset.max_response_tokens if dataset.long_response == "cut" else None,
        )
        writer = self.table.writer()
        num_done, started = 0, time.monotonic()
        for found in self.spread(work, cells.ranges(_RANGE_BYTES)):
            writer.take(found.written)
            unusable.add(pa.Table.from_pylist(found.unusable, QUARANTINE))
            num_done += found.num_rows
            show(Progress("annotate", num_done, cells.num_rows, time.monotonic() - started, "pairs"))
        return writer.finish()

    def _chat_tokenizer(self) -> ChatTokenizer:
        model, dataset = self.wanted.recipe.model, self.wanted.recipe.dataset
        return ChatTokenizer(self.model_folder, model.chat_template, model.template_date, dataset.unprinted_keys)

    def _quarantine(self, unusable: ExternalSort) -> None:
        """Replace the rows that an earlier version of these annotations has put into quarantine."""
        base = self.quarantine.version()
        assert base is not None, "prepare writes quarantine before the tokens"
        is_ours = (pl.col("reason") == Reason.BAD_WEIGHTS.value) & pl.col("detail").str.starts_with(
            f"{self.table.path}: "
        )
        key = list(KEYS["quarantine"])
        found = [pl.DataFrame(pl.from_arrow(rows.select(key))) for _, rows in unusable.ranges()]
        if (
            pl.concat(found)
            .sort(key)
            .equals(self.quarantine.scan(base).filter(is_ours).select(key).sort(key).collect())
        ):
            return
        for rows in self.quarantine.batches(base):
            others = pl.DataFrame(pl.from_arrow(rows)).filter(~is_ours).to_arrow()
            unusable.add(others.select(QUARANTINE.names).cast(QUARANTINE))
        writer = self.quarantine.writer()
        for _, rows in unusable.ranges():
            writer.write(rows)
        metadata = self.quarantine.metadata(base)
        self.quarantine.commit(writer.finish(), {**metadata}, base, mode="overwrite")

    def _commit(self, shards: list[ShardRecord], made: str, num_rows: int) -> TableVersion:
        record = {
            "fingerprint": made,
            "annotation": self.wanted.record,
            "parents": [self.wanted.tokens.as_parent()],
            "recipe": self.wanted.recipe.model_dump(),
            "statistics": {"num_pairs": num_rows},
            **provenance(),
        }
        return self.table.commit(shards, record, self.base, mode="append" if self.base is None else "overwrite")

    def _no_usable_pair(self, unusable: ExternalSort) -> InputError:
        rows = (rows for _, rows in unusable.ranges())
        first = next(each for each in rows if each.num_rows)
        example = f", for example row {first['source_row'][0]}: {first['detail'][0].as_py().partition(': ')[2]}"
        columns = ", ".join(map(repr, self.wanted.columns.values()))
        what = f"weights in {columns}" if columns else "messages"
        return InputError(
            f"dataset.source {self.wanted.recipe.dataset.source}: none of {unusable.num_rows:,} pairs has {what} that can be "
            f"used{example}"
        )


def _with_pair_ids(found: Iterator[pa.Table], places: ExternalSort) -> Iterator[pa.Table]:
    """Yield the rows of `FOUND` as rows of `CELLS`, once for each pair of their row; both come in the order of the source."""
    rows = next(found, None)
    for piece, of_pairs in places.ranges(_PLACES_BYTES):
        places_of_pairs = of_pairs["source_row"].to_numpy()
        while rows is not None:
            source_rows = rows["source_row"].to_numpy()
            if piece.high is not None:
                source_rows = source_rows[: np.searchsorted(source_rows, int(piece.high))]
            starts = np.searchsorted(places_of_pairs, source_rows)
            num_pairs = np.searchsorted(places_of_pairs, source_rows, side="right") - starts
            cells = rows.slice(0, len(source_rows))
            if (num_pairs != 1).any():
                cells = cells.take(pa.array(np.repeat(np.arange(len(source_rows)), num_pairs)))
            of_cells = np.repeat(starts - np.cumsum(num_pairs) + num_pairs, num_pairs) + np.arange(num_pairs.sum())
            cells = cells.set_column(0, CELLS.field("pair_id"), of_pairs["pair_id"].take(pa.array(of_cells)))
            of_pair = cells["of_pair"]
            if of_pair.null_count < len(of_pair):
                cells = cells.filter(pc.equal(of_pair, cells["pair_id"]).fill_null(True))
            yield cells.select(CELLS.names)
            if len(source_rows) < len(rows):
                rows = rows.slice(len(source_rows))
                break
            rows = next(found, None)
