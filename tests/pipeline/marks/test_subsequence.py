import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.marks.subsequence import common_places, differing


def textbook_length(a, b):
    """The length of a longest common subsequence by the dynamic programme of the textbook."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@pytest.mark.parametrize(
    ("a", "b", "in_a", "in_b"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2], [0, 1, 2]),
        ([1, 2, 3], [4, 5], [], []),
        ([1, 9, 2], [1, 8, 8, 2], [0, 2], [0, 3]),
        # The one of length 2 is 3 4: 1 stands on the wrong side of both.
        ([1, 3, 4], [3, 4, 1], [1, 2], [0, 1]),
        ([7], [7, 7], [0], [0]),  # what both begin with
        ([5, 6, 5], [6, 5, 6], [0, 1], [1, 2]),
        ([], [1], [], []),
    ],
)
def test_common_places_by_hand(a, b, in_a, in_b):
    found = common_places(np.array(a, np.int32), np.array(b, np.int32))
    assert [places.tolist() for places in found] == [in_a, in_b]


@given(st.lists(st.integers(0, 4), max_size=90), st.lists(st.integers(0, 4), max_size=90))
def test_a_common_subsequence_is_one_and_as_long_as_the_textbook_s(a, b):
    in_a, in_b = common_places(np.array(a, np.int32), np.array(b, np.int32))
    assert len(in_a) == textbook_length(a, b)
    assert (np.diff(in_a) > 0).all()
    assert (np.diff(in_b) > 0).all()
    assert [a[place] for place in in_a] == [b[place] for place in in_b]


def test_long_responses_that_share_little():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 50, 700), random.integers(0, 50, 600)
    in_a, in_b = common_places(a, b)
    assert len(in_a) == textbook_length(a, b)
    assert (a[in_a] == b[in_b]).all()


def test_each_response_is_compared_with_that_of_its_own_pair():
    chosen, rejected = differing(np.array([1, 2, 1, 2]), np.array([2, 2]), np.array([1, 3, 2]), np.array([1, 2]))
    assert chosen.tolist() == [False, True, True, False]
    assert rejected.tolist() == [False, True, False]
