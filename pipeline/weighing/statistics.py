"""The statistics that a version of a weight dataset records, counted batch by batch and merged. Called by `publish.py`."""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import polars as pl

from pipeline.weighing.weigh import Weighed
from weights_store.errors import MismatchError
from weights_store.schemas import SIDES, Side
from weights_store.tables.metadata import SideStatistics, Statistics

_Mean = Literal["mean_weight", "mean_logratio", "share_at_lower", "share_at_upper"]
"""Means over the tokens of a side."""


def count_up(joined: pl.DataFrame, sides: Mapping[Side, Weighed], pair_weights: np.ndarray | None) -> Statistics:
    """Return the statistics of at least one pair; `pair_weights` `[B]` are None if the recipe has none.

    Raises:
        MismatchError: The lists of the reference's top k are not k times as long as the ids, with one whole k for all pairs.
    """
    statistics: Statistics = {
        "num_pairs": joined.height,
        "num_pairs_by_split": dict(joined["split"].value_counts().sort("split").iter_rows()),
        "num_prompt_tokens": int(joined["prompt_ids"].list.len().sum()),
        "num_response_tokens": sum(len(weights.token_weights) for _, weights in sides.values()),
        "num_unpaired_rows": joined.filter(
            pl.min_horizontal(pl.col(f"{side}_ids").list.len() for side in SIDES) == 0
        ).height,
        "num_scored_pairs": joined.drop_nulls(["chosen_score", "rejected_score"]).height,
        "num_anchored_pairs": joined["anchor_ids"].count() if "anchor_ids" in joined.columns else 0,
        "ref_top_k": _top_k(joined),
        "chosen": _of_side(sides["chosen"]),
        "rejected": _of_side(sides["rejected"]),
    }
    if pair_weights is not None:
        statistics["mean_pair_weight"] = float(pair_weights.mean(dtype=np.float64))
        statistics["min_pair_weight"], statistics["max_pair_weight"] = (
            float(pair_weights.min()),
            float(pair_weights.max()),
        )
    statistics["constant_weights"] = _are_constant(statistics)
    return statistics


def _of_side(weighed: Weighed) -> SideStatistics:
    """Return the statistics of one side, without those that its estimator does not count."""
    scores, weights = weighed
    num_tokens = len(weights.token_weights)
    if not num_tokens:
        return {"num_responses": 0, "num_tokens": 0}
    statistics: SideStatistics = {
        "num_responses": len(scores.lengths),
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
    if weights.num_matches is not None:
        statistics["num_matches"] = list(weights.num_matches)
    if scores.positive_logps is not None and scores.negative_logps is not None:
        positive, negative = (x.mean(dtype=np.float64) for x in (scores.positive_logps, scores.negative_logps))
        statistics["mean_logratio"] = float(positive - negative)
    return statistics


def merge_statistics(left: Statistics, right: Statistics) -> Statistics:
    """Return the statistics of the pairs of both, which have none in common and the same settings."""
    merged: Statistics = {
        "num_pairs": left["num_pairs"] + right["num_pairs"],
        "num_pairs_by_split": _add(left["num_pairs_by_split"], right["num_pairs_by_split"]),
        "num_prompt_tokens": left["num_prompt_tokens"] + right["num_prompt_tokens"],
        "num_response_tokens": left["num_response_tokens"] + right["num_response_tokens"],
        "num_unpaired_rows": left.get("num_unpaired_rows", 0) + right.get("num_unpaired_rows", 0),
        "num_scored_pairs": left["num_scored_pairs"] + right["num_scored_pairs"],
        "num_anchored_pairs": left["num_anchored_pairs"] + right["num_anchored_pairs"],
        "ref_top_k": min(left["ref_top_k"], right["ref_top_k"]),  # the same in all rows of one reference's table
        "chosen": _merge_side(left["chosen"], right["chosen"]),
        "rejected": _merge_side(left["rejected"], right["rejected"]),
    }
    if "mean_pair_weight" in left:
        sums = (part["mean_pair_weight"] * part["num_pairs"] for part in (left, right))
        merged["mean_pair_weight"] = sum(sums) / merged["num_pairs"]
        merged["min_pair_weight"] = min(left["min_pair_weight"], right["min_pair_weight"])
        merged["max_pair_weight"] = max(left["max_pair_weight"], right["max_pair_weight"])
    merged["constant_weights"] = _are_constant(merged)
    return merged


def _add(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {split: left.get(split, 0) + right.get(split, 0) for split in sorted({*left, *right})}


def _merge_side(left: SideStatistics, right: SideStatistics) -> SideStatistics:
    if not left["num_tokens"] or not right["num_tokens"]:
        return left if left["num_tokens"] else right
    merged: SideStatistics = {
        "num_tokens": left["num_tokens"] + right["num_tokens"],
        "min_weight": min(left["min_weight"], right["min_weight"]),
        "max_weight": max(left["max_weight"], right["max_weight"]),
    }
    if "num_responses" in left and "num_responses" in right:
        merged["num_responses"] = left["num_responses"] + right["num_responses"]
    name: _Mean
    for name in get_args(_Mean):
        if name in left and name in right:
            sums = (part[name] * part["num_tokens"] for part in (left, right))
            merged[name] = sum(sums) / merged["num_tokens"]
    if "num_matches" in left and "num_matches" in right:
        merged["num_matches"] = [sum(each) for each in zip(left["num_matches"], right["num_matches"], strict=True)]
    if "num_without_mass" in left and "num_without_mass" in right:
        merged["num_without_mass"] = left["num_without_mass"] + right["num_without_mass"]
    return merged


def _are_constant(statistics: Statistics) -> bool:
    sides = (statistics[side] for side in SIDES if statistics[side]["num_tokens"])
    return len({end for side in sides for end in (side["min_weight"], side["max_weight"])}) == 1


def _top_k(joined: pl.DataFrame) -> int:
    """Return k, how many of the reference's most likely tokens are stored at each position; 0 if none are."""
    names = [name for name in joined.columns if "_ref_top_" in name]
    if not names:
        return 0
    lengths = (
        (pl.col(name).list.len().fill_null(0) / pl.col(f"{name.split('_')[0]}_ids").list.len()) for name in names
    )
    counts = joined.select("pair_id", *lengths).unpivot(index="pair_id", value_name="k")
    counts = counts.filter(pl.col("k").is_not_nan())  # 0 for 0: the side of an unpaired row without a response
    k = counts["k"][0]
    bad = counts.filter((pl.col("k") != k) | (pl.col("k") % 1 != 0))
    if bad.height:
        pair_id, name, found = bad.row(0)
        raise MismatchError(
            f"pair {pair_id}: {found:g} values per token in {name}, expected {k:g} as in the other lists; "
            f"{bad.height} such lists. Delete the reference's logps table and build again"
        )
    return int(k)
