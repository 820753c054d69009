r"""A `View` as text for a terminal: the prompt dimmed, both responses, tokens coloured by their weight.

Nothing of a dataset reaches the terminal unchecked: control characters, escape sequences and marks that turn the direction of
text are written out (`\x1b`, `\u202e`). Blue is below 1, orange above, in half steps of log2, as the background of black or
white text, which is readable on dark and light terminals. Without colours, runs of tokens stand in ‹ › with their mean weight.
"""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from weights_store.inspection.measures import colour_at, is_light
from weights_store.inspection.pairs import ShownPair, ShownSide
from weights_store.inspection.view import View
from weights_store.printing import GAP, count_text, one_line

Colours = Literal["none", "256", "truecolor"]

MAX_STEP = 4
"""Half steps of log2 from 1 to the ends of the scale: 1/4 and 4."""
_LEVELS = (0, 95, 135, 175, 215, 255)
"""Of each colour in the 6 x 6 x 6 cube of terminals with 256 colours."""
_INDEXED = {
    -4: (0, 1, 3), -3: (1, 2, 3), -2: (2, 3, 4), -1: (3, 4, 5), 1: (5, 4, 3), 2: (5, 3, 1), 3: (4, 2, 0), 4: (3, 1, 0)
}  # fmt: skip
"""By step, the places in that cube: chosen by eye, because the nearest ones to the scale's light ends are grey."""
_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_BREAK = "\n"
_JOINERS = "\u200c\u200d"
"""Invisible, but part of emoji and of Persian and Indic words, and harmless."""
_SHOWN_AS = {"\n": f"↵{_BREAK}", "\t": "⇥"}


class _Cell(NamedTuple):
    """One character on the terminal."""

    glyph: str
    style: str
    """The escape sequence before it; empty for the terminal's own colours."""

    @property
    def width(self) -> int:
        """Columns that it takes."""
        if self.glyph in _JOINERS or unicodedata.category(self.glyph) in ("Mn", "Me"):
            return 0
        return 2 if unicodedata.east_asian_width(self.glyph) in "WF" else 1


def choose_colours(is_terminal: bool, environment: Mapping[str, str]) -> Colours:
    """Return the colours to use: none in a pipe, or if `NO_COLOR` is set (no-color.org); `FORCE_COLOR` is for `less -R`."""
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return "none"
    if not (is_terminal or environment.get("FORCE_COLOR")):
        return "none"
    return "truecolor" if environment.get("COLORTERM") in ("truecolor", "24bit") else "256"


def render(view: View, width: int, colours: Colours) -> Iterator[str]:
    """Yield the lines of a view, each at most `width` columns wide and with no style left open."""
    against = f" against {view.other}" if view.other else ""
    yield from _plain(f"{view.title}{against}: {view.selection}", width)
    for diagnosis in view.diagnoses:
        yield from _plain(f"{diagnosis.severity}: {diagnosis.figure}", width)
    if view.comparison is not None:
        yield from _plain(_comparison_text(view.comparison), width)
    yield from _wrapped(_legend(colours), width, "")
    for pair in view.pairs:
        yield ""
        yield from _pair(view, pair, width, colours)


def step_of(weight: float) -> int:
    """Return the half step of log2 that a weight is shown as, -4 to 4; 0 is from 0.84 to 1.19."""
    return -MAX_STEP if weight <= 0 else round(max(-MAX_STEP, min(MAX_STEP, 2 * math.log2(weight))))


def style_of(step: int, colours: Colours) -> str:
    """Return the escape sequence of a step: background and text, black or white, whichever has more contrast."""
    if colours == "none" or step == 0:
        return ""
    if colours == "256":
        red, green, blue = _INDEXED[step]
        text = "16" if is_light((_LEVELS[red], _LEVELS[green], _LEVELS[blue])) else "231"
        return f"\x1b[38;5;{text};48;5;{16 + 36 * red + 6 * green + blue}m"
    red, green, blue = colour_at(step / MAX_STEP)
    text = "0;0;0" if is_light((red, green, blue)) else "255;255;255"
    return f"\x1b[38;2;{text};48;2;{red};{green};{blue}m"


def safe(text: str) -> str:
    """Return a text that a terminal shows and does not obey; a line break is `↵` and a new line, a tab is `⇥`."""
    return "".join(
        _SHOWN_AS.get(letter) or (letter if letter.isprintable() or letter in _JOINERS else repr(letter)[1:-1])
        for letter in text
    )


# --- parts -------------------------------------------------------------------------------------------------------------


def _pair(view: View, pair: ShownPair, width: int, colours: Colours) -> Iterator[str]:
    facts = [f"pair {pair.pair_id}", pair.split]
    if pair.pair_logratio is not None:
        facts.append(f"log-ratio {pair.pair_logratio:+.2f} nats")
    facts.append(f"effective share {pair.effective_share:.2f}")
    if pair.disagreement is not None:
        facts.append(f"disagreement {pair.disagreement:.2f}")
    yield from _plain(GAP.join(facts), width)
    yield "prompt"
    yield from _wrapped(_cells(pair.prompt, "" if colours == "none" else _DIM), width)
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        weights = side.measures["weight"]
        if not len(side.ids):
            yield from _plain(f"{name}: none", width)
            continue
        of = f" by {view.title}" if view.other else ""
        yield from _plain(f"{name}{of}, mean weight {_mean(weights):.2f}", width)
        yield from _wrapped(_tokens(side, weights, colours, not view.token_texts), width)
        if side.other_weights is not None:
            yield from _plain(f"{name} by {view.other}, mean weight {_mean(side.other_weights):.2f}", width)
            yield from _wrapped(_tokens(side, side.other_weights, colours, not view.token_texts), width)
        elif view.other:
            yield from _plain(
                f"{name}: {view.other} has other tokens for this pair, so its weights are not shown", width
            )


def _tokens(side: ShownSide, weights: Sequence[float], colours: Colours, are_ids: bool) -> Iterator[_Cell]:
    """Yield the characters of a response, runs of tokens of the same step together."""
    for step, run in groupby(range(len(weights)), lambda place: step_of(weights[place])):
        places = list(run)
        text = "".join(_boxed(side.texts[place], side.is_special[place], are_ids) for place in places)
        style = style_of(step, colours)
        if step and colours == "none" and text:
            marked = text.strip(" ") or text  # a line may break at the spaces around the mark
            before, _, after = text.partition(marked)
            text = f"{before}‹{marked}›{_mean([weights[place] for place in places]):.2g}{after}"
        yield from _letters(text, style)


def _boxed(text: str, is_special: bool, is_id: bool) -> str:
    """Return a token's text, safe; special tokens are boxed, and ids need spaces between them."""
    shown = safe(text) + (" " if is_id else "")
    return f"⟦{shown.strip()}⟧{' ' if is_id else ''}" if is_special else shown


def _legend(colours: Colours) -> Iterator[_Cell]:
    if colours == "none":
        yield from _letters("weights: ‹text›2 has a mean of 2; text without a mark has 0.84 to 1.19", "")
    else:
        yield from _letters("weights: ", "")
        for step in range(-MAX_STEP, MAX_STEP + 1):
            yield from _letters(f" {2 ** (step / 2):.2g} ", style_of(step, colours))
    yield from _letters("   ⟦special token⟧   ↵ line break", "")


def _comparison_text(comparison: Mapping[str, object]) -> str:
    correlation, common = comparison["correlation"], comparison["num_common"]
    parts = [
        f"{count_text(int(str(common)), 'pair')} in both",
        f"{comparison['num_only_here']:,} only in the first, {comparison['num_only_there']:,} only in the second",
        f"{comparison['num_differing_tokens']:,} with other tokens",
        f"{comparison['num_disagreeing']:,} of {comparison['num_tokens']:,} tokens above 1 in one and below 1 in the other",
        "no correlation: one has constant weights" if correlation is None else f"correlation {correlation:.3f}",
    ]
    return "; ".join(parts)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else math.nan


# --- lines -------------------------------------------------------------------------------------------------------------


def _plain(text: str, width: int) -> Iterator[str]:
    return _wrapped(_letters(one_line(text), ""), width, "")


def _cells(text: str, style: str) -> Iterator[_Cell]:
    return _letters(safe(text), style)


def _letters(text: str, style: str) -> Iterator[_Cell]:
    return (_Cell(letter, style) for letter in text)


def _wrapped(cells: Iterable[_Cell], width: int, indent: str = GAP) -> Iterator[str]:
    """Yield lines of at most `width` columns, broken at spaces where there are any."""
    room = max(width - len(indent), 2)
    line: list[_Cell] = []
    used = 0
    for cell in cells:
        if cell.glyph == _BREAK:
            yield indent + _styled(line)
            line, used = [], 0
            continue
        while line and used + cell.width > room:
            cut = next((place + 1 for place in reversed(range(len(line))) if line[place].glyph == " "), len(line))
            yield indent + _styled(line[:cut])
            line = line[cut:]
            used = sum(each.width for each in line)
        line.append(cell)
        used += cell.width
    if line:
        yield indent + _styled(line)


def _styled(line: Sequence[_Cell]) -> str:
    """Return one line; no style outlives it, so that nothing bleeds into the next one."""
    parts = []
    for style, run in groupby(line, lambda cell: cell.style):
        text = "".join(cell.glyph for cell in run)
        parts.append(f"{style}{text}{_RESET}" if style else text)
    return "".join(parts).rstrip(" ")
