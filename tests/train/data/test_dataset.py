import copy
import dataclasses
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.config import DataConfig
from train.data.dataset import (
    OrderedPairs,
    PairDataset,
    StoredResponse,
    check_weights_vary,
    open_weights,
    sample_pairs,
)
from train.data.sampler import BlockShuffle
from weights_store import WeightStore
from weights_store.errors import DamageError, MismatchError, NotFoundError, SettingsError
from weights_store.schemas import SIDES, WEIGHTS
from weights_store.tables.shards import ShardReader


def open_pairs(
    uri: str,
    weights: str = "toy/tis",
    with_ref_top: bool = False,
    with_scores: bool = False,
    with_anchors: bool = False,
    **config,
) -> PairDataset:
    data = DataConfig(store=uri, weights=weights, **config)
    flags = {"with_ref_top": with_ref_top, "with_scores": with_scores, "with_anchors": with_anchors}
    return PairDataset(open_weights(data), data, vocab_size=128, **flags)


def ids_of(pairs: PairDataset) -> list[str]:
    return [pairs[row].pair_id for row in range(len(pairs))]


def test_rows_come_back_as_they_were_stored(small_groups, store, rows) -> None:
    pairs = open_pairs(store)
    (sizes,) = pairs.group_sizes  # of one shard
    assert len(sizes) > 3
    assert sum(sizes) == len(pairs) == 40
    for i in (39, 0, 17, 16, 39):
        pair = pairs[i]
        assert (pair.pair_id, pair.prompt_ids.tolist()) == (rows[i]["pair_id"], rows[i]["prompt_ids"])
        for side in ("chosen", "rejected"):
            response = getattr(pair, side)
            assert response.ids.tolist() == rows[i][f"{side}_ids"]
            # the store keeps 12 bits of mantissa
            assert response.token_weights == pytest.approx(rows[i][f"{side}_token_weights"], rel=1.3e-4)
            assert response.ref_logps == pytest.approx(rows[i][f"{side}_ref_logps"], rel=1.3e-4)


def add_optional(rows: list[dict], top_k: int = 3) -> list[dict]:
    """Scores, and top-k numbers that tell where they belong: token t of row i has ids from 10 t and log-probs from -(i + t)."""
    added = []
    for i, row in enumerate(rows):
        more: dict = {"pair_weight": 0.5 + i, "chosen_score": 4.0 + i, "rejected_score": 1.0 - i}
        for side in ("chosen", "rejected"):
            places = range(len(row[f"{side}_ids"]))
            more[f"{side}_ref_top_ids"] = [10 * t + k for t in places for k in range(top_k)]
            more[f"{side}_ref_top_logps"] = [-1.0 * (i + t) - k / 4 for t in places for k in range(top_k)]
        added.append(row | more)
    return added


def test_scores_pair_weight_and_top_k_come_back_as_they_were_stored(small_groups, write_weights, rows) -> None:
    pairs = open_pairs(write_weights(add_optional(rows)), with_ref_top=True, with_scores=True)
    for i in (5, 39):
        pair = pairs[i]
        assert (pair.pair_weight, pair.chosen_score, pair.rejected_score) == (0.5 + i, 4.0 + i, 1.0 - i)
        num_tokens = len(rows[i]["rejected_ids"])
        assert pair.rejected.ref_top_ids.tolist() == [[10 * t, 10 * t + 1, 10 * t + 2] for t in range(num_tokens)]
        assert pair.rejected.ref_top_logps[0].tolist() == [-i, -i - 0.25, -i - 0.5]
        assert len(pair.chosen.ref_top_logps) == len(pair.chosen.ids)


def add_anchors(rows: list[dict]) -> list[dict]:
    """Anchors that tell where they belong: row i has 1 + i % 3 tokens, ids from i, log-probs from -i / 4."""
    return [
        row
        | {"anchor_ids": [i + t for t in range(1 + i % 3)], "anchor_ref_logps": [-i / 4 - t for t in range(1 + i % 3)]}
        for i, row in enumerate(rows)
    ]


def test_anchors_come_back_as_they_were_stored(small_groups, write_weights, rows) -> None:
    uri = write_weights(add_anchors(rows))
    for swap in (False, True):
        anchor = open_pairs(uri, with_anchors=True, swap=swap)[38].anchor
        assert anchor.ids.tolist() == [38, 39, 40]
        assert anchor.ref_logps.tolist() == [-9.5, -10.5, -11.5]
        assert anchor.token_weights.tolist() == [1, 1, 1]
    assert open_pairs(uri)[38].anchor is None


def test_columns_that_nobody_asked_for_are_not_read(write_weights, rows, monkeypatch) -> None:
    asked: list[str] = []
    ordinary = ShardReader.read_group
    monkeypatch.setattr(
        ShardReader, "read_group", lambda self, index, names: (asked.extend(names), ordinary(self, index, names))[1]
    )
    pair = open_pairs(write_weights(add_optional(rows)))[0]
    assert (pair.chosen.ref_top_ids, pair.rejected.ref_top_logps, pair.chosen_score, pair.rejected_score) == (None,) * 4
    assert not [name for name in asked if "top" in name or name.endswith("score")]


def test_swap_exchanges_everything_of_the_two_sides(write_weights, rows) -> None:
    uri = write_weights(add_optional(rows))
    plain, swapped = (open_pairs(uri, with_ref_top=True, with_scores=True, swap=swap)[5] for swap in (False, True))
    assert (swapped.pair_id, swapped.pair_weight) == (plain.pair_id, plain.pair_weight)
    assert (swapped.chosen_score, swapped.rejected_score) == (plain.rejected_score, plain.chosen_score) == (-4.0, 9.0)
    for ours, theirs in ((swapped.chosen, plain.rejected), (swapped.rejected, plain.chosen)):
        for field in dataclasses.fields(StoredResponse):
            assert np.array_equal(getattr(ours, field.name), getattr(theirs, field.name))


def test_split_and_max_pairs_choose_rows_in_stored_order(small_groups, store, rows) -> None:
    test_rows = [row["pair_id"] for row in rows if row["split"] == "test"]
    assert len(test_rows) == 10
    assert ids_of(open_pairs(store, split="test")) == test_rows
    assert ids_of(open_pairs(store, split="test", max_pairs=7)) == test_rows[:7]
    assert ids_of(open_pairs(store, max_pairs=11)) == [row["pair_id"] for row in rows[:11]]
    assert len(open_pairs(store, max_pairs=1000)) == 40


def test_unknown_split_is_refused_with_the_known_ones(write_weights, rows) -> None:
    counts = {"num_pairs_by_split": {"test": 10, "train": 30}}
    store = write_weights(rows, statistics=counts)
    said = r"toy/tis@0 has no pairs of split 'dev'; it has test \(10 pairs\), train \(30 pairs\)\. Name another split"
    with pytest.raises(NotFoundError, match=said):
        open_pairs(store, split="dev")


def test_pair_weights_can_be_left_out(write_weights, rows) -> None:
    store = write_weights([{**row, "pair_weight": 0.25} for row in rows])
    assert {pair.pair_weight for pair in sample_pairs(open_pairs(store))} == {0.25}
    assert {pair.pair_weight for pair in sample_pairs(open_pairs(store, use_pair_weights=False))} == {1.0}


def test_an_older_version_stays_what_it_was(write_weights, rows) -> None:
    uri = write_weights(rows)
    write_weights(rows[:3])
    assert len(open_pairs(uri)) == 3
    assert len(open_pairs(uri, "toy/tis@0")) == 40
    assert open_pairs(uri).source.name == "toy/tis@1"


def test_unknown_names_are_refused_with_the_known_ones(store, tmp_path) -> None:
    with pytest.raises(NotFoundError, match=r"no weight dataset 'toy/other' .* toy/tis"):
        open_pairs(store, "toy/other")
    with pytest.raises(NotFoundError, match="no version 9"):
        open_pairs(store, "toy/tis@9")
    with pytest.raises(NotFoundError, match="no store at"):
        open_pairs(str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match="bad version"):
        open_pairs(store, "toy/tis@newest")


@pytest.mark.parametrize("column", ["chosen_ids", "rejected_token_weights", "chosen_ref_logps", "pair_id"])
def test_a_flipped_bit_in_what_is_read_stops_the_reader(small_groups, store, column) -> None:
    # The last byte of the column's values in the third row group: zstd has no checksum of its own here.
    table = WeightStore(store).table("weights/toy/tis")
    (record,) = table.records()
    path = table.location.path / record.name
    group = pq.read_metadata(path).row_group(2)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith(column))
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0x04
    path.write_bytes(data)
    with pytest.raises(DamageError, match=rf"weights/toy/tis, shard {record.name}, row group 2: "):
        ids_of(open_pairs(store))


def test_two_shards_exchanged_are_no_pairs_of_this_version(write_weights, rows) -> None:
    uri = write_weights(rows[:20])
    table = WeightStore(uri).table("weights/toy/tis")
    table.append(pa.Table.from_pylist(rows[20:], WEIGHTS), table.metadata())
    first, second = (table.location.path / name for name in table.shards())
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(DamageError, match="is not the file that was committed"):
        ids_of(open_pairs(uri))


def test_cache_reads_a_group_once_and_holds_a_window(small_groups, store, monkeypatch) -> None:
    pairs = open_pairs(store)
    reads = []
    ordinary = pairs.read_group
    monkeypatch.setattr(pairs, "read_group", lambda group: (reads.append(group), ordinary(group))[1])
    ordered = OrderedPairs(pairs, BlockShuffle(pairs.group_sizes, seed=0), 40)
    for position in range(40):
        ordered[position]
    assert len(reads) == len(pairs.group_sizes[0])
    pairs.cache_groups = 1
    pairs._cache.clear()
    for row in (0, 39, 0):
        pairs[row]
    assert len(pairs._cache) == 1
    assert len(reads) == len(pairs.group_sizes[0]) + 3


def damage(rows: list[dict], row: int, **changes) -> list[dict]:
    rows = copy.deepcopy(rows)
    rows[row] |= changes
    return rows


@pytest.mark.parametrize("column", ["chosen_token_weights", "rejected_ref_logps"])
def test_a_missing_value_is_refused_with_pair_side_and_place(write_weights, rows, column) -> None:
    side = column.partition("_")[0]
    num_tokens = len(rows[6][f"{side}_ids"])
    pairs = open_pairs(write_weights(damage(rows, 6, **{column: rows[6][column][:-1]})))
    with pytest.raises(
        MismatchError,
        match=rf"pair pair-0006: {num_tokens - 1} {column} for {num_tokens} {side}_ids "
        r"\(toy/tis@0, shard .*\.parquet\); rebuild",
    ):
        pairs[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(write_weights, rows, bad) -> None:
    *values, _ = rows[6]["rejected_token_weights"]
    at, values = len(values), [*values, bad]
    pairs = open_pairs(write_weights(damage(rows, 6, rejected_token_weights=values)))
    with pytest.raises(
        MismatchError, match=rf"pair-0006: rejected_token_weights\[{at}\] is {bad}, expected a finite number"
    ):
        pairs[0]


def test_an_id_outside_the_vocabulary_is_refused(write_weights, rows) -> None:
    pairs = open_pairs(write_weights(damage(rows, 7, prompt_ids=[1, 128])))
    with pytest.raises(
        MismatchError,
        match=r"pair pair-0007: prompt_ids\[1\] is 128, expected an id in 0..127 .*; train the model that the dataset was tok",
    ):
        pairs[0]


def test_a_bad_row_of_another_split_does_not_matter(write_weights, rows) -> None:
    uri = write_weights(damage(rows, 7, prompt_ids=[1, 128]))  # row 7 is in split test
    assert len(open_pairs(uri, split="train")[0].prompt_ids) > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["prompt_ids"], "prompt_ids is empty, expected at least one token"),
        (["chosen_ids", "rejected_ids"], "chosen_ids and rejected_ids are empty, expected tokens in one of them"),
        (["chosen_ids"], r"\d+ chosen_token_weights for 0 chosen_ids"),
    ],
)
def test_empty_parts_are_refused(write_weights, rows, names, message) -> None:
    pairs = open_pairs(write_weights(damage(rows, 2, **{name: [] for name in names})))
    with pytest.raises(MismatchError, match=f"pair pair-0002: {message}"):
        pairs[0]


def test_an_unpaired_row_has_one_response(write_weights, rows) -> None:
    """Also with the top k: nothing at all on the other side."""
    top = {
        f"{side}_ref_top_{name}": [1, 2] * len(rows[0][f"{side}_ids"]) for side in SIDES for name in ("ids", "logps")
    }
    row = rows[0] | {name: values if "ids" in name else [-1.0] * len(values) for name, values in top.items()}
    row |= {f"chosen_{name}": [] for name in ("ids", "token_weights", "ref_logps", "ref_top_ids", "ref_top_logps")}
    pair = open_pairs(write_weights([row]), with_ref_top=True)[0]
    assert pair.rejected.ref_top_ids.shape == (len(row["rejected_ids"]), 2)
    assert pair.chosen.ref_top_ids.shape == (0, 2)
    assert pair.swapped().chosen.ids.tolist() == row["rejected_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chosen_score": None},
            "chosen_score is null .*; build the dataset again from pairs that carry both annotator scores",
        ),
        (
            {"rejected_ref_top_ids": None},
            "rejected_ref_top_ids is null .*; build the dataset again with score.top_k above 0",
        ),
        ({"chosen_ref_top_logps": []}, "0 chosen_ref_top_logps for [0-9]+ chosen_ids, expected 3 for each"),
        ({"rejected_ref_top_ids": [1] * 4}, "4 rejected_ref_top_ids for [0-9]+ rejected_ids, expected 3 for each"),
        ({"chosen_score": math.nan}, "chosen_score is nan, expected a finite number"),
        ({"pair_weight": -0.5}, "pair_weight is -0.5, expected a finite number >= 0"),
        ({"pair_weight": math.inf}, "pair_weight is inf, expected a finite number >= 0"),
    ],
)
def test_optional_columns_that_do_not_fit_are_refused(write_weights, rows, changes, message) -> None:
    pairs = open_pairs(write_weights(damage(add_optional(rows), 6, **changes)), with_ref_top=True, with_scores=True)
    with pytest.raises(MismatchError, match=rf"pair pair-0006: {message}"):
        pairs[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"anchor_ids": None},
            r"anchor_ids is null \(.*\); build the dataset again with an \[anchors\] section in the recipe "
            r"\(`tokenweights build RECIPE --set anchors.seed=0`\), or train with loss.anchor='online'",
        ),
        ({"anchor_ref_logps": None}, "anchor_ref_logps is null .*anchors.seed=0"),
        ({"anchor_ids": []}, "anchor_ids is empty"),
        ({"anchor_ids": [128]}, r"anchor_ids\[0\] is 128, expected an id in 0..127 "),
        ({"anchor_ref_logps": [-1.0, -1.0]}, "2 anchor_ref_logps for 1 anchor_ids"),
        ({"anchor_ref_logps": [math.nan]}, r"anchor_ref_logps\[0\] is nan, expected a finite number <= 0"),
        ({"anchor_ref_logps": [0.25]}, r"anchor_ref_logps\[0\] is 0.25, expected a finite number <= 0"),
    ],
)
def test_anchors_that_do_not_fit_are_refused_where_they_are_asked_for(write_weights, rows, changes, message) -> None:
    uri = write_weights(damage(add_anchors(rows), 6, **changes))
    assert open_pairs(uri)[6].anchor is None
    with pytest.raises(MismatchError, match=rf"pair pair-0006: {message}"):
        open_pairs(uri, with_anchors=True)[6]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("chosen_ref_top_ids", 128, r"is 128, expected an id in 0..127 "),
        ("rejected_ref_top_ids", -1, r"is -1, expected an id in 0..127 "),
        ("chosen_ref_top_logps", -math.inf, "is -inf, expected a finite number"),
        ("rejected_ref_top_logps", 0.25, "is 0.25, expected a finite number <= 0"),
        ("chosen_ref_logps", 0.25, "is 0.25, expected a finite number <= 0"),
    ],
)
def test_one_bad_value_in_a_list_is_refused(write_weights, rows, column, value, message) -> None:
    rows = add_optional(rows)
    values = [*rows[6][column][:-1], value]
    pairs = open_pairs(write_weights(damage(rows, 6, **{column: values})), with_ref_top=True)
    with pytest.raises(MismatchError, match=rf"pair pair-0006: {column}\[{len(values) - 1}\] {message}"):
        pairs[0]


def test_opening_reads_no_shard_unless_a_split_is_counted(small_groups, write_weights, rows, monkeypatch) -> None:
    uri = write_weights(rows)
    opened: list[str] = []
    ordinary = ShardReader.__init__
    monkeypatch.setattr(
        ShardReader,
        "__init__",
        lambda self, folder, record, *rest: (opened.append(record.name), ordinary(self, folder, record, *rest))[1],
    )
    assert len(open_pairs(uri, max_pairs=30)) == 30
    assert opened == []
    open_pairs(uri, split="test")
    assert len(opened) == 1


def test_a_shard_whose_row_groups_are_not_the_recorded_ones_is_refused(small_groups, store) -> None:
    pairs = open_pairs(store)
    (sizes,) = pairs.group_sizes
    wrong = [sizes[0] + 1, sizes[1] - 1, *sizes[2:]]
    pairs._records = [dataclasses.replace(record, group_sizes=wrong) for record in pairs._records]
    with pytest.raises(DamageError, match="is not the file that was committed: its footer's checksums or rows differ"):
        pairs[0]


def test_sample_is_fixed_and_holds_no_pair_twice(small_groups, store) -> None:
    sample = [pair.pair_id for pair in sample_pairs(open_pairs(store), 25)]
    assert sample == [pair.pair_id for pair in sample_pairs(open_pairs(store), 25)]
    assert len(set(sample)) == 25
    assert len(sample_pairs(open_pairs(store), 256)) == 40


def make_constant(rows: list[dict]) -> list[dict]:
    ones = [{f"{s}_token_weights": [1.0] * len(r[f"{s}_ids"]) for s in ("chosen", "rejected")} for r in rows]
    return [row | weights for row, weights in zip(rows, ones, strict=True)]


def test_constant_weights_are_refused_when_seen_and_when_recorded(write_weights, rows) -> None:
    match = "loss.name='(tis_dpo|sepo)' needs token weights that differ, but all weights of toy/tis@[01] are equal"
    seen = open_pairs(write_weights(make_constant(rows)))
    with pytest.raises(MismatchError, match=match):
        check_weights_vary(seen.source, sample_pairs(seen, 10), "tis_dpo")
    recorded = open_pairs(write_weights(rows, statistics={"constant_weights": True}))
    with pytest.raises(MismatchError, match=match):
        check_weights_vary(recorded.source, sample_pairs(recorded, 10), "sepo")


def test_varying_weights_pass(store) -> None:
    pairs = open_pairs(store)
    check_weights_vary(pairs.source, sample_pairs(pairs, 10), "tis_dpo")
