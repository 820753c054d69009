"""The benchmark on real pairs: its split and its arithmetic, by hand."""

import math

import numpy as np
import pytest

from benchmarks.quality.real_data import split_by_prompt
from benchmarks.quality.real_pairs import measured


def row(prompt, length, number):
    return tuple(np.array(ids, np.int32) for ids in ([prompt, 7], [number] * length, [number + 1]))


def test_no_prompt_is_on_two_sides_and_long_pairs_are_other():
    """Prompts 0 to 9 have four short pairs each and a long one, 10 to 19 one long pair."""
    rows = [row(prompt, 2, 100 + 10 * i) for prompt in range(10) for i in range(4)]
    rows += [row(prompt, 50, 900) for prompt in range(20)]
    found = split_by_prompt(rows, 1, num_pairs=7, max_per_prompt=3, max_tokens=10)
    prompts = [{int(each[0][0]) for each in side} for side in found]
    assert len(set().union(*prompts)) == sum(map(len, prompts)) == 20
    assert [len(side) for side in found[:2]] == [7, 7]
    assert [len(side) for side in prompts] == [3, 3, 14]  # 3 + 3 + 1 pairs of three prompts
    assert len(found.other) == 4 * 5 + 10  # of four prompts all pairs, the long ones too
    assert all(len(each[1]) == 2 for side in found[:2] for each in side)
    assert [int(each[0][0]) for each in split_by_prompt(rows, 2, num_pairs=7, max_tokens=10).train] != [
        int(each[0][0]) for each in found.train
    ]
    with pytest.raises(ValueError, match="42 pairs of at most 10 tokens are needed, got 30"):
        split_by_prompt(rows, 1, num_pairs=21, max_per_prompt=3, max_tokens=10)


def test_margins_predict_labels_as_computed_by_hand():
    """15 pairs with a margin of 2 and 5 with -2: 3 - 1 and 1 - 3, over two chosen tokens and one rejected token."""
    right, wrong = ([1.5, 1.5], [1.0]), ([0.25, 0.75], [3.0])
    scores = [np.array(side) for pair in [right] * 15 + [wrong] * 5 for side in pair]
    found = measured(scores, [row(prompt, 2, 100) for prompt in range(20)], beta=0.5)
    assert found["accuracy"] == 0.75
    # Margins times beta are 1 and -1.
    by_hand = (15 * math.log(1 / (1 + math.exp(-1))) + 5 * math.log(1 / (1 + math.exp(1)))) / 20
    assert found["log_likelihood_at_beta"] == pytest.approx(by_hand)
    # With one right and one wrong pair made up, 16 of 22 are right: sigmoid(2 a) = 16 / 22.
    assert found["multiplier"] == pytest.approx(math.log(16 / 6) / 2)
    assert (found["mean_chosen"], found["mean_rejected"]) == pytest.approx((2.5, 1.5))
