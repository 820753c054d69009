import numpy as np
import torch

from train.collate import PairCollator
from train.dataset import Pair, StoredResponse


def stored(ids: list[int], weights: list[float], ref_logps: list[float]) -> StoredResponse:
    return StoredResponse(np.array(ids, np.int32), np.array(weights, np.float32), np.array(ref_logps, np.float32))


PAIRS = [
    Pair("a", np.array([11, 12], np.int32), stored([21, 2], [0.5, 1.5], [-1, -2]), stored([31], [2.0], [-3])),
    # a pad id and an EOS inside the text are tokens like any other
    Pair("b", np.array([13], np.int32), stored([0], [0.25], [-4]), stored([2, 0, 2], [1, 2, 3], [-5, -6, -7])),
]


def test_a_batch_by_hand() -> None:
    batch = PairCollator()(PAIRS)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2], [13, 0, 0, 0], [11, 12, 31, 0], [13, 2, 0, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 4
    assert batch["completion_mask"].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch["token_weights"].tolist() == [[0, 0, 0.5, 1.5], [0, 0.25, 0, 0], [0, 0, 2, 0], [0, 1, 2, 3]]
    assert batch["ref_logps"].tolist() == [[0, 0, -1, -2], [0, -4, 0, 0], [0, 0, -3, 0], [0, -5, -6, -7]]


def test_sides_come_back_as_they_went_in() -> None:
    collator = PairCollator()
    batch = collator(PAIRS)
    chosen, rejected = collator.split_sides(batch, torch.arange(16.0).reshape(4, 4))
    assert collator.num_pairs(batch) == 2
    assert chosen.policy_logps.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chosen.token_weights.tolist() == [[0, 0, 0.5, 1.5], [0, 0.25, 0, 0]]
    assert rejected.ref_logps.tolist() == [[0, 0, -3, 0], [0, -5, -6, -7]]


def test_rejected_can_be_left_out() -> None:
    collator = PairCollator(with_rejected=False)
    batch = collator(PAIRS)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2], [13, 0, 0, 0]]
    chosen, rejected = collator.split_sides(batch, torch.zeros(2, 4))
    assert len(chosen.policy_logps) == 2
    assert rejected is None
