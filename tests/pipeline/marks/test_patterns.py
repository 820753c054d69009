import numpy as np
import pytest

from pipeline.marks import patterns
from pipeline.marks.characters import Texts, Vocabulary
from pipeline.marks.patterns import compile_pattern, pattern_weights

PARTS = ["the", " c", "at", " 1", "2", "3 x", "<|end|>", "\n", "```", "code", "<think>", "</think>", "no"]
"""The tokens of a vocabulary, by id; id 6 is special."""


def weigh(ids, *given, rest=1.0, lengths=None):
    parts = [part.encode() for part in PARTS]
    ends = np.cumsum(list(map(len, parts)))
    vocabulary = Vocabulary(np.frombuffer(b"".join(parts), np.uint8), ends, np.arange(len(parts)) == 6)
    texts = Texts(vocabulary, np.array(ids), np.array(lengths or [len(ids)]))
    return pattern_weights(texts, given, np.broadcast_to(np.float32(rest), len(ids)))


def weights(ids, *given, rest=1.0, lengths=None):
    return weigh(ids, *given, rest=rest, lengths=lengths)[0].tolist()


def test_a_token_has_the_mean_of_its_characters():
    # "the cat": cat stands in " c", whose space is not matched, and in "at".
    assert weights([0, 1, 2], ("cat", 3.0)) == [1.0, 2.0, 3.0]
    # " 1" has one digit of two characters, "3 x" one of three.
    assert weights([3, 4, 5], ("@digits", 4.0)) == [2.5, 4.0, 2.0]
    assert weights([3, 4, 5], (r"\d+", 4.0), rest=0.0) == [2.0, 4.0, np.float32(4 / 3)]


def test_the_last_pattern_wins():
    assert weights([0, 2], ("the", 2.0), ("e|a", 5.0)) == [3.0, 3.0]
    assert weights([0, 2], ("e|a", 5.0), ("the", 2.0)) == [2.0, 3.0]


def test_a_character_that_no_pattern_matches_has_the_rest_of_its_token():
    # " 1" has one digit of two characters; the mark of the end is matched in part.
    assert weights([0, 3, 6], (r"\d|end", 4.0), rest=[0.5, 3.0, 2.0]) == [0.5, 3.5, 2.0]


def test_matches_are_counted_and_nothing_is_no_match():
    found = weigh([0, 1, 2, 3, 4], ("@digits", 2.0), ("@code", 2.0), ("x*", 2.0), ("a|t", 2.0), lengths=[2, 3])
    assert found[1].tolist() == [2, 0, 0, 3]


def test_a_pattern_ends_with_its_response():
    assert weights([0, 1, 0, 1], ("the c", 2.0), lengths=[1, 3]) == [1.0, 1.0, 2.0, 2.0]


def test_a_special_token_is_matched_whole_or_not_at_all():
    assert weights([0, 6], ("end|the", 2.0)) == [2.0, 1.0]
    assert weights([0, 6], ("end", 2.0), rest=0.5) == [0.5, 0.5]
    assert weights([0, 6], (r"<\|end\|>", 2.0), rest=0.5) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("name", "text", "marked"),
    [
        ("@reasoning", "<think>a</think>b", "<think>a</think>"),
        ("@reasoning", "a\n</think>b", "a\n</think>"),  # the prompt has opened it
        ("@reasoning", "a<think>b", "<think>b"),
        ("@reasoning", "a b", ""),
        ("@tool_calls", "x<tool_call>\n{}</tool_call>y", "<tool_call>\n{}</tool_call>"),
        ("@tool_calls", "[TOOL_CALLS] [{}]", "[TOOL_CALLS] [{}]"),
        ("@tool_calls", "[TOOL_CALLS] [{}]</s>[TOOL_RESULTS] 1[/TOOL_RESULTS] x</s>", "[TOOL_CALLS] [{}]</s>"),
        ("@tool_results", "a<tool_response>b</tool_response>c", "<tool_response>b</tool_response>"),
        ("@code", "a\n```py\nb\n```\nc", "```py\nb\n```"),
        ("@code", "a ``` b\n```\nc", "```\nc"),  # a fence stands at the beginning of a line
        ("@code", "```py\nb\n```<|end|>", "```py\nb\n```"),  # the end of the turn is no code
        ("@code", "```py\r\nb\r\n```\r\nc", "```py\r\nb\r\n```"),
        ("@code", "```md\n```py\n```\nc", "```md\n```py\n```"),  # a fence with a language closes nothing
        ("@digits", "a1b", "1"),
    ],
)
def test_patterns_with_a_name(name, text, marked):
    assert "".join(match[0] for match in compile_pattern(name).finditer(text)) == marked


def test_a_pattern_that_takes_too_long_is_named(monkeypatch):
    monkeypatch.setattr(patterns, "TIMEOUT_S", 0.05)
    with pytest.raises(
        ValueError,
        match=r"^pattern '\(\?:e\+o\?\)\+z' of weights.patterns takes more than 0.05 s in a response of 4,00",
    ):
        pattern_weights(_texts("e" * 4000), [(r"(?:e+o?)+z", 2.0)], np.ones(1))


def _texts(text):
    vocabulary = Vocabulary(np.frombuffer(text.encode(), np.uint8), np.array([len(text)]), np.zeros(1, bool))
    return Texts(vocabulary, np.array([0]), np.array([1]))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("@thoughts", "no pattern '@thoughts': expected one of @reasoning"), ("(a", "'(a' is no regular expression")],
)
def test_what_is_no_pattern_is_refused(text, problem):
    with pytest.raises(ValueError) as caught:
        compile_pattern(text)
    assert str(caught.value).startswith(problem)
