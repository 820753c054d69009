import pickle

import numpy as np
import pytest

from train.sampler import BlockShuffle, StepBatches

SIZES = [7, 1, 12, 5, 9, 3, 8]  # 45 rows


def epoch_rows(order: BlockShuffle, epoch: int) -> list[int]:
    return [order.row(epoch, position) for position in range(order.num_rows)]


@pytest.mark.parametrize("window_groups", [1, 2, 3, 100])
def test_every_epoch_is_a_permutation(window_groups: int) -> None:
    order = BlockShuffle(SIZES, seed=3, window_groups=window_groups)
    for epoch in range(3):
        assert sorted(epoch_rows(order, epoch)) == list(range(45))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = [epoch_rows(BlockShuffle(SIZES, seed=s), e) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_rows(BlockShuffle(SIZES, seed=1), 1) == orders[3]


def test_any_position_can_be_asked_for_alone_and_in_any_order() -> None:
    expected = epoch_rows(BlockShuffle(SIZES, seed=5, window_groups=2), 4)
    for position in (44, 0, 17, 3):
        assert BlockShuffle(SIZES, seed=5, window_groups=2).row(4, position) == expected[position]


def test_positions_go_on_over_epochs() -> None:
    order = BlockShuffle(SIZES, seed=0)
    assert order.rows(range(40, 95)) == (epoch_rows(order, 0) + epoch_rows(order, 1) + epoch_rows(order, 2))[40:95]
    with pytest.raises(IndexError, match="position 45 is outside an epoch of 45 rows"):
        order.row(0, 45)


def test_rows_stay_within_their_window_of_groups() -> None:
    order = BlockShuffle(SIZES, seed=0, window_groups=2)
    group_of_row = np.repeat(np.arange(len(SIZES)), SIZES)
    groups = [int(group_of_row[row]) for row in epoch_rows(order, 0)]
    first_seen = list(dict.fromkeys(groups))
    for window in range(0, 7, 2):
        pair = first_seen[window : window + 2]
        places = [place for place, group in enumerate(groups) if group in pair]
        assert places == list(range(places[0], places[0] + len(places)))  # nothing else comes in between


def test_rows_of_a_window_are_mixed() -> None:
    rows = epoch_rows(BlockShuffle([200, 200], seed=0), 0)
    from_first_group = sum(row < 200 for row in rows[:100])
    assert 30 < from_first_group < 70  # 50 expected, standard deviation 4.4


def test_empty_groups_are_skipped() -> None:
    assert sorted(epoch_rows(BlockShuffle([0, 3, 0, 0, 2, 0], seed=1, window_groups=1), 0)) == [0, 1, 2, 3, 4]


def test_order_survives_pickling_to_a_worker() -> None:
    order = BlockShuffle(SIZES, seed=9)
    epoch_rows(order, 0)
    assert epoch_rows(pickle.loads(pickle.dumps(order)), 1) == epoch_rows(order, 1)


def test_order_is_the_recorded_one() -> None:
    """Golden: a change here breaks the resume of runs that are under way."""
    assert epoch_rows(BlockShuffle([3, 2, 4], seed=0, window_groups=2), 0) == GOLDEN


GOLDEN = [3, 4, 8, 6, 5, 7, 1, 0, 2]


def positions_of_step(world_size: int, step: int, **sizes: int) -> list[int]:
    ranks = [StepBatches(50, rank=r, world_size=world_size, **sizes) for r in range(world_size)]
    return [position for batches in ranks for batch in batches.batches_of_step(step) for position in batch]


@pytest.mark.parametrize("pairs_per_batch", [1, 3, 4, 12])
def test_a_step_holds_the_same_pairs_for_any_number_of_ranks(pairs_per_batch: int) -> None:
    for step in range(4):
        expected = list(range(step * 12, step * 12 + 12))
        for world_size in (1, 2, 3, 4):
            got = positions_of_step(world_size, step, pairs_per_step=12, pairs_per_batch=pairs_per_batch)
            assert got == expected


def test_the_last_step_holds_the_rest_and_serves_all_ranks_equally() -> None:
    sizes = {"pairs_per_step": 12, "pairs_per_batch": 4}
    assert positions_of_step(1, 4, **sizes) == [48, 49]
    assert positions_of_step(4, 4, **sizes) == [48, 49, 50, 51]  # 50 and 51 are the first of the next epoch


def test_one_rank_sees_every_pair_of_two_epochs_twice() -> None:
    order = BlockShuffle(SIZES, seed=0)
    batches = StepBatches(90, pairs_per_step=16, pairs_per_batch=5)
    rows = [row for batch in batches for row in order.rows(batch)]
    assert sorted(rows) == sorted([*range(45), *range(45)])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_positions", [1, 12, 13, 50])
def test_length_counts_the_micro_batches(world_size: int, num_positions: int) -> None:
    for rank in range(world_size):
        batches = StepBatches(num_positions, pairs_per_step=12, pairs_per_batch=2, rank=rank, world_size=world_size)
        assert len(list(batches)) == len(batches)
        assert all(0 < len(batch) <= 2 for batch in batches)
