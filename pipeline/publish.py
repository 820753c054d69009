"""Stage publish: join ids, reference log-probs and weights into a weight dataset, and commit a version.

A version is a function of its lineage: the same tokens, log-probs and settings give the same fingerprint, and the newest
version with that fingerprint is returned as it is. Rows that are new are appended; changed settings write all rows anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.provenance import provenance
from pipeline.recipe import Recipe, WeightsSection
from pipeline.weigh import ClampSettings, Side, SideScores, SideWeights, token_keys, weigh
from weights_store import Table, TableVersion, WeightStore
from weights_store.errors import InputError, MismatchError
from weights_store.fingerprint import explain_difference, fingerprint
from weights_store.schemas import FLOATS, SCHEMA_VERSION, WEIGHTS, Reason

_SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class Ingredients:
    """Versions of the tables a weight dataset is made of; the pair's only where the estimator needs them."""

    tokens: TableVersion
    ref_logps: TableVersion
    positive_logps: TableVersion | None = None
    negative_logps: TableVersion | None = None

    def by_role(self) -> dict[str, TableVersion]:
        """Return the references that are there, by role."""
        roles = ("tokens", "ref_logps", "positive_logps", "negative_logps")
        return {role: reference for role in roles if (reference := getattr(self, role)) is not None}


@dataclass(frozen=True)
class Published:
    """What publish hands on."""

    weights: TableVersion
    name: str
    statistics: dict[str, Any]
    changes: list[str]
    is_new: bool


def publish(
    recipe: Recipe,
    weights: WeightsSection,
    ingredients: Ingredients,
    expect_same: bool = False,
    report: Callable[[str], None] = print,
) -> Published:
    """Weigh every pair that has all its scores and publish the result as `weights/<name>`.

    Args:
        recipe: The build, recorded as it is.
        weights: Name, estimator and settings; usually the recipe's own.
        ingredients: What to join.
        expect_same: Refuse to make a version with other settings than the newest one's.
        report: Gets a line or two.

    Raises:
        InputError: No pair has all its scores, or `expect_same` and the settings differ.
        MismatchError: A list of log-probs is not as long as its ids.
    """
    store = WeightStore(ingredients.tokens.store)
    table = store.table(f"weights/{weights.name}")
    parents = ingredients.by_role()
    recipe = recipe.model_copy(update={"weights": weights})
    identity = {
        "schema_version": SCHEMA_VERSION,
        "settings": recipe.result_settings(),
        "tables": {role: parent.table for role, parent in parents.items()},
        "data": {role: parent.fingerprint for role, parent in parents.items()},
    }
    mark = fingerprint(identity)
    newest = table.metadata() if table.exists() else None
    tokens_metadata = store.table(ingredients.tokens.table).metadata(ingredients.tokens.version)
    if newest and newest["fingerprint"] == mark:
        # The pairs are the same, and bad rows may still have come or gone.
        statistics = _with_balance(newest["statistics"], tokens_metadata["statistics"])
        return Published(table.reference(), weights.name, statistics, newest["changes"], is_new=False)
    changes = explain_difference(newest["identity"], identity) if newest else []
    made_differently = [change for change in changes if not change.startswith("data.")]
    if made_differently and expect_same:
        raise InputError(
            f"weights/{weights.name}@{table.version()} was made differently: {'; '.join(made_differently)}. "
            "Give the result another weights.name, or leave --expect-same out"
        )

    rows, statistics = _weighed_rows(store, ingredients, weights)
    metadata = {
        "fingerprint": mark,
        "identity": identity,
        "recipe": recipe.model_dump(),
        "parents": [{"role": role, **parent.as_parent()} for role, parent in parents.items()],
        "tokenizer": tokens_metadata["tokenizer"],
        "statistics": _with_balance(statistics, tokens_metadata["statistics"]),
        "changes": changes,
        **provenance(),
    }
    reference = _write(table, rows, metadata, append=newest is not None and not made_differently)
    report(
        f"published {reference}: {statistics['num_pairs']} pairs, {statistics['num_response_tokens']} response tokens"
    )
    return Published(reference, weights.name, metadata["statistics"], changes, is_new=True)


def _with_balance(statistics: dict[str, Any], prepared: dict[str, Any]) -> dict[str, Any]:
    """Add where every source row went: rows in = published + quarantined."""
    quarantined = dict(prepared["quarantined"])
    unscorable = prepared["num_pairs"] - statistics["num_pairs"]
    if unscorable:
        quarantined[Reason.UNSCORABLE.value] = unscorable
    return {**statistics, "num_source_rows": prepared["num_source_rows"], "quarantined": quarantined}


def _write(table: Table, rows: pa.Table, metadata: dict[str, Any], append: bool) -> TableVersion:
    """Append when the rows there stay as they are; write all rows anew when settings changed or pairs have left."""
    known = set(table.pair_ids().to_list())
    if append and known < set(rows["pair_id"].to_pylist()):
        return table.append(rows, metadata)
    return table.replace(rows, metadata)


def _weighed_rows(
    store: WeightStore, ingredients: Ingredients, weights: WeightsSection
) -> tuple[pa.Table, dict[str, Any]]:
    joined = _join(store, ingredients)
    if joined.is_empty():
        raise InputError(f"no pair of {ingredients.tokens} has all its scores; nothing to publish")
    settings = ClampSettings(weights.k, weights.mu, weights.lower, weights.upper, weights.seed)
    columns = {
        name: joined[name].to_arrow() for name in ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "split")
    }
    columns |= {f"{side}_ref_logps": joined[f"{side}_ref_logps"].to_arrow() for side in _SIDES}
    per_side: dict[str, tuple[SideScores, SideWeights]] = {}
    for side in _SIDES:
        scores = _side_scores(joined, side)
        weighed = weigh(scores, weights.estimator, settings)
        per_side[side] = (scores, weighed)
        lengths = joined[f"{side}_ids"].list.len().to_numpy().astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns[f"{side}_token_weights"] = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(weighed.token_weights), type=FLOATS
        )
    columns["pair_weight"] = pa.array(np.ones(joined.height, dtype=np.float32))
    for name in ("anchor_ids", "anchor_ref_logps"):
        columns[name] = pa.nulls(joined.height, WEIGHTS.field(name).type)
    rows = pa.table({name: columns[name] for name in WEIGHTS.names}).cast(WEIGHTS)
    return rows, _statistics(joined, per_side)


def _join(store: WeightStore, ingredients: Ingredients) -> pl.DataFrame:
    """Return the pairs that have all their scores, in the order of the source, ids and log-probs side by side."""
    tokens = store.table(ingredients.tokens.table).scan(ingredients.tokens.version)
    frame = tokens.select("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "split", "source_row")
    for role in ("ref", "positive", "negative"):
        reference = getattr(ingredients, f"{role}_logps")
        if reference is None:
            continue
        logps = store.table(reference.table).scan(reference.version)
        renamed = logps.rename({f"{side}_logps": f"{side}_{role}_logps" for side in _SIDES})
        frame = frame.join(renamed, on="pair_id", how="inner")
    joined = frame.sort("source_row", "pair_id").collect()
    for name in joined.columns:
        if name.endswith("_logps"):
            _check_lengths(joined, f"{name.split('_')[0]}_ids", name)
    return joined


def _check_lengths(joined: pl.DataFrame, ids: str, logps: str) -> None:
    bad = joined.filter(pl.col(ids).list.len() != pl.col(logps).list.len())
    if bad.height:
        row = bad.row(0, named=True)
        raise MismatchError(
            f"pair {row['pair_id']}: {len(row[logps])} values in {logps} for {len(row[ids])} {ids}; "
            f"{bad.height} such pairs. Delete the logps table and build again"
        )


def _side_scores(joined: pl.DataFrame, side: Side) -> SideScores:
    def flat(role: str) -> np.ndarray:
        column = f"{side}_{role}_logps"
        return joined[column].explode().to_numpy() if column in joined.columns else np.empty(0, np.float32)

    lengths = joined[f"{side}_ids"].list.len().to_numpy().astype(np.int64)
    return SideScores(side, flat("positive"), flat("negative"), token_keys(joined["pair_id"].to_list(), side, lengths))


def _statistics(joined: pl.DataFrame, per_side: dict[str, tuple[SideScores, SideWeights]]) -> dict[str, Any]:
    statistics: dict[str, Any] = {
        "num_pairs": joined.height,
        "num_prompt_tokens": int(joined["prompt_ids"].list.len().sum()),
        "num_response_tokens": sum(len(weighed.token_weights) for _, weighed in per_side.values()),
        "constant_weights": len(
            {float(w) for _, s in per_side.values() for w in (s.token_weights.min(), s.token_weights.max())}
        )
        == 1,
    }
    for side, (scores, weighed) in per_side.items():
        num_tokens = len(weighed.token_weights)
        statistics[side] = {
            "num_tokens": num_tokens,
            "mean_weight": float(weighed.token_weights.mean(dtype=np.float64)),
            "share_at_lower": weighed.num_at_lower / num_tokens,
            "share_at_upper": weighed.num_at_upper / num_tokens,
        }
        if len(scores.positive_logps):
            logratios = scores.positive_logps.astype(np.float64) - scores.negative_logps
            statistics[side]["mean_logratio"] = float(logratios.mean())
    return statistics
