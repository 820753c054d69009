from dataclasses import replace

import numpy as np
import pytest
import torch

from train.data.dataset import Pair, StoredResponse
from train.model.collate import PairCollator
from train.model.logps import TokenTerms


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
    assert batch["layout"].token_branch_ids().tolist() == [0, 0, 1, 1, 2, 4, 5, 6, 6, 6, 8, 8, 9, 10]
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
    assert batch["layout"].token_branch_ids().tolist() == [0, 0, 2]
    assert batch["places"].tolist() == [[0, 1, 0], [0, 1, 2]]


def anchored() -> list[Pair]:
    """PAIRS, the anchor of the first beginning like its chosen response, and one whose three responses begin alike."""
    shared = Pair(
        "c", np.array([14], np.int32), stored([41, 42, 43], [1] * 3, [-1] * 3), stored([41, 42], [1] * 2, [-1] * 2)
    )
    anchors = stored([21, 2], [1, 1], [-0.5, -1.5]), stored([51], [1], [-2.5]), stored([41, 44], [1, 1], [-3.5, -4.5])
    return [replace(pair, anchor=anchor) for pair, anchor in zip([*PAIRS, shared], anchors, strict=True)]


def test_anchors_are_packed_as_a_third_response_by_hand() -> None:
    batch = PairCollator(with_anchors=True)(anchored())
    # a: prompt 11 12, chosen 21 2, rejected 31, anchor 21 2: what only two responses begin with is not shared
    # b: 13, then 0, then 2 0 2, then 51; c: 14 41 is common, then 42 43, then 42, then 44
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2, 31, 21, 2, 13, 0, 2, 0, 2, 51, 14, 41, 42, 43, 42, 44]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 2, 3, 0, 1, 1, 2, 3, 1, 0, 1, 2, 3, 2, 2]]
    assert batch["layout"].token_branch_ids().tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 6, 6, 7, 8, 8, 9, 9, 10, 11]
    # chosen of a, b, c, then rejected, then anchors; behind the end 0
    assert batch["places"].tolist() == [
        [0, 1, 2, 3], [7, 8, 0, 0], [13, 14, 15, 16],
        [0, 1, 4, 0], [7, 9, 10, 11], [13, 14, 17, 0],
        [0, 1, 5, 6], [7, 12, 0, 0], [13, 14, 18, 0],
    ]  # fmt: skip
    assert batch["completion_mask"][6:].int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert batch["num_kls"] == 12  # chosen 2 + 1 + 3, rejected 1 + 3 + 2
    assert batch["ref_logps"][6:].tolist() == [[0, 0, -0.5, -1.5], [0, -2.5, 0, 0], [0, -3.5, -4.5, 0]]


def test_beginnings_that_are_not_shared_leave_the_prompt_alone_in_common() -> None:
    pairs = anchored()
    batch = PairCollator(share_beginnings=False)(pairs[2:])
    assert batch["input_ids"].tolist() == [[14, 41, 42, 43, 41, 42]]
    assert batch["layout"].token_branch_ids().tolist() == [0, 1, 1, 1, 2, 2]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2]]
    assert batch["places"].tolist() == [[0, 1, 2, 3], [0, 4, 5, 0]]
    batch = PairCollator(with_anchors=True, share_beginnings=False)(pairs)
    mask = batch["completion_mask"]
    assert batch["places"][mask].unique().numel() == mask.sum()  # every response token has a place of its own


@pytest.mark.parametrize("with_rejected", [True, False])
@pytest.mark.parametrize("share_beginnings", [True, False])
def test_packed_and_padded_layouts_hold_the_same_tokens(share_beginnings: bool, with_rejected: bool) -> None:
    flags = {"with_rejected": with_rejected, "with_anchors": True, "share_beginnings": share_beginnings}
    packed, padded = (PairCollator(packed=packed, **flags)(anchored()) for packed in (True, False))
    assert len(packed["places"]) == (9 if with_rejected else 6)
    mask = padded["completion_mask"]
    until_end = mask.flip(1).cumsum(1).flip(1) > 0  # the response and what is before it
    found = [batch["input_ids"].flatten()[batch["places"]][until_end] for batch in (packed, padded)]
    assert torch.equal(*found)
    for name in ("completion_mask", "token_weights", "ref_logps"):
        assert torch.equal(packed[name], padded[name])
    positions = packed["position_ids"].flatten()[packed["places"]][until_end]
    assert torch.equal(positions, torch.arange(mask.shape[1]).expand_as(mask)[until_end])


def test_a_pair_counts_with_all_its_responses() -> None:
    pair = anchored()[1]  # prompt 1, responses 1, 3, 1
    sizes = {
        (packed, with_anchors): PairCollator(packed=packed, with_anchors=with_anchors).num_tokens(pair)
        for packed in (True, False)
        for with_anchors in (True, False)
    }
    assert sizes == {(True, True): 6, (True, False): 5, (False, True): 8, (False, False): 6}
    assert PairCollator(with_rejected=False).num_tokens(pair) == 2
    # without shared beginnings it is what is really there
    whole = PairCollator(with_anchors=True, share_beginnings=False)
    assert whole([pair])["input_ids"].shape[1] == whole.num_tokens(pair)


def test_anchors_have_no_top_k_and_the_others_keep_theirs() -> None:
    top = {"ref_top_ids": np.array([[7, 8]], np.int32), "ref_top_logps": np.array([[-0.5, -1]], np.float32)}
    pair = replace(
        PAIRS[0], chosen=replace(stored([21], [1], [-1]), **top), rejected=replace(stored([31], [1], [-1]), **top)
    )
    batch = PairCollator(with_anchors=True)([replace(pair, anchor=stored([51, 52], [1, 1], [-1, -1]))])
    assert batch["ref_top_ids"][:, 2].tolist() == [[7, 8], [7, 8], [0, 0]]
    assert batch["ref_top_logps"].isfinite().all()


def test_fillers_weights_and_scores_travel_along() -> None:
    scored = [replace(pair, pair_weight=0.5, chosen_score=4.0, rejected_score=1.5) for pair in PAIRS]
    batch = PairCollator()([scored[0], replace(scored[1], is_filler=True)])
    assert batch["pair_weights"].tolist() == [0.5, 0.5]
    assert (batch["num_counted"], batch["num_chosen_tokens"]) == (1, 2)
    assert batch["chosen_scores"].tolist() == [4.0, 4.0]
    assert batch["rejected_scores"].tolist() == [1.5, 1.5]
    assert "chosen_scores" not in PairCollator()(PAIRS)


def test_sides_come_back_as_they_went_in() -> None:
    collator = PairCollator()
    batch = collator(PAIRS)
    chosen, rejected, anchor = collator.split_sides(batch, TokenTerms(torch.arange(16.0).reshape(4, 4)))
    assert anchor is None
    assert chosen.policy_logps.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert chosen.token_weights.tolist() == [[0, 0, 0.5, 1.5], [0, 0.25, 0, 0]]
    assert rejected.ref_logps.tolist() == [[0, 0, -3, 0], [0, -5, -6, -7]]


def test_anchors_come_back_behind_the_sides_that_are_there() -> None:
    for with_rejected in (True, False):
        collator = PairCollator(with_rejected=with_rejected, with_anchors=True)
        batch = collator(anchored())
        values = torch.arange(float(batch["places"].numel())).view(batch["places"].shape)
        chosen, rejected, anchor = collator.split_sides(batch, TokenTerms(values, values))
        assert chosen.policy_logps[0].tolist() == [0, 1, 2, 3]
        assert anchor.policy_logps[0, 0] == (24 if with_rejected else 12)
        assert anchor.kls[0, 0] == (24 if with_rejected else 12)
        assert anchor.ref_logps[1].tolist() == [0, -2.5, 0, 0]
        assert (rejected is not None) == with_rejected


def test_rejected_can_be_left_out() -> None:
    collator = PairCollator(packed=False, with_rejected=False)
    batch = collator(PAIRS)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 2], [13, 0, 0, 0]]
    chosen, rejected, anchor = collator.split_sides(batch, TokenTerms(torch.zeros(2, 4)))
    assert len(chosen.policy_logps) == 2
    assert rejected is None
    assert anchor is None
