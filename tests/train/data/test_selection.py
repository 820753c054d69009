"""Which pairs are trained on and which are held out."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from train.config import DataConfig, EvalSection
from train.data.dataset import PairDataset, open_weights
from train.data.selection import Selection, is_held_out
from weights_store.schemas import WEIGHTS

IDS = [
    hashlib.sha256(f"{i // 3}".encode()).hexdigest()[:12] + f"{i:020x}" for i in range(10_000)
]  # three pairs a prompt


def rows_of(splits: list[str]) -> pa.Table:
    return pa.table({"pair_id": IDS[: len(splits)], "split": splits})


def test_a_split_keeps_its_own_rows() -> None:
    rows = rows_of(["train", "test", "train", "dev"])
    assert Selection("train").keeps(rows).tolist() == [True, False, True, False]
    assert Selection("test").keeps(rows).tolist() == [False, True, False, False]
    assert Selection("other").keeps(rows).tolist() == [False] * 4
    assert Selection().keeps(rows).tolist() == [True] * 4


def test_only_columns_that_are_looked_at_are_read() -> None:
    assert Selection(max_pairs=3).columns == []
    assert Selection("train").columns == ["split"]
    assert Selection(share=0.1).columns == ["pair_id"]
    assert Selection("train", 0.1).columns == ["split", "pair_id"]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_held_out_is_the_one_asked_for(share: float) -> None:
    held_out = np.array([is_held_out(pair_id, share) for pair_id in IDS])
    # 3,334 prompts: a standard deviation of sqrt(share (1 - share) / 3,334); within four of them
    assert abs(held_out.mean() - share) < 4 * np.sqrt(share * (1 - share) / 3334)


def test_a_prompt_falls_on_one_side_with_all_its_pairs() -> None:
    sides: dict[str, set[bool]] = {}
    for pair_id in IDS:
        sides.setdefault(pair_id[:12], set()).add(is_held_out(pair_id, 0.3))
    assert len(sides) == 3334
    assert all(len(side) == 1 for side in sides.values())


def test_training_and_held_out_pairs_are_all_pairs_and_share_none() -> None:
    rows = rows_of(["train", "test"] * 500)
    training = Selection("train", 0.2).keeps(rows)
    held_out = Selection("train", 0.2, held_out=True).keeps(rows)
    assert not (training & held_out).any()
    assert (training | held_out).tolist() == [True, False] * 500
    assert 50 < held_out.sum() < 150


def test_a_larger_share_holds_out_the_same_prompts_and_more() -> None:
    for pair_id in IDS[:1000]:
        assert is_held_out(pair_id, 0.4) or not is_held_out(pair_id, 0.2)
    assert not any(is_held_out(pair_id, 0.0) for pair_id in IDS)


def test_who_is_held_out_does_not_change_between_releases() -> None:
    """blake2b-64 of the first twelve digits, big-endian, as a share of 2^64."""
    # printf 000000000000 | b2sum -l 64 gives 3bf782b8…, and 0x3bf7 / 2^16 = 15351 / 65536 = 0.2342
    assert [is_held_out("000000000000" + "f" * 20, share) for share in (0.234, 0.235)] == [False, True]


def test_more_pairs_in_a_later_version_leave_the_sides_as_they_were(write_weights, rows) -> None:
    named = [{**row, "pair_id": IDS[3 * i]} for i, row in enumerate(rows)]
    held_out = []
    for part in (named[:25], named[::-1]):
        config = DataConfig(store=write_weights(part), weights="toy/tis")
        selection = Selection.for_evaluation(config, EvalSection(share=0.3))
        pairs = PairDataset(open_weights(config), config, vocab_size=128, selection=selection)
        held_out.append({pairs[row].pair_id for row in range(len(pairs))})
    assert 2 <= len(held_out[0]) < 20
    first = {row["pair_id"] for row in named[:25]}
    assert held_out[1] & first == held_out[0]


def test_the_config_says_which_rows_are_which() -> None:
    data = DataConfig(store="x", weights="y", split="train", max_pairs=7)
    assert Selection.for_training(data, EvalSection(share=0.2)) == Selection("train", 0.2, max_pairs=7)
    assert Selection.for_evaluation(data, EvalSection(share=0.2)) == Selection("train", 0.2, held_out=True)
    assert Selection.for_evaluation(data, EvalSection(split="test")) == Selection("test", held_out=True)
    assert Selection.for_training(data, EvalSection()) == Selection("train", max_pairs=7)


def test_a_message_names_the_selection() -> None:
    assert str(Selection()) == "any split"
    assert str(Selection("dev")) == "split 'dev'"
    assert str(Selection("dev", 0.1, held_out=True)) == "split 'dev', held out (share 0.1)"
    assert str(Selection(share=0.1)) == "any split, not held out (share 0.1)"


def test_the_hash_is_of_the_prompt_as_the_store_has_it() -> None:
    """The digits that are looked at are those that `pair_id` takes from the prompt alone."""
    from pipeline.source.pairs import Pair

    prompt = [{"role": "user", "content": "Why?"}]
    first, second = (Pair(prompt, chosen, "no").pair_id for chosen in ("yes", "perhaps"))
    assert first != second
    assert first[:12] == second[:12]
    assert WEIGHTS.field("pair_id").type == pa.string()
