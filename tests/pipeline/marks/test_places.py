import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chat.turns import Turn, Turns
from pipeline.marks.cells import BadWeightsError
from pipeline.marks.places import Response, character_weights, composed, message_weights, span_weights

END = "<|end|>"


def response(text, is_cut=False):
    num_own = len(text.removesuffix(END))
    return Response(text, num_own, is_cut, frozenset({END, "<s>"}))


def shown(weights):
    """Weights of characters, with 1 for those that are of no text."""
    return np.where(np.isnan(weights), 1, weights).tolist()


def by_character(text, body, is_cut=False):
    return shown(character_weights(np.arange(2, len(text) + 2), [text], response(body, is_cut)))


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
        ("the cat", [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_weights_of_a_response_that_was_cut_are_cut_with_it(body, expected):
    assert by_character("the cat 🙂 sat", body, is_cut=True) == expected


def test_a_response_that_was_cut_in_its_first_character_has_its_weight():
    assert by_character("🙂 sat", "\udcf0\udc9f", is_cut=True) == [2, 2]


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
    with pytest.raises(BadWeightsError, match=r"^5 numbers for the texts of 2 messages, together of 4 characters$"):
        character_weights(np.ones(5), ["ab", "cd"], response("abcd"))


def spans(*given, text="the cat sat", body="the cat sat<|end|>", is_cut=False, rest=1.0):
    return shown(span_weights(np.array(given, np.float32).ravel(), rest, [text], response(body, is_cut)))


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


TEXTS = ["", " 18", "It is 18."]
BODY = '{"at": 18}<|end|><tool>18<|end|><own>It is 18.<|end|>'
TURNS = Turns(BODY + "\n", [Turn("assistant", 0, None, None), Turn("tool", 17, 23, 25), Turn("assistant", 37, 37, 46)])
"""A call that has the result among its arguments, the result, and the answer."""


def test_one_number_is_for_all_messages():
    assert message_weights([3.0], response(BODY), None).tolist() == [3.0] * len(BODY)


def test_a_message_goes_to_where_the_next_one_begins():
    found = message_weights([2.0, 0.0, 3.0], response(BODY), TURNS)
    assert found.tolist() == [*[2] * 17, *[0] * 20, *[3] * 16]


def test_a_response_of_messages_may_have_other_white_space_and_be_cut():
    # A tokenizer may add a space to a word behind a special token; it belongs to the message that begins there.
    body = BODY.replace("<own>It", "<own> It")
    found = message_weights([2.0, 0.0, 3.0], response(body), TURNS)
    assert found.tolist() == [*[2] * 17, *[0] * 20, *[3] * 17]
    found = message_weights([2.0, 0.0, 3.0], response(BODY[:20], is_cut=True), TURNS)
    assert found.tolist() == [*[2] * 17, *[0] * 3]
    with pytest.raises(BadWeightsError, match="^the tokenizer changes the messages of the response; give weights per"):
        message_weights([2.0, 0.0, 3.0], response(BODY.upper()), TURNS)


def test_the_characters_of_several_texts_are_counted_through():
    numbers = np.arange(2.0, 14.0)  # the space of the result has 2, its digits 3 and 4, the answer 5 to 13
    found = shown(character_weights(numbers, TEXTS, response(BODY), TURNS))
    assert found == [*[1] * 23, 3, 4, *[1] * 12, *range(5, 14), *[1] * 7]
    spans = np.array([[1, 3, 0.0], [2, 5, 4.0]], np.float32).ravel()
    found = shown(span_weights(spans, 2.0, TEXTS, response(BODY), TURNS))
    assert found == [*[1] * 23, 0, 4, *[1] * 12, 4, 4, *[2] * 7, *[1] * 7]


def test_spans_in_several_texts_have_to_be_on_a_character():
    with pytest.raises(BadWeightsError, match="^span 0, 0 to 1, falls on no character of the response$"):
        span_weights(np.array([0, 1, 3.0]), 1.0, TEXTS, response(BODY), TURNS)  # a space that the template drops
    with pytest.raises(BadWeightsError, match="^span 0, 11 to 13, is not inside of the text of 12 characters$"):
        span_weights(np.array([11, 13, 3.0]), 1.0, TEXTS, response(BODY), TURNS)
    # In a response that was cut, a span behind the cut is cut with it.
    found = span_weights(np.array([2, 4, 3.0]), 1.0, TEXTS, response(BODY[:24], is_cut=True), TURNS)
    assert shown(found)[22:] == [1, 1]
    found = span_weights(np.array([2, 4, 3.0]), 1.0, TEXTS, response(BODY[:25], is_cut=True), TURNS)
    assert shown(found)[22:] == [1, 1, 3]


def test_the_end_of_a_turn_in_the_text_of_a_message_is_there_once():
    turns = Turns(
        "a<|end|>b<|end|><|end|>",
        [Turn("assistant", 0, 0, 1), Turn("tool", 8, 8, 9), Turn("assistant", 16, None, None)],
    )
    texts = ["a<|end|>", "b", "<|end|>"]
    found = shown(character_weights(np.arange(2.0, 18.0), texts, response("a<|end|>b<|end|><|end|>"), turns))
    assert found == [2, *[1] * 7, 10, *[1] * 14]
    with pytest.raises(BadWeightsError, match="^span 0, 1 to 8, falls on no character of the response$"):
        span_weights(np.array([1, 8, 3.0]), 1.0, texts, response("a<|end|>b<|end|><|end|>"), turns)


def test_a_text_that_the_template_changes_is_named():
    turns = Turns(BODY, [TURNS.turns[0], Turn("tool", 17, None, None), TURNS.turns[2]])
    with pytest.raises(BadWeightsError, match="^the chat template changes the text of message 1; give weights per"):
        character_weights(np.ones(12), TEXTS, response(BODY), turns)
    with pytest.raises(BadWeightsError, match="^the chat template changes the text of message 1; give weights per"):
        character_weights(np.ones(12), TEXTS, response(BODY[:30], is_cut=True), turns)
    found = character_weights(np.ones(12), TEXTS, response(BODY[:17], is_cut=True), turns)  # it is behind the cut
    assert np.isnan(found).all()


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
