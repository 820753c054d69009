import pickle

import numpy as np
import pytest

from train.data.sampler import BlockShuffle, StepBatches

SIZES = [[7, 1, 12], [5], [9, 3, 8]]  # row groups of three shards, 45 rows


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
    group_of_row = np.repeat(np.arange(7), [size for shard in SIZES for size in shard])
    groups = [int(group_of_row[row]) for row in epoch_rows(order, 0)]
    first_seen = list(dict.fromkeys(groups))
    for window in range(0, 7, 2):
        pair = first_seen[window : window + 2]
        places = [place for place, group in enumerate(groups) if group in pair]
        assert places == list(range(places[0], places[0] + len(places)))  # nothing else comes in between


def test_rows_of_a_window_are_mixed() -> None:
    rows = epoch_rows(BlockShuffle([[200, 200]], seed=0), 0)
    from_first_group = sum(row < 200 for row in rows[:100])
    assert 30 < from_first_group < 70  # 50 expected, standard deviation 4.4


def test_empty_groups_are_skipped() -> None:
    assert sorted(epoch_rows(BlockShuffle([[0, 3], [0, 0, 2], [0]], seed=1, window_groups=1), 0)) == [0, 1, 2, 3, 4]


def test_order_survives_pickling_to_a_worker() -> None:
    order = BlockShuffle(SIZES, seed=9)
    epoch_rows(order, 0)
    assert epoch_rows(pickle.loads(pickle.dumps(order)), 1) == epoch_rows(order, 1)


def test_order_is_the_recorded_one() -> None:
    """Golden: a change here breaks the resume of runs that are under way."""
    assert epoch_rows(BlockShuffle([[3, 2, 4]], seed=0, window_groups=2), 0) == GOLDEN


GOLDEN = [3, 4, 8, 6, 5, 7, 1, 0, 2]


@pytest.mark.parametrize("block_groups", [1, 4, 6])
def test_shards_of_a_block_are_left_before_those_of_the_next_come(block_groups: int) -> None:
    # Six shards of 2 row groups of 3 rows. A shard belongs to the block in which its first group falls.
    order = BlockShuffle([[3, 3]] * 6, seed=1, block_groups=block_groups, window_groups=1)
    shards_per_block = -(-block_groups // 2)
    for epoch in range(2):
        shards = [row // 6 for row in epoch_rows(order, epoch)]
        blocks = [set(shards[begin : begin + 6 * shards_per_block]) for begin in range(0, 36, 6 * shards_per_block)]
        assert [len(block) for block in blocks] == [shards_per_block] * (6 // shards_per_block)


def test_shards_of_a_block_are_mixed() -> None:
    shards = [row // 100 for row in epoch_rows(BlockShuffle([[1] * 100] * 2, seed=0, window_groups=1), 0)]
    assert 35 < sum(shards[:100]) < 65  # 50 expected, standard deviation 3.5


def test_the_order_of_shards_differs_between_epochs() -> None:
    order = BlockShuffle([[1]] * 20, seed=0, block_groups=1)
    assert len({tuple(epoch_rows(order, epoch)) for epoch in range(5)}) == 5


def steps_of_ranks(num_positions: int, world_size: int, pairs_per_step: int) -> list[tuple[range, ...]]:
    ranks = [
        StepBatches(num_positions, pairs_per_step=pairs_per_step, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return list(zip(*ranks, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_holds_the_same_positions_for_any_number_of_ranks(world_size: int) -> None:
    for step, parts in enumerate(steps_of_ranks(48, world_size, pairs_per_step=12)):
        assert [position for part in parts for position in part] == list(range(step * 12, step * 12 + 12))
        assert {len(part) for part in parts} == {12 // world_size}


def test_the_last_step_holds_the_rest_and_fillers_behind_it() -> None:
    assert steps_of_ranks(50, 1, pairs_per_step=12)[4] == (range(48, 50),)
    # 50 pairs to train on: positions 50 and 51 stand for none
    assert steps_of_ranks(50, 4, pairs_per_step=12)[4] == (range(48, 49), range(49, 50), range(50, 51), range(51, 52))


def test_length_counts_the_steps() -> None:
    for num_positions, num_steps in [(1, 1), (12, 1), (13, 2), (50, 5)]:
        assert len(StepBatches(num_positions, pairs_per_step=12, rank=1, world_size=3)) == num_steps
