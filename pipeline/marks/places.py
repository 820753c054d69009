"""Where the text of a row stands in the response that the chat template has made of it, and the weights of its characters.

Positions count characters, as Python does. What the template adds has weight 1, and so has white space that it adds or leaves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.marks.cells import BadWeightsError


class Response(NamedTuple):
    """A response as it was tokenised."""

    text: str
    num_own: int
    """Characters before the special tokens at its end, which the template adds."""
    is_cut: bool
    """Whether it was cut to the limit of tokens."""
    ends: frozenset[str]
    """Texts of special tokens: a row may end with one, which is in the response once."""

    @property
    def own(self) -> str:
        """The text without the template's end."""
        return self.text[: self.num_own]


class Place(NamedTuple):
    """The characters `low` to `high` of a row's text stand in the response, the first of them at `at`."""

    at: int
    low: int
    high: int


def character_weights(numbers: np.ndarray, texts: Sequence[str], response: Response) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from those of its text, one for each character.

    Raises:
        BadWeightsError: They are too few or too many, or the text does not stand in the response.
    """
    text = _only(texts)
    if len(numbers) != len(text):
        raise BadWeightsError(f"{len(numbers):,} numbers for a text of {len(text):,} characters")
    return _moved(numbers, find(text, response), response)


def span_weights(spans: np.ndarray, rest: float, texts: Sequence[str], response: Response) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from spans of its text, `[3 * n]`: start, end, weight.

    Raises:
        BadWeightsError: A span is outside of the text or has no character of the response, or the text does not stand there.
    """
    text = _only(texts)
    place = find(text, response)
    weights = np.full(len(text), rest, np.float32)
    for number, (start, end, weight) in enumerate(spans.reshape(-1, 3).tolist()):
        shown = f"span {number}, {start:g} to {end:g},"
        if not 0 <= start <= end <= len(text):
            raise BadWeightsError(f"{shown} is not inside of the text of {len(text):,} characters")
        if start == end or end <= place.low or (start >= place.high and not response.is_cut):
            raise BadWeightsError(f"{shown} falls on no character of the response")
        weights[int(start) : int(end)] = weight
    return _moved(weights, place, response)


def message_weights(numbers: np.ndarray, texts: Sequence[str], response: Response) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from one number for each of its messages, or for all.

    A message goes from its text to that of the next one, and so has the marks behind it. One without a text, as beside calls
    of tools, begins where the text before it ends.

    Raises:
        BadWeightsError: They are too few or too many, or a text does not stand in the response.
    """
    weights = np.full(len(response.text), numbers[0] if len(numbers) else 1, np.float32)
    if len(numbers) == 1:
        return weights
    if len(numbers) != len(texts):
        raise BadWeightsError(
            f"{len(numbers)} numbers for a response of {len(texts)} messages; expected one for each, or one"
        )
    end = 0
    for place, (text, weight) in enumerate(zip(map(str.strip, texts), numbers, strict=True)):
        if not text and place and not texts[place - 1].strip() and weight != numbers[place - 1]:
            raise BadWeightsError(
                f"messages {place - 1} and {place} have no text, so it is unknown where {place} begins"
            )
        start = response.text.find(text, end)
        if start < 0 and response.is_cut:
            break
        if start < 0:
            raise BadWeightsError(
                f"the text of message {place} does not stand in the response as it is; give weights per token"
            )
        weights[start if place else 0 :] = weight
        end = start + len(text)
    return weights


def find(text: str, response: Response) -> Place:
    """Return where a row's text stands in its response.

    The template may drop white space around the text, and write something before it. A response that was cut ends early.

    Raises:
        BadWeightsError: It does not stand there as it is.
    """
    core, own = text.strip(), response.own
    low = len(text) - len(text.lstrip())
    lead = len(own) - len(own.lstrip())
    if own.rstrip().endswith(core):
        at, size = len(own.rstrip()) - len(core), len(core)
    elif own.startswith(core, lead):  # an end follows that is no special token
        at, size = lead, len(core)
    else:
        at, size = lead, _num_shared(core, own[lead:])
        left, missing = own[lead + size :].strip(), core[size:].strip()
        if not size or not ((response.is_cut and _is_broken(left)) or (not left and _are_ends(missing, response))):
            raise BadWeightsError(
                f"the text does not stand in the response as it is, from character {low + size} on: the chat template or the "
                'tokenizer changes it; give weights per token (weights.per = "token")'
            )
        size += bool(left)  # the character that the cut has split
    high = low + size
    while low and at and own[at - 1] == text[low - 1]:
        at, low = at - 1, low - 1
    while high < len(text) and own[at + high - low : at + high - low + 1] == text[high]:
        high += 1
    return Place(at, low, high)


def _moved(weights: np.ndarray, place: Place, response: Response) -> np.ndarray:
    found = np.ones(len(response.text), np.float32)
    at, low, high = place
    found[at : at + high - low] = weights[low:high]
    if response.is_cut and _is_broken(response.own[at + high - low - 1 :]):
        found[at + high - low :] = weights[high - 1]  # other bytes of the character that the cut has split
    return found


def _only(texts: Sequence[str]) -> str:
    if len(texts) != 1:
        raise BadWeightsError(
            f"the response has {len(texts)} messages, and characters are counted in one text; give weights per token or message"
        )
    return texts[0]


def _num_shared(a: str, b: str) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_broken(text: str) -> bool:
    """Return whether text is nothing but bytes of a character that is not whole, or empty."""
    return all("\udc80" <= each <= "\udcff" for each in text)


def _are_ends(text: str, response: Response) -> bool:
    """Return whether text is nothing but ends of turns, which the tokenizer writes once, or was cut off."""
    while text and not response.is_cut:
        end = next(filter(text.startswith, response.ends), None)
        if end is None:
            return False
        text = text.removeprefix(end).strip()
    return True
