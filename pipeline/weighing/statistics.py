"""What a version of a weight dataset records of its weights: counted up batch by batch, and merged. Called by `publish.py`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from pipeline.weighing.estimators import Side
from pipeline.weighing.weigh import SIDES, Weighed
from weights_store.errors import MismatchError


def count_up(joined: pl.DataFrame, sides: Mapping[Side, Weighed], pair_weights: np.ndarray | None) -> dict[str, Any]:
    """Return the statistics of some pairs.

    Args:
        joined: The pairs, at least one.
        sides: What was known of their tokens, and their weights.
        pair_weights: `[B]`; None where all are 1 by rule.

    Raises:
        MismatchError: The lists of the reference's likeliest tokens are not one whole number times as long as the ids.
    """
    statistics: dict[str, Any] = {
        "num_pairs": joined.height,
        "num_prompt_tokens": int(joined["prompt_ids"].list.len().sum()),
        "num_response_tokens": sum(len(weights.token_weights) for _, weights in sides.values()),
        "num_scored_pairs": joined.drop_nulls(["chosen_score", "rejected_score"]).height,
        "num_anchored_pairs": joined["anchor_ids"].count() if "anchor_ids" in joined.columns else 0,
        "ref_top_k": _top_k(joined),
        **{side: _of_side(weighed) for side, weighed in sides.items()},
    }
    if pair_weights is not None:
        statistics["mean_pair_weight"] = float(pair_weights.mean(dtype=np.float64))
    return {**statistics, "constant_weights": _are_constant(statistics)}


def _of_side(weighed: Weighed) -> dict[str, Any]:
    """Return the statistics of one side; what the estimator does not look at is not there."""
    scores, weights = weighed
    num_tokens = len(weights.token_weights)
    statistics: dict[str, Any] = {
        "num_tokens": num_tokens,
        "mean_weight": float(weights.token_weights.mean(dtype=np.float64)),
        "min_weight": float(weights.token_weights.min()),
        "max_weight": float(weights.token_weights.max()),
    }
    if weights.num_at_lower is not None:
        statistics["share_at_lower"] = weights.num_at_lower / num_tokens
    if weights.num_at_upper is not None:
        statistics["share_at_upper"] = weights.num_at_upper / num_tokens
    if weights.num_without_mass is not None:
        statistics["num_without_mass"] = weights.num_without_mass
    if scores.positive_logps is not None and scores.negative_logps is not None:
        positive, negative = (x.mean(dtype=np.float64) for x in (scores.positive_logps, scores.negative_logps))
        statistics["mean_logratio"] = float(positive - negative)
    return statistics


def merge_statistics(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Return the statistics of the pairs of both, which have none in common; `left` may be of an earlier tokenweights."""
    names = ("num_pairs", "num_prompt_tokens", "num_response_tokens", "num_scored_pairs", "num_anchored_pairs")
    merged: dict[str, Any] = {name: left.get(name, 0) + right[name] for name in names}
    merged["ref_top_k"] = min(left["ref_top_k"], right["ref_top_k"])  # the same in all rows of one reference's table
    for side in SIDES:
        merged[side] = _merge_side(left[side], right[side])
    if "mean_pair_weight" in left:
        sums = (part["mean_pair_weight"] * part["num_pairs"] for part in (left, right))
        merged["mean_pair_weight"] = sum(sums) / merged["num_pairs"]
    return {**merged, "constant_weights": _are_constant(merged)}


def _merge_side(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    num_left, num_right = left["num_tokens"], right["num_tokens"]
    merged: dict[str, Any] = {}
    for name in (name for name in left if name in right):
        if name.startswith("num_"):
            merged[name] = left[name] + right[name]
        elif name.startswith(("mean_", "share_")):
            merged[name] = (left[name] * num_left + right[name] * num_right) / (num_left + num_right)
    merged["min_weight"] = min(left["min_weight"], right["min_weight"])
    merged["max_weight"] = max(left["max_weight"], right["max_weight"])
    return merged


def _are_constant(statistics: dict[str, Any]) -> bool:
    return len({statistics[side][end] for side in SIDES for end in ("min_weight", "max_weight")}) == 1


def _top_k(joined: pl.DataFrame) -> int:
    """Return how many of the reference's likeliest tokens are stored for each place, 0 where none are.

    Raises:
        MismatchError: The lists are not one whole number times as long as the ids, the same for all pairs.
    """
    names = [name for name in joined.columns if "_ref_top_" in name]
    if not names:
        return 0
    lengths = (
        (pl.col(name).list.len() / pl.col(f"{name.split('_')[0]}_ids").list.len()).fill_null(0) for name in names
    )
    counts = joined.select("pair_id", *lengths).unpivot(index="pair_id", value_name="k")
    k = counts["k"][0]
    bad = counts.filter((pl.col("k") != k) | (pl.col("k") % 1 != 0))
    if bad.height:
        pair_id, name, found = bad.row(0)
        raise MismatchError(
            f"pair {pair_id}: {found:g} values per token in {name}, expected {k:g} as elsewhere, a whole number; "
            f"{bad.height} such lists. Delete the reference's logps table and build again"
        )
    return int(k)
