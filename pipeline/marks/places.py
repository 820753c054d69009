"""Where the text of a row stands in the response that the chat template has made of it, and the weights of its characters.

Positions count characters, as Python does. Some tokenizers change a text to Unicode NFC (Qwen): then a character has the mean
weight of those that it was made of. What the template adds is of no text, and so is white space that it or the tokenizer adds.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.chat.turns import Turns
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


def character_weights(
    numbers: np.ndarray, texts: Sequence[str], response: Response, turns: Turns | None = None
) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from those of its texts, one for each character.

    NaN for characters that are of no text. Several texts are those of messages, counted through, which stand at `turns`.

    Raises:
        BadWeightsError: They are too few or too many, or a text does not stand in the response.
    """
    size = sum(map(len, texts))
    if len(numbers) != size:
        where = "a text" if len(texts) == 1 else f"the texts of {len(texts)} messages, together"
        raise BadWeightsError(f"{len(numbers):,} numbers for {where} of {size:,} characters")
    return _written(numbers, texts, _located(texts, response, turns), response)


def span_weights(
    spans: np.ndarray, rest: float, texts: Sequence[str], response: Response, turns: Turns | None = None
) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from spans of its texts, `[3 * n]`: start, end, weight.

    NaN for characters that are of no text; for several texts see `character_weights`.

    Raises:
        BadWeightsError: A span is outside of the texts or has no character of the response, or a text does not stand there.
    """
    size = sum(map(len, texts))
    places = _located(texts, response, turns)
    weights, is_there = np.full(size, rest, np.float32), np.zeros(size, bool)
    for start, text, (found, place) in zip(_starts(texts), texts, places, strict=True):
        end = len(found) if text.startswith(found) else len(text)
        last = len(text) if response.is_cut else end - (len(found) - place.high)
        is_there[start + place.low : start + last] = True
    for number, (start, end, weight) in enumerate(spans.reshape(-1, 3).tolist()):
        shown = f"span {number}, {start:g} to {end:g},"
        if not 0 <= start <= end <= size:
            raise BadWeightsError(f"{shown} is not inside of the text of {size:,} characters")
        if not is_there[int(start) : int(end)].any():
            raise BadWeightsError(f"{shown} falls on no character of the response")
        weights[int(start) : int(end)] = weight
    return _written(weights, texts, places, response)


def message_weights(numbers: Sequence[float], response: Response, turns: Turns | None) -> np.ndarray:
    """Return the weights of a response's characters, `[C]` float32, from one number for each of its messages, or for all.

    A message has what the template prints around its text, the end of its turn too. See `Turn.start`.

    Raises:
        BadWeightsError: The response is not what the template prints of its messages.
    """
    weights = np.full(len(response.text), numbers[0] if len(numbers) else 1, np.float32)
    if turns is not None and len(numbers) > 1:
        starts = _aligned(turns.text, response, [turn.start for turn in turns.turns])
        for number, start in zip(numbers[1:], starts[1:], strict=True):
            weights[start:] = number
    return weights


class _Known(NamedTuple):
    """Where a text begins, without white space, and how much of that the template keeps around it."""

    at: int
    num_before: int
    num_behind: int


def find(text: str, response: Response, known: _Known | None = None) -> Place:
    """Return where a row's text stands in its response, which may be known from the template.

    The template may drop white space around the text, and write something before it. A response that was cut ends early.

    Raises:
        BadWeightsError: It does not stand there as it is.
    """
    core, own = text.strip(), response.own
    low = len(text) - len(text.lstrip())
    lead, size = len(own) - len(own.lstrip()) if known is None else known.at, len(core)
    if known is None and own.rstrip().endswith(core):
        at = len(own.rstrip()) - len(core)
    elif own.startswith(core, lead):  # an end follows that is no special token
        at = lead
    else:
        at, size = lead, _num_shared(core, own[lead:])
        left, missing = own[lead + size :].strip(), core[size:].strip()
        is_whole = size and not left and (response.is_cut or _are_ends(missing, response))
        if not is_whole and not (response.is_cut and _is_broken(left) and (size or left)):
            raise BadWeightsError(
                f"the text does not stand in the response as it is, from character {low + size} on: the chat template or the "
                'tokenizer changes it; give weights per token (weights.per = "token")'
            )
        size += bool(left)  # the character that the cut has split
    high = low + size
    first, last = (0, len(text)) if known is None else (low - known.num_before, high + known.num_behind)
    while low > max(first, 0) and at and own[at - 1] == text[low - 1]:
        at, low = at - 1, low - 1
    while high < min(last, len(text)) and own[at + high - low : at + high - low + 1] == text[high]:
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


def _located(texts: Sequence[str], response: Response, turns: Turns | None) -> list[tuple[str, Place]]:
    """Return where the texts of a row stand in its response, and how: as they are, or in NFC, as some tokenizers change them.

    Raises:
        BadWeightsError: One stands there in neither form.
    """
    if turns is None:
        (text,) = texts
        return [_in_a_form(text, response, None)]
    printed = [None if turn.at is None else turns.text[turn.at : turn.end] for turn in turns.turns]
    num_before = [0 if each is None else len(each) - len(each.lstrip()) for each in printed]
    begins = [turn.start if turn.at is None else turn.at for turn in turns.turns]
    places = [begin + num for begin, num in zip(begins, num_before, strict=True)]
    starts = _aligned(turns.text, response, places, before=False)
    found = []
    for number, (text, start, each) in enumerate(zip(texts, starts, printed, strict=True)):
        is_end = each is None and _are_ends(text.strip(), response)
        if not text.strip() or is_end or (response.is_cut and start == len(response.own)):
            found.append((text, Place(0, 0, 0)))
        elif each is None:
            raise BadWeightsError(
                f"the chat template changes the text of message {number}; give weights per token or message"
            )
        else:
            known = _Known(start, num_before[number], len(each) - len(each.rstrip()))
            found.append(_in_a_form(_without_ends(text, each, response), response, known))
    return found


def _in_a_form(text: str, response: Response, known: _Known | None) -> tuple[str, Place]:
    try:
        return text, find(text, response, known)
    except BadWeightsError:
        in_nfc = unicodedata.normalize("NFC", text)
        if in_nfc == text:
            raise
        return in_nfc, find(in_nfc, response, known)


def _aligned(printed: str, response: Response, places: Sequence[int], before: bool = True) -> list[int]:
    """Return where places of a printed response are in one that was tokenised, which may have other white space, or be in NFC.

    A place has as much of the white space in front of it as in print, or all of it unless `before`. In a response that was cut
    what is behind the cut is at its end.

    Raises:
        BadWeightsError: They differ in more than that.
    """
    body = response.own if response.is_cut else response.text
    while response.is_cut and body and _is_broken(body[-1]):
        body = body[:-1]
    solid = [at for at, each in enumerate(body) if not each.isspace()]
    for form in ("", "NFC"):
        heads = [_normal(form, printed[:place]) for place in places]
        shared = _normal(form, printed)[: max(map(len, heads), default=0)]
        if _is_beginning("".join(shared.split()), "".join(body.split()), response.is_cut):
            moved = (_moved_place(head, body, solid, before) for head in heads)
            return [len(response.own) if at is None else at for at in moved]
    raise BadWeightsError("the tokenizer changes the messages of the response; give weights per token")


def _normal(form: str, text: str) -> str:
    return unicodedata.normalize("NFC", text) if form else text


def _is_beginning(text: str, body: str, is_cut: bool) -> bool:
    return body.startswith(text) or (is_cut and text.startswith(body))


def _moved_place(head: str, body: str, solid: Sequence[int], before: bool) -> int | None:
    """Return the place in a body behind as many characters, without white space, as a head has; None if there are fewer."""
    num_solid = len("".join(head.split()))
    if num_solid > len(solid):
        return None
    low = solid[num_solid - 1] + 1 if num_solid else 0
    high = solid[num_solid] if num_solid < len(solid) else len(body)
    return min(low + len(head) - len(head.rstrip()), high) if before else high


def _written(
    weights: np.ndarray, texts: Sequence[str], places: Sequence[tuple[str, Place]], response: Response
) -> np.ndarray:
    """Return the weights of a response's characters from those of the texts in it; NaN where no text stands."""
    found = np.full(len(response.text), np.nan, np.float32)
    for start, text, (form, (at, low, high)) in zip(_starts(texts), texts, places, strict=True):
        of_text = weights[start : start + len(text)]
        of_text = of_text if text.startswith(form) else composed(text, of_text)
        found[at : at + high - low] = of_text[low:high]
        if high > low and response.is_cut and _is_broken(response.own[at + high - low - 1 :]):
            found[at + high - low :] = of_text[high - 1]  # other bytes of the character that the cut has split
    return found


def _starts(texts: Sequence[str]) -> list[int]:
    """Return where each text begins among the characters of all."""
    return np.cumsum([0, *map(len, texts)])[:-1].tolist()  # type: ignore[no-any-return]


def _num_shared(a: str, b: str) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_broken(text: str) -> bool:
    """Return whether text is nothing but bytes of a character that is not whole, or empty."""
    return all("\udc80" <= each <= "\udcff" for each in text)


def _without_ends(text: str, printed: str, response: Response) -> str:
    """Return a text of a message without ends of turns behind it, which the template prints once."""
    end = len(text) - len(text.lstrip()) + len(printed.strip())
    return text[:end] if text[end:].strip() and _are_ends(text[end:].strip(), response) else text


def _are_ends(text: str, response: Response) -> bool:
    """Return whether text is nothing but ends of turns, which the tokenizer writes once."""
    while text:
        end = next(filter(text.startswith, response.ends), None)
        if end is None:
            return False
        text = text.removeprefix(end).strip()
    return True
