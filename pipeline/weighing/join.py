"""The pairs that have all their scores: tokens and scores joined by pair_id, one range of pair_ids at a time.

Called by `ranges.py`. Memory is bounded by `RANGE_BYTES` for a range and by `BATCH_PAIRS` for what is computed from it.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from functools import reduce

import polars as pl
import polars.selectors as cs

from pipeline.models.section import MODEL_SIDES, ModelSide
from pipeline.weighing.estimators import Input
from pipeline.weighing.section import WeightsSection
from weights_store import Table, TableVersion, WeightStore
from weights_store.checks.rows import wrong_lengths
from weights_store.errors import InputError, MismatchError
from weights_store.schemas import SIDES, TOKENS, WEIGHTS
from weights_store.tables.key_ranges import KeyRange

RANGE_BYTES = 512 << 20
BATCH_PAIRS = 16_384
"""How many pairs are weighed at a time: intermediate results take several times the space of the stored columns."""

_PER_ID = ("ref_logps", "attributions", "activations")
_LENGTHS_OF = {f"{side}_{what}": f"{side}_ids" for side in SIDES for what in _PER_ID}
_LENGTHS_OF |= {f"{side}_values": f"{side}_ids" for side in SIDES} | {"anchor_ref_logps": "anchor_ids"}
"""Lists of a join, and the ids of which each has one value per id. Those of the contrastive pairs: see `Join.pairs`."""
_BESIDES_LOGPS = "^prompt$|_score$|_top_|attribution|activations|contexts|_values?$|^anchor_"
"""Columns of a join that log-ratios are not made of."""
_ATTRIBUTIONS: dict[Input, str] = {
    "attributions": "attributions",
    "prompt attributions": "prompt_attribution",
    "activations": "activations",
    "contexts": "contexts",
}
"""Inputs of an estimator, and the ends of their columns in the attributions table."""


class Join:
    """Tokens and scores, side by side: the columns that a section of a recipe needs.

    The tables are named by role: `tokens`, `ref_logps` and others, see `publish.Ingredients`.
    """

    def __init__(self, parents: Mapping[str, TableVersion], section: WeightsSection) -> None:
        self.tables = {role: (WeightStore(at.store).table(at.table), at.version) for role, at in parents.items()}
        self.tokens, self.version = self.tables["tokens"]
        self.section = section
        self.pairs = {
            f"{side}_{model}_logps": [f"{side}_{role}" for role in _roles_of(model, self.tables)]
            for side in SIDES
            for model in MODEL_SIDES
        }
        """The log-probs of pi+ and pi- in a batch, and the columns of all contrastive pairs that each is the mean of."""

    def ranges(self) -> list[KeyRange]:
        """Return the ranges of pair_ids to read one at a time, which together hold all pairs."""
        records = (record for table, version in self.tables.values() for record in table.records(version))
        return self.tokens.key_ranges(RANGE_BYTES, self.version, sum(record.num_bytes for record in records))

    def batches(
        self, piece: KeyRange, without: tuple[Table, int] | None = None, logps_only: bool = False
    ) -> Iterator[pl.DataFrame]:
        """Yield the pairs of a range by pair_id, except those in version `without` of a table, in batches of at least one.

        With `logps_only` they have ids, splits and log-probs, and nothing else is read.

        Raises:
            MismatchError: A list is not as long as its ids, or a column that is needed is null.
        """
        yield from self._read(piece, without, logps_only).iter_slices(BATCH_PAIRS)

    def _read(self, piece: KeyRange, without: tuple[Table, int] | None, logps_only: bool) -> pl.DataFrame:
        wanted = {role: self._wanted(role, table.scan(at, within=piece)) for role, (table, at) in self.tables.items()}
        frame = wanted.pop("tokens")
        if without is not None:
            table, version = without
            frame = frame.join(table.scan(version, within=piece).select("pair_id"), on="pair_id", how="anti")
        for rows in wanted.values():
            frame = frame.join(rows, on="pair_id")
        if logps_only:
            frame = frame.select(~cs.matches(_BESIDES_LOGPS))
        joined = frame.sort("pair_id").collect()
        of_pairs = {each: f"{name.partition('_')[0]}_ids" for name, columns in self.pairs.items() for each in columns}
        for values, ids in (_LENGTHS_OF | of_pairs).items():
            if values not in joined.columns:
                continue
            for found in wrong_lengths(joined.select(values, ids).to_arrow(), values, ids):
                raise MismatchError(
                    f"pair {joined['pair_id'][found.row]}: {found.problem}; {found.num_rows} such pairs. "
                    "Delete the table that holds them and build again"
                )
        self._check_contexts(joined)
        return self._average_pairs(joined)

    def _check_contexts(self, joined: pl.DataFrame) -> None:
        """Check that all response tokens have equally many numbers for their contexts, if there are any."""
        for side in SIDES:
            ids, contexts = f"{side}_ids", f"{side}_contexts"
            filled = joined.filter(pl.col(ids).list.len() > 0) if contexts in joined.columns else joined.clear()
            if filled.height:
                is_null = filled[contexts][0] is None
                per_token = 1 if is_null else filled[contexts].list.len()[0] // filled[ids].list.len()[0]
                for found in wrong_lengths(joined.select(contexts, ids).to_arrow(), contexts, ids, per_token=per_token):
                    raise MismatchError(
                        f"pair {joined['pair_id'][found.row]}: {found.problem}; {found.num_rows} such pairs. "
                        "Delete the table of attributions and build again"
                    )

    def _average_pairs(self, joined: pl.DataFrame) -> pl.DataFrame:
        """Return pi+ and pi- as means over the contrastive pairs; the mean log-ratio is the difference of the means."""
        for name, columns in self.pairs.items():
            if len(columns) > 1:
                total = reduce(operator.add, map(pl.col, columns))
                joined = joined.with_columns((total / len(columns)).alias(name)).drop(columns[1:])
        return joined

    def _wanted(self, role: str, rows: pl.LazyFrame) -> pl.LazyFrame:
        """Return the columns of one table that are needed, with the names that they have in a join."""
        if role == "tokens":
            return rows.select(name for name in WEIGHTS.names if name in TOKENS.names)
        if role == "anchors":
            return rows.select("pair_id", "anchor_ids", pl.col("anchor_logps").alias("anchor_ref_logps"))
        if role == "annotations":
            inputs = self.section.inputs()
            of_sides = [f"{side}_values" for side in SIDES] if inputs & {"own weights", "message roles"} else []
            return rows.select("pair_id", *of_sides, *(["pair_value"] if "own pair weights" in inputs else []))
        if role == "attributions":
            kinds = [column for kind, column in _ATTRIBUTIONS.items() if kind in self.section.inputs()]
            return rows.select("pair_id", *(f"{side}_{kind}" for kind in kinds for side in SIDES))
        kinds = ["logps", "top_ids", "top_logps"] if role == "ref_logps" else ["logps"]
        prefix = role.removesuffix("_logps")
        names = {f"{side}_{kind}": f"{side}_{prefix}_{kind}" for kind in kinds for side in SIDES}
        return rows.select("pair_id", *names).rename(names)

    def check_scores(self) -> None:
        """Check that all pairs have the annotators' scores that `weights.pair_weight` needs.

        Raises:
            InputError: Some have none.
        """
        if self.section.pair_weight != "quality":
            return
        lacks = pl.any_horizontal(pl.col(f"{side}_score").is_null() for side in SIDES)
        num_pairs, num_lacking = self.tokens.scan(self.version).select(pl.len(), lacks.sum()).collect().row(0)
        if num_lacking:
            raise InputError(
                f"weights.pair_weight 'quality' needs annotators' scores of both responses, and {num_lacking} of {num_pairs} "
                f"pairs of {self.tokens.path}@{self.version} lack one. Name the columns that hold them in "
                "dataset.chosen_score_column and dataset.rejected_score_column, remove such pairs from the source, or set "
                "weights.pair_weight to 'margin' or 'none'"
            )

    def still_has(self, table: Table, version: int, piece: KeyRange) -> bool:
        """Return whether every pair of a weight dataset in a range is in all tables of the join, and still as published.

        That is of the same split, with the same scores of annotators and the same anchors: a table of anchors that was lost and
        filled again may have others.
        """
        followed = {"tokens": ["split", *(f"{side}_score" for side in SIDES)], "anchors": ["anchor_ids"]}
        for role, (here, at) in self.tables.items():
            columns = followed.get(role, [])
            now = here.scan(at, within=piece).select("pair_id", *columns)
            published = table.scan(version, within=piece).select("pair_id", *columns)
            lost = published.join(now, on="pair_id", how="anti").select("pair_id")
            if columns:
                differ = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name}_right")) for name in columns)
                lost = pl.concat([lost, published.join(now, on="pair_id").filter(differ).select("pair_id")])
            if not lost.head(1).collect().is_empty():
                return False
        return True


def _roles_of(model: ModelSide, roles: Collection[str]) -> list[str]:
    """Return which roles are log-probs of one side of a contrastive pair: `positive_logps`, `positive2_logps` and so on."""
    return [role for role in roles if role.removesuffix("_logps").rstrip("0123456789") == model]
