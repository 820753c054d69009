"""Where the text of a row stands in the response that the chat template has made of it, and the weights of its characters.

Positions count characters, as Python does. Some tokenizers change a text to Unicode NFC (Qwen): then a character has the mean
weight of those that it was made of. What the template adds has weight 1, and so has white space that it adds or leaves.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
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
    found, place = _located(text, response)
    return _moved(numbers if found == text else composed(text, numbers), place, response)


def span_weights(spans: np.ndarray, rest: float, texts: Sequence[str], response: Response) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from spans of its text, `[3 * n]`: start, end, weight.

    Raises:
        BadWeightsError: A span is outside of the text or has no character of the response, or the text does not stand there.
    """
    text = _only(texts)
    found, place = _located(text, response)
    last = len(text) if response.is_cut else len(text) - (len(found) - place.high)
    weights = np.full(len(text), rest, np.float32)
    for number, (start, end, weight) in enumerate(spans.reshape(-1, 3).tolist()):
        shown = f"span {number}, {start:g} to {end:g},"
        if not 0 <= start <= end <= len(text):
            raise BadWeightsError(f"{shown} is not inside of the text of {len(text):,} characters")
        if start == end or end <= place.low or start >= last:
            raise BadWeightsError(f"{shown} falls on no character of the response")
        weights[int(start) : int(end)] = weight
    return _moved(weights if found == text else composed(text, weights), place, response)


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


def composed(text: str, weights: np.ndarray) -> np.ndarray:
    """Return the weights of the characters of a text in NFC: the mean over those that a character is made of.

    Raises:
        BadWeightsError: It cannot be told which these are.
    """
    starts = [at for at, each in enumerate(text) if not at or not (unicodedata.combining(each) or each in _joining())]
    found, parts = list[float](), []
    for start, end in pairwise([*starts, len(text)]):
        parts.append(unicodedata.normalize("NFC", text[start:end]))
        if parts[-1] == text[start:end]:
            found += weights[start:end].tolist()
        else:
            found += [float(weights[start:end].mean())] * len(parts[-1])
    if "".join(parts) != unicodedata.normalize("NFC", text):
        raise BadWeightsError(
            'the tokenizer changes the text to Unicode NFC; give it in NFC, or weights per token (weights.per = "token")'
        )
    return np.array(found, np.float32)


@cache
def _joining() -> frozenset[str]:
    """Return the characters that NFC may join with the one before, besides combining marks."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(sys.maxunicode + 1))
    seconds = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    hangul = map(chr, (*range(0x1160, 0x1200), *range(0xD7B0, 0xD800)))  # vowels and final consonants
    return frozenset((*seconds, *hangul))


def _located(text: str, response: Response) -> tuple[str, Place]:
    """Return where a row's text stands in its response, and how: as it is, or in Unicode NFC, as some tokenizers change it.

    Raises:
        BadWeightsError: It stands there in neither form.
    """
    try:
        return text, find(text, response)
    except BadWeightsError:
        in_nfc = unicodedata.normalize("NFC", text)
        if in_nfc == text:
            raise
        return in_nfc, find(in_nfc, response)


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
