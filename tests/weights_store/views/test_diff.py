from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from weights_store.errors import DamageError, NotFoundError, SettingsError
from weights_store.schemas import WEIGHTS
from weights_store.views.diff import SideDiff, diff_tables

TIS, REVERSED = "hh-harmless/tis-dpo", "hh-harmless/reversed"


def test_two_estimators_by_hand(small_store):
    diff = small_store.diff(TIS, REVERSED)
    assert (diff.a, diff.b) == (f"weights/{TIS}@1", f"weights/{REVERSED}@0")
    assert diff.settings == [
        'settings.weights.estimator: "tis" -> "reversed"',
        f'settings.weights.name: "{TIS}" -> "{REVERSED}"',
    ]
    assert (diff.num_common, diff.num_only_in_a, diff.num_only_in_b, diff.num_not_comparable) == (4, 0, 0, 0)
    # a: 0 + 1.5 + 1.5, b: 3.75 + 0 + 1.5 + 0.75, c: 1.5 + 0.5, d: 0.5; together 11.5 over 10 tokens, 8 not zero.
    # Sums of a, b, a², b², ab: 13, 11.5, 27.125, 17, 10. So the squares about the means are 10.225, 3.775, and -4.95 of both.
    assert diff.chosen == SideDiff(10, 8, 1.15, 3.75, 1.3, 1.15, pytest.approx(-4.95 / (10.225 * 3.775) ** 0.5))
    # a: 3.75 + 0, b: 1.5 + 0.75 + 0, c: 0.75 + 0.5 + 0 + 0.5 + 0, d: 0.5; together 8.25 over 11 tokens, 7 not zero.
    tis = [0.25, 1, 2, 1.5, 1, 1.5, 1.25, 1, 1.25, 1, 0.75]
    other = [4, 1, 0.5, 0.75, 1, 0.75, 0.75, 1, 0.75, 1, 1.25]
    correlation = pytest.approx(np.corrcoef(tis, other)[0, 1])
    assert diff.rejected == SideDiff(11, 7, 0.75, 3.75, 12.5 / 11, 12.75 / 11, correlation)
    assert not diff.is_empty
    # Constant weights have no correlation.
    assert (diff.pair_weights, diff.num_anchors_changed) == (SideDiff(4, 0, 0.0, 0.0, 1.0, 1.0, None), 0)


def test_pair_weights_and_anchors_that_differ_are_counted(ti_store):
    # Token weights stay. Pair weights: a 1 -> 1.5, c 1 -> 0.25; anchors: b's is another, d has none, a's log-probs are others.
    table = ti_store.table("weights/hh-harmless/ti-dpo")
    changes = {
        "a": {"pair_weight": 1.5, "anchor_ref_logps": [-1.0, -1.0]},
        "b": {"anchor_ids": [3, 8, 8]},
        "c": {"pair_weight": 0.25},
        "d": {"anchor_ids": None, "anchor_ref_logps": None},
    }
    rows = [row | changes[row["pair_id"]] for row in table.scan().collect().to_dicts()]
    table.replace(pa.Table.from_pylist(rows, WEIGHTS), table.metadata())
    diff = ti_store.diff("hh-harmless/ti-dpo@0", "hh-harmless/ti-dpo@1")
    assert (diff.settings, diff.chosen.num_tokens_changed, diff.rejected.num_tokens_changed) == ([], 0, 0)
    assert diff.pair_weights == SideDiff(4, 2, 1.25 / 4, 0.75, 1.0, 3.75 / 4, None)
    assert diff.num_anchors_changed == 2
    assert diff.largest.is_empty()
    assert not diff.is_empty


@pytest.mark.parametrize("change", [{"pair_weight": 1.5}, {"anchor_ids": [7], "anchor_ref_logps": [-1.0]}])
def test_a_pair_weight_or_an_anchor_alone_makes_two_datasets_differ(ti_store, change):
    table = ti_store.table("weights/hh-harmless/ti-dpo")
    rows = [row | (change if row["pair_id"] == "a" else {}) for row in table.scan().collect().to_dicts()]
    table.replace(pa.Table.from_pylist(rows, WEIGHTS), table.metadata())
    assert ti_store.diff("hh-harmless/ti-dpo@0", "hh-harmless/ti-dpo@0").is_empty
    assert not ti_store.diff("hh-harmless/ti-dpo@0", "hh-harmless/ti-dpo@1").is_empty


def test_pairs_that_changed_most_come_first(small_store):
    largest = small_store.diff(TIS, REVERSED).largest
    assert largest.columns == ["pair_id", "side", "mean_a", "mean_b", "mean_abs_change", "max_abs_change"]
    assert largest.row(0) == ("a", "rejected", 1.25 / 2, 5 / 2, 1.875, 3.75)
    assert largest.drop("mean_a", "mean_b").rows() == [
        ("a", "rejected", 1.875, 3.75),  # 3.75 over 2 tokens
        ("b", "chosen", 1.5, 3.75),  # 6 over 4
        ("a", "chosen", 1.0, 1.5),  # 3 over 3
        ("c", "chosen", 1.0, 1.5),  # 2 over 2
        ("b", "rejected", 0.75, 1.5),  # 2.25 over 3
        ("d", "chosen", 0.5, 0.5),
        ("d", "rejected", 0.5, 0.5),
        ("c", "rejected", 0.35, 0.75),  # 1.75 over 5
    ]


def test_versions_differ_by_the_pairs_that_came(small_store):
    diff = small_store.diff(f"{TIS}@0", f"{TIS}@1")
    assert (diff.num_common, diff.num_only_in_a, diff.num_only_in_b) == (3, 0, 1)
    assert [line.split(":")[0] for line in diff.settings] == [
        "data.negative_logps",
        "data.positive_logps",
        "data.ref_logps",
        "data.tokens",
    ]
    # The same weights: chosen of a, b, c are 3.5 + 7 + 1.25, rejected ones 1.25 + 4.5 + 6.
    assert diff.chosen == SideDiff(9, 0, 0.0, 0.0, 11.75 / 9, 11.75 / 9, pytest.approx(1))
    assert diff.rejected == SideDiff(10, 0, 0.0, 0.0, 1.175, 1.175, pytest.approx(1))
    assert diff.largest.is_empty()


def test_a_dataset_does_not_differ_from_itself(small_store):
    diff = small_store.diff(TIS, TIS)
    assert diff.settings == []
    assert diff.is_empty


def test_swapping_the_two_swaps_what_only_one_has_and_keeps_the_changes(small_store):
    there, back = small_store.diff(f"{TIS}@0", REVERSED), small_store.diff(REVERSED, f"{TIS}@0")
    assert (there.num_only_in_a, there.num_only_in_b) == (back.num_only_in_b, back.num_only_in_a) == (0, 1)
    for one, other in ((there.chosen, back.chosen), (there.rejected, back.rejected)):
        assert replace(one, mean_a=one.mean_b, mean_b=one.mean_a) == other
    assert (
        there.largest.rename({"mean_a": "mean_b", "mean_b": "mean_a"}).select(back.largest.columns).equals(back.largest)
    )


def test_weights_of_other_tokens_are_not_compared(small_store):
    table = small_store.table(f"weights/{REVERSED}")
    rows = table.scan().collect()
    other = pl.when(pl.col("pair_id") == "b").then(pl.lit(pl.Series([[8, 3, 7]], dtype=pl.List(pl.Int32))))
    changed = rows.with_columns(other.otherwise("rejected_ids").alias("rejected_ids"))
    table.replace(changed.to_arrow(), table.metadata())
    diff = small_store.diff(TIS, REVERSED)
    assert (diff.num_common, diff.num_not_comparable) == (4, 1)
    assert (diff.chosen.num_tokens, diff.rejected.num_tokens) == (10 - 4, 11 - 3)
    assert "b" not in diff.largest["pair_id"].to_list()


def test_nothing_in_common_gives_no_means(small_store):
    table = small_store.table("weights/hh-harmless/other")
    rows = small_store.scan(TIS).with_columns(pl.col("pair_id") + "x").collect()
    table.append(rows.to_arrow(), small_store.metadata(TIS))
    diff = small_store.diff(TIS, "hh-harmless/other")
    assert (diff.num_common, diff.num_only_in_a, diff.num_only_in_b) == (0, 4, 4)
    assert diff.chosen == diff.rejected == SideDiff(0, 0)


def test_ranges_of_pairs_give_the_same_as_all_at_once(small_store, monkeypatch):
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 1)
    a, b = small_store.table(f"weights/{TIS}"), small_store.table(f"weights/{REVERSED}")
    for table in (a, b):
        table.replace(table.scan().collect().to_arrow(), table.metadata())
    collected = []
    collect = pl.LazyFrame.collect
    monkeypatch.setattr(pl.LazyFrame, "collect", lambda frame: collected.append(collect(frame)) or collected[-1])
    by_range = diff_tables(a, 2, b, 1, max_bytes=1)
    heights = [frame.height for frame in collected]
    assert (max(heights), sum(heights)) == (1, 8)  # one pair of each at a time
    monkeypatch.undo()
    at_once = small_store.diff(f"{TIS}@1", f"{REVERSED}@0")
    assert by_range.largest.equals(at_once.largest)
    assert (by_range.chosen, by_range.num_common) == (at_once.chosen, at_once.num_common)
    assert by_range.rejected == at_once.rejected


def test_weights_that_are_not_finite_are_refused(small_store):
    rows = small_store.scan(TIS).with_columns(pair_weight=pl.lit(float("nan"), pl.Float32)).collect()
    small_store.table("weights/hh-harmless/nan").append(rows.to_arrow(), small_store.metadata(TIS))
    with pytest.raises(
        DamageError, match="pair weights of weights/hh-harmless/tis-dpo@1 or .*nan@0 are not all finite"
    ):
        small_store.diff(TIS, "hh-harmless/nan")


def test_what_is_not_there_or_no_name_is_refused(small_store):
    with pytest.raises(NotFoundError, match="has no version 9"):
        small_store.diff(TIS, f"{TIS}@9")
    with pytest.raises(SettingsError, match="bad version"):
        small_store.diff(f"{TIS}@newest", TIS)
