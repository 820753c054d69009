"""A weight dataset as one row per response token, lazily: what analysts group, filter and join.

The weights table already holds ids, weights and the reference's log-probs. Attributions and log-probs of the contrastive pair
come from the versions of the tables that the weights were made from; of several pairs of prompts the mean, as in the weights.
"""

import operator
from collections.abc import Mapping, Sequence
from functools import reduce

import polars as pl

from weights_store.catalog import open_table
from weights_store.location import Location
from weights_store.names import base_role
from weights_store.schemas import SIDES
from weights_store.tables.table_reader import TableVersion
from weights_store.views.token_texts import Tokenizer, TokenTexts

_SCORES = {"logp_pos": "positive_logps", "logp_neg": "negative_logps", "attribution": "attributions"}  # column to role
_ORDER = ("pair_id", "side", "position", "token_id", "token", "weight", "ref_logp", *_SCORES)


def scan_tokens(
    root: Location, weights: TableVersion, tokenizer: Tokenizer | None = None, checked: bool = False
) -> pl.LazyFrame:
    """Return one version of a weight dataset by token, see `WeightStore.scan_tokens`."""
    table = open_table(root, weights.table)
    parents = {parent["role"]: parent for parent in table.metadata(weights.version).get("parents", [])}
    scores = {
        column: [
            open_table(root, parent["table"]).scan(parent["version"], checked)
            for role, parent in parents.items()
            if base_role(role) == wanted
        ]
        for column, wanted in _SCORES.items()
    }
    scores = {column: frames for column, frames in scores.items() if frames}
    pairs = table.scan(weights.version, checked)
    tokens = pl.concat([_side(pairs, scores, side) for side in SIDES])
    if tokenizer is not None:
        texts = TokenTexts(tokenizer)
        decoded = pl.col("token_id").map_batches(texts.texts, return_dtype=pl.String, is_elementwise=True)
        tokens = tokens.with_columns(decoded.alias("token"))
    return tokens.select(name for name in _ORDER if name != "token" or tokenizer is not None)


def _side(pairs: pl.LazyFrame, scores: Mapping[str, Sequence[pl.LazyFrame]], side: str) -> pl.LazyFrame:
    """Return the tokens of one side. Conditions on `pair_id` pass the explode and the joins, down to every file."""
    ids = pl.col(f"{side}_ids")
    lists = pairs.select(
        "pair_id",
        pl.lit(side).alias("side"),
        pl.int_ranges(0, ids.list.len(), dtype=pl.Int32).alias("position"),
        ids.alias("token_id"),
        pl.col(f"{side}_token_weights").alias("weight"),
        pl.col(f"{side}_ref_logps").alias("ref_logp"),
    )
    for column, frames in scores.items():
        kind = _SCORES[column].rpartition("_")[2]
        names = [column, *(f"{column}{number}" for number in range(2, len(frames) + 1))]
        for name, frame in zip(names, frames, strict=True):
            # A left join: if a pair has no scores, exploding lists of unequal length raises, and no token gets lost.
            values = frame.select("pair_id", pl.col(f"{side}_{kind}").alias(name))
            lists = lists.join(values, on="pair_id", how="left", maintain_order="left")
        if len(names) > 1:
            mean = reduce(operator.add, map(pl.col, names)) / len(names)
            lists = lists.with_columns(mean.alias(column)).drop(names[1:])
    tokens = lists.explode("position", "token_id", "weight", "ref_logp", *scores, empty_as_null=False)
    missing = [pl.lit(None, pl.Float32).alias(column) for column in _SCORES if column not in scores]
    return tokens.with_columns(missing)
