import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.marks.cells import BadWeightsError
from pipeline.marks.places import Response, character_weights, composed, message_weights, span_weights

END = "<|end|>"


def response(text, is_cut=False):
    num_own = len(text.removesuffix(END))
    return Response(text, num_own, is_cut, frozenset({END, "<s>"}))


def by_character(text, body, is_cut=False):
    return character_weights(np.arange(2, len(text) + 2), [text], response(body, is_cut)).tolist()


@pytest.mark.parametrize(
    ("text", "body", "expected"),
    [
        ("abc", "abc<|end|>", [2, 3, 4, *[1] * 7]),
        ("abc", " abc\n<|end|>", [1, 2, 3, 4, 1, *[1] * 7]),  # the template writes white space around it
        (" abc \n", "abc<|end|>", [3, 4, 5, *[1] * 7]),  # the template drops white space
        (" abc \n", "  abc <|end|>", [1, 2, 3, 4, 5, 6, *[1] * 7]),  # and what it keeps has its own weight
        ("abc", "<think></think>abc<|end|>", [*[1] * 15, 2, 3, 4, *[1] * 7]),
        ("end", "end<|end|>", [2, 3, 4, *[1] * 7]),  # the mark of the end has that text too
        ("ab", "ab ## done", [2, 3, *[1] * 8]),  # an end that is no special token
        ("ab<|end|>", "ab<|end|>", [2, 3, *[1] * 7]),  # the end of the turn stands in the row too: it is there once
        ("ab ab", "ab ab<|end|>", [2, 3, 4, 5, 6, *[1] * 7]),
    ],
)
def test_a_text_is_found_in_its_response(text, body, expected):
    assert by_character(text, body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("the c", [2, 3, 4, 5, 6]),
        (" the", [1, 2, 3, 4]),
        ("the cat \udcf0\udc9f", [2, 3, 4, 5, 6, 7, 8, 9, 10, 10]),  # two bytes of the emoji: both have its weight
    ],
)
def test_weights_of_a_response_that_was_cut_are_cut_with_it(body, expected):
    assert by_character("the cat 🙂 sat", body, is_cut=True) == expected


@pytest.mark.parametrize(
    ("text", "body"),
    [("cafe x", "café x<|end|>"), ("abc", "abd<|end|>"), ("abc", "ab<|end|>"), ("abc", "<|end|>")],
)
def test_a_text_that_was_changed_is_refused(text, body):
    with pytest.raises(
        BadWeightsError, match=r"^the text does not stand in the response as it is, from character \d on: "
    ):
        by_character(text, body)


def test_as_many_numbers_as_characters():
    with pytest.raises(BadWeightsError, match=r"^4 numbers for a text of 3 characters$"):
        character_weights(np.ones(4), ["a🙂b"], response("a🙂b"))
    with pytest.raises(BadWeightsError, match=r"^the response has 2 messages"):
        character_weights(np.ones(4), ["ab", "cd"], response("abcd"))


def spans(*given, text="the cat sat", body="the cat sat<|end|>", is_cut=False, rest=1.0):
    return span_weights(np.array(given, np.float32).ravel(), rest, [text], response(body, is_cut)).tolist()


def test_spans_by_hand():
    assert spans((4, 7, 3.0)) == [*[1] * 4, *[3] * 3, *[1] * 11]
    # The last of overlapping spans counts; what the template adds is never `rest`.
    assert spans((0, 7, 3.0), (2, 5, 0.0), rest=0.5) == [3, 3, 0, 0, 0, 3, 3, *[0.5] * 4, *[1] * 7]
    assert spans() == [1] * 18


@pytest.mark.parametrize(
    ("span", "problem"),
    [
        ((4, 12, 1), "span 1, 4 to 12, is not inside of the text of 11 characters"),
        ((-1, 2, 1), "span 1, -1 to 2, is not inside of the text of 11 characters"),
        ((5, 4, 1), "span 1, 5 to 4, is not inside of the text of 11 characters"),
        ((4, 4, 1), "span 1, 4 to 4, falls on no character of the response"),
    ],
)
def test_a_span_on_nothing_is_named(span, problem):
    with pytest.raises(BadWeightsError) as caught:
        spans((0, 3, 2.0), span)
    assert str(caught.value) == problem


def test_a_span_of_white_space_that_the_template_drops_falls_on_nothing():
    with pytest.raises(BadWeightsError, match="^span 0, 11 to 12, falls on no character"):
        spans((11, 12, 2.0), text="the cat sat ")
    with pytest.raises(BadWeightsError, match="^span 0, 0 to 1, falls on no character"):
        spans((0, 1, 2.0), text=" the cat sat")
    assert spans((11, 12, 2.0), text="the cat sat ", body="the cat sat <|end|>")[11] == 2


def test_spans_behind_a_cut_are_cut():
    assert spans((0, 3, 2.0), (8, 11, 3.0), body="the c", is_cut=True) == [2, 2, 2, 1, 1]


TURNS = ["call", "", "a", "b"]
BODY = "call<|end|>{}<|end|>a<|end|>b<|end|>"


def test_one_number_is_for_all_messages():
    assert message_weights(np.array([3.0]), TURNS, response(BODY)).tolist() == [3.0] * len(BODY)


def test_each_message_goes_to_the_text_of_the_next_one():
    # The second has no text: it begins where the first ends, with its mark.
    found = message_weights(np.array([2.0, 3.0, 4.0, 5.0]), TURNS, response(BODY))
    assert found.tolist() == [*[2] * 4, *[3] * 16, *[4] * 8, *[5] * 8]


@pytest.mark.parametrize(
    ("numbers", "texts", "problem"),
    [
        ([1, 2], TURNS, "2 numbers for a response of 4 messages; expected one for each, or one"),
        ([1, 2, 3, 4], ["call", "", "a", "c"], "the text of message 3 does not stand in the response as it is"),
        ([1, 2, 3, 4], ["call", "", "", "b"], "messages 1 and 2 have no text, so it is unknown where 2 begins"),
    ],
)
def test_messages_that_cannot_be_told_apart_are_refused(numbers, texts, problem):
    with pytest.raises(BadWeightsError) as caught:
        message_weights(np.array(numbers), texts, response(BODY))
    assert str(caught.value).startswith(problem)


def test_a_text_that_the_tokenizer_composes_has_the_mean_of_its_parts():
    text = " xe\u0301\u0323y\uac00\u11a8"  # e with two marks is ẹ and one mark, and 가 with a final consonant is 각
    body = unicodedata.normalize("NFC", text).strip()
    assert body == "x\u1eb9\u0301y\uac01"
    # The parts of the e have 4, 5 and 6, those of the syllable 8 and 9.
    assert by_character(text, body + END) == [3, 5, 5, 7, 8.5, *[1] * 7]
    assert spans((2, 5, 3.0), (6, 7, 5.0), text=text, body=body + END) == [1, 3, 3, 1, 3, *[1] * 7]
    with pytest.raises(BadWeightsError, match="^span 0, 0 to 1, falls on no character"):
        spans((0, 1, 3.0), text=text, body=body + END)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_composed_weights_are_as_many_as_the_characters_in_nfc(text):
    weights = np.arange(len(text), dtype=np.float32)
    in_nfc = unicodedata.normalize("NFC", text)
    found = composed(text, weights)
    assert len(found) == len(in_nfc)
    if in_nfc == text:
        assert found.tolist() == weights.tolist()
    elif text:
        assert 0 <= found.min() <= found.max() <= weights.max()
