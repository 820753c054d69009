"""Tokens as HTML, and their numbers in the compact form that the page's script reads.

A text of a token is data of strangers: everything goes through `visible` and `escape`.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

import numpy as np
from markupsafe import escape

from weights_store.inspection.pairs import ShownPair, ShownSide

NUM_STEPS = 8
"""Steps of colour on each side of the neutral one."""
FULL_LOG2 = 2.0
"""|log2 of the weight| from which on the colour is full: a quarter, or four times."""
_MIN_SHARED_TOKENS, _MIN_SHARED_SHARE = 4, 0.25
"""A run of tokens that both responses have is aligned if it is this long, and if such runs make up this share of both."""
_MARKS = {" ": "␣", "\t": "⇥", "\n": "↵\n", "\r": "␍", "\x7f": "␡"}
_HIDDEN = re.compile(
    # Controls but for tab and newline, surrogates without a partner, and marks that reorder or hide the text around them.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


_JOINERS = "\u200c\u200d"
"""Invisible, but part of emoji and of Persian and Indic words: they show only where they stand alone."""


def visible(text: str, max_characters: int = 2_000) -> str:
    """Return a token's text with white space that stands alone, controls and marks of direction made visible.

    A longer text than `max_characters` is cut, and its length is said.
    """
    if len(text) > max_characters:
        text = f"{text[:max_characters]}… ({len(text):,} characters)"
    if text.isspace():
        text = "".join(_MARKS.get(character, character) for character in text)
    else:
        text = text.replace("\n", "↵\n").replace("\t", "⇥\t")
    if text and not text.strip(_JOINERS):
        return "".join(f"⟨U+{ord(character):04X}⟩" for character in text)
    return name_hidden(text)


def name_hidden(text: str) -> str:
    """Return a text with a visible sign for each character that hides or reorders what stands around it."""
    return _HIDDEN.sub(_named, text)


def _named(match: re.Match[str]) -> str:
    """Return a visible sign for a character that has none: a picture of a control, or its code."""
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\ufffd" if 0xD800 <= code < 0xE000 else f"⟨U+{code:04X}⟩"


def step_of(weights: np.ndarray) -> np.ndarray:
    """Return the step of colour of each weight, -8 to 8: 0 within a twelfth of a doubling of 1. Weights of 0 get -8."""
    with np.errstate(divide="ignore"):
        share = np.log2(weights.astype(np.float64)) / FULL_LOG2
    return np.rint(np.clip(share, -1, 1) * NUM_STEPS).astype(int)


def side_html(side: ShownSide, start: int, stop: int) -> str:
    """Return the tokens `start` to `stop` of one response as HTML: `<i class=...>text</i>` each.

    Classes: `l1` to `l8` below 1, `h1` to `h8` above; `s` a special token, `e` a further token of one character.
    """
    steps = step_of(np.asarray(side.measures["weight"][start:stop]))
    parts = []
    for text, is_special, step in zip(side.texts[start:stop], side.is_special[start:stop], steps.tolist(), strict=True):
        names = [f"{'h' if step > 0 else 'l'}{abs(step)}"] if step else []
        if is_special:
            names.append("s")
        elif not text:
            names.append("e")
        classes = "" if not names else f" class={names[0]}" if len(names) == 1 else f' class="{" ".join(names)}"'
        shown = visible(text)
        # The space before a word stays outside: at the end of a line it would be a coloured stub.
        word = shown.lstrip(" ")
        parts.append(f"{shown[: len(shown) - len(word)]}<i{classes}>{escape(word)}</i>")
    return "".join(parts)


def rows_of(pair: ShownPair) -> Iterator[tuple[str, str, bool]]:
    """Yield the rows of a pair: HTML of a part of chosen, of rejected, and whether both parts are the same tokens."""
    for same, (a, b), (c, d) in _aligned(pair.chosen.ids, pair.rejected.ids):
        yield side_html(pair.chosen, a, b), side_html(pair.rejected, c, d), same


def _aligned(chosen: Sequence[int], rejected: Sequence[int]) -> Iterator[tuple[bool, tuple[int, int], tuple[int, int]]]:
    """Yield ranges of both responses, in order: runs that both have, and what differs between them."""
    blocks = SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks()
    shared = [block for block in blocks if block.size >= _MIN_SHARED_TOKENS]
    if sum(block.size for block in shared) < _MIN_SHARED_SHARE * max(len(chosen), len(rejected)):
        shared = []
    a = b = 0
    for block in shared:
        if block.a > a or block.b > b:
            yield False, (a, block.a), (b, block.b)
        a, b = block.a + block.size, block.b + block.size
        yield True, (block.a, a), (block.b, b)
    if a < len(chosen) or b < len(rejected) or not shared:
        yield False, (a, len(chosen)), (b, len(rejected))


def packed(values: Sequence[float] | np.ndarray) -> str:
    """Return numbers as base64 of little-endian float16: three significant digits in 2.7 characters a number."""
    halves = np.clip(np.asarray(values, np.float64), -65504, 65504).astype("<f2")
    return base64.b64encode(halves.tobytes()).decode()


def packed_indices(values: Sequence[int], num_bytes: int) -> str:
    """Return whole numbers as base64 of little-endian unsigned integers of 2 or 4 bytes."""
    return base64.b64encode(np.asarray(values, f"<u{num_bytes}").tobytes()).decode()
