from dataclasses import replace

import numpy as np
import torch

from train.collate import PairCollator
from train.dataset import Pair, StoredResponse
from train.logps import TokenTerms


def stored(ids: list[int], weights: list[float], ref_logps: list[float]) -> StoredResponse:
    return StoredResponse(np.array(ids, np.int32), np.array(weights, np.float32), np.array(ref_logps, np.float32))


PAIRS = [
    Pair("a", np.array([11, 12], np.int32), stored([21, 2], [0.5, 1.5], [-1, -2]), stored([31], [2.0], [-3])),
    # a pad id and an EOS inside the text are tokens like any other
    Pair("b", np.array([13], np.int32), stored([0], [0.25], [-4]), stored([2, 0, 2], [1, 2, 3], [-5, -6, -7])),
]


def test_a_batch_by_hand() -> None:
    batch = PairCollator(packed=False)(PAIRS)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2], [13, 0, 0, 0], [11, 12, 31, 0], [13, 2, 0, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 4
    assert batch["places"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert batch["completion_mask"].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch["token_weights"].tolist() == [[0, 0, 0.5, 1.5], [0, 0.25, 0, 0], [0, 0, 2, 0], [0, 1, 2, 3]]
    assert batch["ref_logps"].tolist() == [[0, 0, -1, -2], [0, -4, 0, 0], [0, 0, -3, 0], [0, -5, -6, -7]]


def test_a_packed_batch_by_hand() -> None:
    shared = Pair("c", np.array([14], np.int32), stored([41, 42], [1, 1], [-1, -1]), stored([41, 2], [1, 1], [-1, -1]))
    batch = PairCollator()([*PAIRS, shared])
    # a: prompt 11 12, chosen 21 2, rejected 31; b: 13, 0, then 2 0 2; c: 14 41 is common, then 42, and 2
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2, 31, 13, 0, 2, 0, 2, 14, 41, 42, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3, 0, 1, 2, 2]]
    assert batch["branch_ids"].tolist() == [[0, 0, 1, 1, 2, 3, 4, 5, 5, 5, 6, 6, 7, 8]]
    # chosen of a, b, c, then rejected; behind the end 0
    assert batch["places"].tolist() == [
        [0, 1, 2, 3], [5, 6, 0, 0], [10, 11, 12, 0], [0, 1, 4, 0], [5, 7, 8, 9], [10, 11, 13, 0],
    ]  # fmt: skip
    padded = PairCollator(packed=False)([*PAIRS, shared])
    mask = padded["completion_mask"]
    assert torch.equal(batch["completion_mask"], mask)
    found = [flat["input_ids"].flatten()[flat["places"]][mask] for flat in (batch, padded)]
    assert torch.equal(*found)


def test_a_response_that_begins_with_the_whole_other_one_is_packed() -> None:
    pair = Pair("d", np.array([5], np.int32), stored([6], [1], [-1]), stored([6, 7], [1, 1], [-1, -1]))
    batch = PairCollator()([pair])
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["branch_ids"].tolist() == [[0, 0, 2]]
    assert batch["places"].tolist() == [[0, 1, 0], [0, 1, 2]]


def test_fillers_weights_and_scores_travel_along() -> None:
    scored = [replace(pair, pair_weight=0.5, chosen_score=4.0, rejected_score=1.5) for pair in PAIRS]
    batch = PairCollator()([scored[0], replace(scored[1], is_filler=True)])
    assert batch["pair_weights"].tolist() == [0.5, 0.5]
    assert batch["counts"].tolist() == [True, False]
    assert batch["chosen_scores"].tolist() == [4.0, 4.0]
    assert batch["rejected_scores"].tolist() == [1.5, 1.5]
    assert "chosen_scores" not in PairCollator()(PAIRS)


def test_sides_come_back_as_they_went_in() -> None:
    collator = PairCollator()
    batch = collator(PAIRS)
    chosen, rejected = collator.split_sides(batch, TokenTerms(torch.arange(16.0).reshape(4, 4)))
    assert collator.num_pairs(batch) == 2
    assert chosen.policy_logps.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chosen.token_weights.tolist() == [[0, 0, 0.5, 1.5], [0, 0.25, 0, 0]]
    assert rejected.ref_logps.tolist() == [[0, 0, -3, 0], [0, -5, -6, -7]]


def test_rejected_can_be_left_out() -> None:
    collator = PairCollator(packed=False, with_rejected=False)
    batch = collator(PAIRS)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2], [13, 0, 0, 0]]
    chosen, rejected = collator.split_sides(batch, TokenTerms(torch.zeros(2, 4)))
    assert len(chosen.policy_logps) == 2
    assert rejected is None
