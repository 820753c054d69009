import copy
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from train.collate import PairCollator
from train.config import DataConfig
from train.dataset import OrderedPairs, PairDataset, check_weights_vary, open_weights, sample_pairs
from train.sampler import BlockShuffle, StepBatches
from weights_store import WeightStore
from weights_store.errors import DamageError, MismatchError, NotFoundError, SettingsError
from weights_store.schemas import WEIGHTS


def open_pairs(uri: str, weights: str = "toy/tis", vocab_size: int = 128, **config) -> PairDataset:
    data = DataConfig(store=uri, weights=weights, **config)
    return PairDataset(open_weights(data), data, vocab_size=vocab_size)


def ids_of(pairs: PairDataset) -> list[str]:
    return [pairs[row].pair_id for row in range(len(pairs))]


def test_rows_come_back_as_they_were_stored(small_groups, store, rows) -> None:
    pairs = open_pairs(store)
    assert len(pairs.group_sizes) > 3
    assert sum(pairs.group_sizes) == len(pairs) == 40
    for i in (39, 0, 17, 16, 39):
        pair = pairs[i]
        assert (pair.pair_id, pair.prompt_ids.tolist()) == (rows[i]["pair_id"], rows[i]["prompt_ids"])
        for side in ("chosen", "rejected"):
            response = getattr(pair, side)
            assert response.ids.tolist() == rows[i][f"{side}_ids"]
            # the store keeps 12 bits of mantissa
            assert response.token_weights == pytest.approx(rows[i][f"{side}_token_weights"], rel=1.3e-4)
            assert response.ref_logps == pytest.approx(rows[i][f"{side}_ref_logps"], rel=1.3e-4)


def test_swap_exchanges_sides_with_weights_and_reference(store) -> None:
    plain, swapped = open_pairs(store)[5], open_pairs(store, swap=True)[5]
    assert swapped.pair_id == plain.pair_id
    for ours, theirs in ((swapped.chosen, plain.rejected), (swapped.rejected, plain.chosen)):
        for field in ("ids", "token_weights", "ref_logps"):
            assert np.array_equal(getattr(ours, field), getattr(theirs, field))


def test_split_and_max_pairs_choose_rows_in_stored_order(small_groups, store, rows) -> None:
    test_rows = [row["pair_id"] for row in rows if row["split"] == "test"]
    assert len(test_rows) == 10
    assert ids_of(open_pairs(store, split="test")) == test_rows
    assert ids_of(open_pairs(store, split="test", max_pairs=7)) == test_rows[:7]
    assert ids_of(open_pairs(store, max_pairs=11)) == [row["pair_id"] for row in rows[:11]]
    assert len(open_pairs(store, max_pairs=1000)) == 40


def test_unknown_split_is_refused(store) -> None:
    with pytest.raises(NotFoundError, match=r"toy/tis@0 has no pair with split 'dev'; leave data.split empty"):
        open_pairs(store, split="dev")


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
        open_pairs(uri)


def test_cache_reads_a_group_once_and_holds_a_window(small_groups, store, monkeypatch) -> None:
    pairs = open_pairs(store)
    reads = []
    ordinary = pairs._read_group
    monkeypatch.setattr(pairs, "_read_group", lambda group: (reads.append(group), ordinary(group))[1])
    order = BlockShuffle(pairs.group_sizes, seed=0)
    for position in range(40):
        OrderedPairs(pairs, order)[position]
    assert len(reads) == len(pairs.group_sizes)
    pairs.cache_groups = 1
    pairs._cache.clear()
    for row in (0, 39, 0):
        pairs[row]
    assert len(pairs._cache) == 1
    assert len(reads) == len(pairs.group_sizes) + 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_do_not_change_the_order_and_skipping_reads_nothing(small_groups, store, num_workers) -> None:
    pairs = open_pairs(store)
    order = BlockShuffle(pairs.group_sizes, seed=4)
    loader = DataLoader(
        OrderedPairs(pairs, order),
        batch_sampler=StepBatches(60, pairs_per_step=8, pairs_per_batch=4),
        num_workers=num_workers,
        collate_fn=list,
        multiprocessing_context="spawn" if num_workers else None,  # as the trainer does
    )
    got = [pair.pair_id for batch in loader for pair in batch]
    assert got == [f"pair-{row:04d}" for row in order.rows(range(60))]
    if num_workers == 0:
        from accelerate import skip_first_batches

        pairs._cache.clear()
        rest = iter(skip_first_batches(loader, 9))
        assert [pair.pair_id for pair in next(rest)] == [f"pair-{row:04d}" for row in order.rows(range(36, 40))]
        assert len(pairs._cache) <= 4  # the four rows of this batch


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
        match=rf"pair pair-0006, {side}: {num_tokens - 1} {column} for {num_tokens} response tokens "
        r"\(toy/tis@0, shard .*\.parquet\); rebuild",
    ):
        pairs[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(write_weights, rows, bad) -> None:
    values = [*rows[6]["rejected_token_weights"][:-1], bad]
    pairs = open_pairs(write_weights(damage(rows, 6, rejected_token_weights=values)))
    with pytest.raises(MismatchError, match="pair pair-0006, rejected: rejected_token_weights holds NaN or infinity"):
        pairs[0]


def test_an_id_outside_the_vocabulary_is_refused(write_weights, rows) -> None:
    pairs = open_pairs(write_weights(damage(rows, 7, prompt_ids=[1, 128])))
    with pytest.raises(MismatchError, match=r"pair pair-0007: prompt_ids goes up to 128, .* vocabulary has 128 ids"):
        pairs[0]


def test_a_bad_row_of_another_split_does_not_matter(write_weights, rows) -> None:
    uri = write_weights(damage(rows, 7, prompt_ids=[1, 128]))  # row 7 is in split test
    assert len(open_pairs(uri, split="train")[0].prompt_ids) > 0


@pytest.mark.parametrize("name", ["prompt_ids", "chosen_ids"])
def test_empty_parts_are_refused(write_weights, rows, name) -> None:
    pairs = open_pairs(write_weights(damage(rows, 2, **{name: []})))
    with pytest.raises(MismatchError, match=f"pair pair-0002: {name} is empty"):
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
    match = "loss.name='tis_dpo' needs token weights that differ, but all weights of toy/tis@[01] are equal"
    seen = open_pairs(write_weights(make_constant(rows)))
    with pytest.raises(MismatchError, match=match):
        check_weights_vary(seen.source, sample_pairs(seen, 10))
    recorded = open_pairs(write_weights(rows, statistics={"constant_weights": True}))
    with pytest.raises(MismatchError, match=match):
        check_weights_vary(recorded.source, sample_pairs(recorded, 10))


def test_varying_weights_pass(store) -> None:
    pairs = open_pairs(store)
    check_weights_vary(pairs.source, sample_pairs(pairs, 10))


def test_collating_a_dataset_keeps_pairs_together(store, rows) -> None:
    batch = PairCollator()([open_pairs(store)[row] for row in (3, 8)])
    for place, (row, side) in enumerate([(3, "chosen"), (8, "chosen"), (3, "rejected"), (8, "rejected")]):
        ids = rows[row]["prompt_ids"] + rows[row][f"{side}_ids"]
        assert batch["input_ids"][place][: len(ids)].tolist() == ids
