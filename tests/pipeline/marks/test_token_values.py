import numpy as np
import pytest

from pipeline.marks.characters import Characters
from pipeline.marks.token_values import Lists, Responses, bad_numbers, fit, known_means, num_at_end


def lists(*values):
    flat = [number for each in values for number in each]
    return Lists(np.array(flat, np.float32), np.array(list(map(len, values)), np.int64))


def fitted(numbers, lengths, num_ends, is_cut=None):
    cut = np.array(is_cut if is_cut is not None else [False] * len(lengths))
    flat, problems = fit(numbers, Responses(lists(*([0] * size for size in lengths)), np.array(num_ends), cut, cut))
    return flat.tolist(), problems


def test_lists_that_fit_stay_as_they_are():
    assert fitted(lists([1, 2], [3]), [2, 1], [1, 1]) == ([1, 2, 3], {})


def test_the_end_of_a_turn_may_be_left_out_and_gets_1():
    assert fitted(lists([5, 6], [7, 8, 9], [4]), [3, 3, 3], [1, 1, 2]) == ([5, 6, 1, 7, 8, 9, 4, 1, 1], {})


def test_a_list_is_cut_only_with_its_response():
    flat, problems = fitted(lists([1, 2, 3], [4, 5, 6]), [2, 2], [0, 1], [True, False])
    assert flat[:2] == [1, 2]
    assert problems == {
        1: "3 numbers for a response of 2 tokens; expected one for each, or 1 without the end of its turn"
    }


@pytest.mark.parametrize("number", [1, 4])
def test_another_length_is_refused(number):
    _, problems = fitted(lists([1.0] * number, [1, 1]), [3, 2], [1, 1])
    assert problems == {
        0: f"{number} numbers for a response of 3 tokens; expected one for each, or 2 without the end of its turn"
    }


def test_bad_numbers_are_named_by_row_and_place():
    found = bad_numbers(lists([1, 2], [], [0, np.nan, -1], [np.inf], [3], [-0.5]))
    assert found == {
        2: "number 1 is nan, expected a finite number >= 0",
        3: "number 0 is inf, expected a finite number >= 0",
        5: "number 0 is -0.5, expected a finite number >= 0",
    }
    assert bad_numbers(lists([0, 1, 2, 1, 3, -2], [-1, 2, 1]), 3) == {
        0: "the weight of span 1 is -2, expected a finite number >= 0",
        1: "span 0 begins or ends at -1, expected a place in the text",
    }


def test_a_space_that_the_tokenizer_adds_does_not_change_the_weight_of_its_word():
    # Tokens " the", " c" and a mark of the end: the first space is of no text, the second one has weight 4.
    characters = Characters(
        [" the cX"], np.array([0, 7]), np.array([0, 4, 6]), np.array([3, 5, 6]), np.zeros(3, bool), np.ones(3, bool)
    )
    weights = np.array([np.nan, 0, 0, 0, 4, 2, np.nan], np.float32)
    assert known_means(characters, weights).tolist() == [0, 3, 1]


def test_special_tokens_at_the_end_are_counted_for_each_response():
    ids = lists([], [0, 1, 1], [1], [0, 1, 1, 0], [1, 1], [])
    found = num_at_end(np.array([False, True]), ids._replace(flat=ids.flat.astype(np.int32)))
    assert found.tolist() == [0, 2, 1, 0, 2, 0]


def test_a_response_was_cut_if_it_is_as_long_as_the_limit_and_has_no_end():
    ids = lists([0, 0], [0, 1], [0])
    found = Responses.of(ids._replace(flat=ids.flat.astype(np.int32)), np.array([False, True]), 2)
    assert found.is_cut.tolist() == [True, False, False]
    assert not Responses.of(found.ids, np.array([False, True]), None).is_cut.any()
