"""Laws of the whole way from positions to pairs: order, completeness, resume, for any number of ranks and workers."""

import pickle
from collections import Counter
from itertools import islice, pairwise

import pyarrow as pa
import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from train.config import DataConfig
from train.data.dataset import OrderedPairs, Pair, PairDataset, open_weights
from train.data.sampler import BlockShuffle, StepBatches
from weights_store import WeightStore
from weights_store.schemas import WEIGHTS

RANKS = (1, 2, 3, 4, 8)
SIZES = (1, 7, 40, 41, 97)


def all_ranks(num_positions: int, world_size: int, pairs_per_step: int) -> list[StepBatches]:
    return [
        StepBatches(num_positions, pairs_per_step=pairs_per_step, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


@st.composite
def trainings(draw: st.DrawFn) -> tuple[list[list[int]], int, int, int, int]:
    """Row groups by shard, epochs, ranks, pairs per step and a seed."""
    num_rows = draw(st.sampled_from(SIZES))
    cuts = sorted(draw(st.sets(st.integers(1, num_rows), max_size=12)) | {0, num_rows})
    sizes = [end - begin for begin, end in pairwise(cuts)]
    per_shard = draw(st.integers(1, 5))
    shards = [sizes[begin : begin + per_shard] for begin in range(0, len(sizes), per_shard)]
    world_size = draw(st.sampled_from(RANKS))
    return (
        shards,
        draw(st.integers(1, 3)),
        world_size,
        world_size * draw(st.integers(1, 5)),
        draw(st.integers(0, 2**40)),
    )


@given(trainings())
@settings(max_examples=150, deadline=None)
def test_every_row_comes_once_an_epoch_and_every_rank_has_equally_many(training) -> None:
    shards, num_epochs, world_size, pairs_per_step, seed = training
    order = BlockShuffle(shards, seed=seed, window_groups=2, block_groups=4)
    num_positions = num_epochs * order.num_rows
    trained: list[int] = []
    fillers = 0
    for step, parts in enumerate(zip(*all_ranks(num_positions, world_size, pairs_per_step), strict=True)):
        assert len({len(part) for part in parts}) == 1
        positions = [position for part in parts for position in part]
        real = [position for position in positions if position < num_positions]
        assert real == list(range(step * pairs_per_step, min((step + 1) * pairs_per_step, num_positions)))
        trained += order.rows(real)
        fillers += len(positions) - len(real)
    assert fillers < world_size
    for epoch in range(num_epochs):
        one_epoch = trained[epoch * order.num_rows : (epoch + 1) * order.num_rows]
        assert sorted(one_epoch) == list(range(order.num_rows))


@given(trainings(), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_the_order_depends_on_seed_and_epoch_only(training, other_seed) -> None:
    shards, _, _, _, seed = training
    order = BlockShuffle(shards, seed=seed, window_groups=2, block_groups=4)
    n = order.num_rows
    epochs = [order.rows(range(epoch * n, epoch * n + n)) for epoch in range(3)]
    again = BlockShuffle(shards, seed=seed, window_groups=2, block_groups=4)
    assert [again.rows([epoch * n + i])[0] for epoch in (2, 0) for i in range(n)] == epochs[2] + epochs[0]
    if sum(len(sizes) for sizes in shards) == 1 and n > 20:  # 20! orders: no two alike by chance
        other = BlockShuffle(shards, seed=other_seed).rows(range(n))
        assert len({tuple(rows) for rows in (*epochs, other)}) == (3 if other == epochs[0] else 4)
        assert (other == epochs[0]) == (seed == other_seed)


@pytest.fixture(scope="module")
def store_of_three_shards(rows, tmp_path_factory: pytest.TempPathFactory) -> str:
    """39 pairs in many row groups of three shards."""
    uri = str(tmp_path_factory.mktemp("laws") / "store")
    table = WeightStore(uri).table("weights/toy/tis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 2000)
        for part in (rows[:20], rows[20:27], rows[27:39]):
            table.append(pa.Table.from_pylist(part, WEIGHTS), {"fingerprint": "0" * 64})
    return uri


@pytest.fixture
def pairs(store_of_three_shards) -> PairDataset:
    config = DataConfig(store=store_of_three_shards, weights="toy/tis")
    return PairDataset(open_weights(config), config, vocab_size=128)


def ordered(pairs: PairDataset, num_positions: int, seed: int = 4) -> OrderedPairs:
    order = BlockShuffle(pairs.group_sizes, seed=seed, window_groups=4, block_groups=6)
    return OrderedPairs(pairs, order, num_positions)


def load_as_workers(dataset: OrderedPairs, batches: StepBatches, num_workers: int) -> list[list[Pair]]:
    """What a DataLoader hands out: batch i comes from worker i modulo their number, each with its own copy of the dataset."""
    copies = [pickle.loads(pickle.dumps(dataset)) for _ in range(num_workers)] or [dataset]
    return [[copies[i % len(copies)][position] for position in batch] for i, batch in enumerate(batches)]


def ids_of_steps(ranks: list[list[list[Pair]]]) -> list[str]:
    """The real pairs of all ranks, step by step."""
    return [pair.pair_id for parts in zip(*ranks, strict=True) for part in parts for pair in part if not pair.is_filler]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", RANKS)
def test_ranks_and_workers_do_not_change_what_is_trained_on(pairs, world_size, num_workers) -> None:
    num_positions = 2 * 39  # two epochs; the last of 10 steps of 8, or of 4 steps of 24, holds 6
    dataset = ordered(pairs, num_positions)
    batches = all_ranks(num_positions, world_size, 24 if world_size == 3 else 8)
    ranks = [load_as_workers(dataset, of_rank, num_workers) for of_rank in batches]
    expected = [f"pair-{row:04d}" for row in dataset.order.rows(range(num_positions))]
    assert ids_of_steps(ranks) == expected
    assert set(Counter(expected).values()) == {2}
    fillers = [pair for steps in ranks for step in steps for pair in step if pair.is_filler]
    assert len(fillers) == {1: 0, 2: 0, 3: 0, 4: 2, 8: 2}[world_size]  # 6 pairs for 4 ranks: two each
    assert {pair.pair_id for pair in fillers} <= {expected[-1]}


def test_real_workers_hand_out_the_same_pairs_in_the_same_order(pairs) -> None:
    dataset = ordered(pairs, 50)
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(50, pairs_per_step=12, rank=1, world_size=4),
        num_workers=2,
        collate_fn=list,
        multiprocessing_context="spawn",  # as the trainer does
    )
    got = [[(pair.pair_id, pair.is_filler) for pair in batch] for batch in loader]
    here = [[dataset[position] for position in range(12 * step + 3, 12 * step + 6)] for step in range(4)]
    here.append([dataset[49]])  # the last step has 50 - 48 = 2 pairs, one for each of ranks 0 and 1
    assert got == [[(pair.pair_id, False) for pair in batch] for batch in here]


@pytest.mark.parametrize("done", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_the_rest_and_reads_nothing_of_what_was_done(pairs, monkeypatch, done, num_workers) -> None:
    read: set[int] = set()
    ordinary = PairDataset.read_group
    monkeypatch.setattr(PairDataset, "read_group", lambda self, group: (read.add(group), ordinary(self, group))[1])
    num_positions = 2 * 39
    dataset = ordered(pairs, num_positions)
    batches = StepBatches(num_positions, pairs_per_step=8)
    loader = skip_first_batches(DataLoader(dataset, batch_sampler=batches, collate_fn=list), done)
    left = range(8 * done, num_positions)
    rows = dataset.order.rows(left)
    if num_workers:  # the trainer's loader with the positions that are left, see above for how workers share them
        rest = [range(begin, min(begin + 8, num_positions)) for begin in left[::8]]
        got = [pair.pair_id for batch in load_as_workers(dataset, rest, num_workers) for pair in batch]
    else:
        got = [pair.pair_id for batch in loader for pair in batch]
    assert got == [f"pair-{row:04d}" for row in rows]
    ends = pairs._ends
    assert read == {int((ends <= row).sum()) for row in rows}


def test_a_rank_without_a_pair_in_the_last_step_reads_no_more_for_its_filler(pairs, monkeypatch) -> None:
    dataset = ordered(pairs, 39)
    for position in range(36, 39):
        dataset[position]
    monkeypatch.setattr(pairs, "read_group", lambda group: pytest.fail(f"row group {group} was read"))
    filler = dataset[45]
    assert (filler.pair_id, filler.is_filler) == (dataset[38].pair_id, True)
    assert not dataset[38].is_filler


def test_two_trainings_share_one_dataset_at_two_versions(small_groups, write_weights, rows) -> None:
    uri = write_weights(rows[:30])
    changed = [row | {"chosen_token_weights": [2.0] * len(row["chosen_ids"])} for row in rows]
    write_weights(changed)
    loaders = []
    for version in (0, 1):
        config = DataConfig(store=uri, weights=f"toy/tis@{version}")
        pairs = PairDataset(open_weights(config), config, vocab_size=128)
        loaders.append(iter([ordered(pairs, len(pairs))[position] for position in range(len(pairs))]))
    old, new = [], []
    while len(old) + len(new) < 70:  # in turns
        old += islice(loaders[0], 3)
        new += islice(loaders[1], 4)
    assert sorted(pair.pair_id for pair in old) == [row["pair_id"] for row in rows[:30]]
    assert sorted(pair.pair_id for pair in new) == [row["pair_id"] for row in rows]
    assert all((pair.chosen.token_weights == 2.0).all() for pair in new)
    assert not any((pair.chosen.token_weights == 2.0).all() for pair in old)


def test_two_seeds_and_two_epochs_have_orders_of_their_own(pairs) -> None:
    orders = [
        tuple(ordered(pairs, 78, seed)[position].pair_id for position in range(39 * epoch, 39 * epoch + 39))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert len({frozenset(order) for order in orders}) == 1
