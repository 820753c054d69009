"""Weights of tokens by regular expressions over the text of each response, for estimator `pattern`."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import regex

from pipeline.marks.characters import Characters, Texts

READY = {
    "@reasoning": r"(?s)\A(?:(?!</?think>).)*+</think>|<think>.*?(?:</think>|\Z)",
    "@tool_calls": (
        r"(?s)<tool_call>.*?(?:</tool_call>|\Z)|\[TOOL_CALLS\].*?(?:</s>|\Z)"
        r"|<\|python_tag\|>.*?(?:<\|eo[mt]_id\|>|\Z)"
    ),
    "@tool_results": r"(?s)<tool_response>.*?(?:</tool_response>|\Z)|\[TOOL_RESULTS\].*?(?:\[/TOOL_RESULTS\]|\Z)",
    "@code": r"(?ms)^[ \t]*```.*?(?:^[ \t]*```(?=[ \t]*(?:[\r\n<\[]|\Z))|\Z)",
    "@digits": r"\d",
}
"""Patterns with a name. Marks that a response begins or leaves open count up to its beginning or its end."""
TIMEOUT_S = 10.0
"""For one pattern in one response. Patterns that try the same place again and again can take years."""


@lru_cache(maxsize=256)
def compile_pattern(text: str) -> "regex.Pattern[str]":
    """Return a pattern by its text or its name.

    Raises:
        ValueError: It is no regular expression, or a name that is not known.
    """
    if text.startswith("@") and text not in READY:
        raise ValueError(
            f"no pattern {text!r}: expected one of {', '.join(READY)}, or a regular expression; one that begins with an @ is "
            "written [@]"
        )
    try:
        return regex.compile(READY.get(text, text))
    except regex.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{text[:40]!r}… is no regular expression: it is nested too deep") from error


def pattern_weights(
    texts: Texts, patterns: Sequence[tuple[str, float]], rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight of each token, `[N]` float32, and how often each pattern matches something, `[P]`.

    A character has the weight of the last pattern that matches it, or else the `rest` of its token, `[N]`; a token has the mean
    of its characters. A special token, such as the end of a turn, is matched whole or not at all.

    Raises:
        ValueError: A pattern takes too long.
    """
    found, num_matches, at = [], np.zeros(len(patterns), np.int64), 0
    for characters in texts.parts():
        found.append(_of_part(characters, patterns, rest[at : at + len(characters.first)], num_matches))
        at += len(characters.first)
    return np.concatenate(found), num_matches


def _of_part(
    characters: Characters, patterns: Sequence[tuple[str, float]], rest: np.ndarray, num_matches: np.ndarray
) -> np.ndarray:
    """Return the weight of each token; add to the number of matches."""
    weights, is_matched = np.zeros(characters.starts[-1]), np.zeros(characters.starts[-1])
    for text, (low, high) in zip(characters.texts, pairwise(characters.starts.tolist()), strict=True):
        for number, (pattern, weight) in enumerate(patterns):
            for start, end in _matches(pattern, text):
                weights[low:high][start:end] = weight
                is_matched[low:high][start:end] = 1
                num_matches[number] += end > start
    share = characters.means(is_matched, 0.0)
    is_partly = characters.is_special & (share < 1)
    return np.where(is_partly, rest, characters.means(weights, 0.0) + (1 - share) * rest).astype(np.float32)


def _matches(pattern: str, text: str) -> list[tuple[int, int]]:
    try:
        return [match.span() for match in compile_pattern(pattern).finditer(text, timeout=TIMEOUT_S)]
    except TimeoutError as error:
        raise ValueError(
            f"pattern {pattern!r} of weights.patterns takes more than {TIMEOUT_S:g} s in a response of {len(text):,} "
            f"characters, {text[:40]!r}…; write it without repetitions inside of repetitions, or with possessive ones (*+, ++)"
        ) from error
