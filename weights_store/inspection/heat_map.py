"""Heat maps of tokens for a paper: text in coloured boxes, one box per token, as SVG or PNG.

One scale for all figures: blue below its centre, white at it, orange above; colour-blind people can tell the two apart, and the
text in a box is black or white, whichever is easier to read. Special tokens have a black border.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from weights_store.errors import InputError
from weights_store.inspection.figure import Format, draw_figure
from weights_store.inspection.measures import MEASURES, colour_at, is_light
from weights_store.inspection.pairs import ShownPair, ShownSide
from weights_store.printing import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 96
"""Characters in a line."""
_SIZE_PT = 9.0
_ADVANCE = 0.602
"""Width of a character of DejaVu Sans Mono, in font sizes."""
_MONOSPACE = "DejaVu Sans Mono"
_SCALE_STEPS = 41
_EDGE = "#d0d7de"
_LINE = 1.75
"""Distance of two lines, in font sizes."""
_MAX_TOKENS = 600
"""A side of more tokens is cut, and says so: it would be longer than a page. A token is cut after one line."""
_MAX_PROMPT = 3 * _COLUMNS
_FULL = {"logratio": 2.0}
"""Distance from the centre at which the colour of a measure is full, in its unit, where the figures have a fixed scale."""


@dataclass(frozen=True)
class Scale:
    """From a token's number to a colour. `ticks` are the (number, text) pairs below the legend."""

    label: str
    low: float
    """The number at which the blue is full, …"""
    high: float
    """… and at which the orange is full."""
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False
    centre: float | None = None
    """The number at which boxes are white; None: `low` is white, and there is no blue."""

    def position(self, value: float) -> float:
        """Return where a number is: -1 full blue, 0 white, 1 full orange; NaN is white."""
        low, high, number = (self._log(each) for each in (self.low, self.high, value))
        middle = low if self.centre is None else self._log(self.centre)
        if math.isnan(number) or number == middle:
            return 0.0
        end = high if number > middle else low
        return 0.0 if end == middle else min(1.0, (number - middle) / (end - middle)) * (1 if number > middle else -1)

    def _log(self, value: float) -> float:
        if not self.is_log:
            return value
        return math.log2(value) if value > 0 else -math.inf


@dataclass(frozen=True)
class Token:
    """One box. Without a number it is plain text."""

    text: str
    value: float | None = None
    is_special: bool = False


@dataclass(frozen=True)
class Block:
    """One paragraph of a figure: a heading, unless it is empty, and tokens."""

    heading: str
    tokens: Sequence[Token]


WEIGHT_SCALE = Scale(
    "weight", 0.25, 4.0, ((0.25, "≤ ¼"), (0.5, "½"), (1.0, "1"), (2.0, "2"), (4.0, "≥ 4")), is_log=True, centre=1.0
)


def colour(position: float) -> str:
    """Return the colour, `#rrggbb`, of a position on a scale: -1 blue, 0 white, 1 orange."""
    return "#{:02x}{:02x}{:02x}".format(*colour_at(position))


def text_colour(position: float) -> str:
    """Return black or white, whichever has the larger contrast on the colour of a position: at least 4.5 on any."""
    return "#000000" if is_light(colour_at(position)) else "#ffffff"


def draw_pair(pair: ShownPair, format: Format, measure: str = "weight") -> bytes:
    """Return a figure of one pair: the prompt, and both responses with a box for each token (TIS-DPO's figures 4 and 5).

    `measure` is a name of `MEASURES` that the pair has. Weights have a fixed scale from ¼ to 4, log-ratios one from -2 to 2
    nats, so that figures of different pairs can be compared; other measures span the numbers of the pair.

    Raises:
        InputError: The pair does not have the measure.
        MissingExtraError: matplotlib is not installed.
    """
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    if measure not in pair.chosen.measures:
        known = ", ".join(pair.chosen.measures)
        raise InputError(f"pair {pair.pair_id} has no measure {measure!r} to colour by: expected one of {known}")
    prompt = f"…{pair.prompt[-_MAX_PROMPT:]}" if len(pair.prompt) > _MAX_PROMPT else pair.prompt
    words = [Token(word) for word in re.findall(r"\S+\s*|\s+", prompt)]
    blocks = [Block(f"prompt of pair {one_line(pair.pair_id, 64)}", words)]
    blocks += [Block(name, _tokens(side, measure)) for name, side in sides.items() if len(side.ids)]
    return draw_blocks(blocks, _scale(pair, measure), format)


def _tokens(side: ShownSide, measure: str) -> list[Token]:
    values = side.measures[measure]
    texts = [one if len(one) <= _COLUMNS else f"{one[: _COLUMNS - 1]}…" for one in side.texts]
    tokens = [Token(*each) for each in zip(texts, values, side.is_special, strict=True)]
    more = len(tokens) - _MAX_TOKENS
    return [*tokens[:_MAX_TOKENS], Token(f" … {more:,} more tokens")] if more > 0 else tokens


def _scale(pair: ShownPair, name: str) -> Scale:
    if name == "weight":
        return WEIGHT_SCALE
    measure = MEASURES[name]
    label = f"{measure.label}, {measure.unit}" if measure.unit else measure.label
    if name in _FULL and measure.centre is not None:
        low, high = measure.centre - _FULL[name], measure.centre + _FULL[name]
        ticks = [(low, f"≤ {low:g}"), (measure.centre, f"{measure.centre:g}"), (high, f"≥ {high:g}")]
        return Scale(label, low, high, ticks, centre=measure.centre)
    values = [value for side in (pair.chosen, pair.rejected) for value in side.measures[name] if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return Scale(label, low, high, [(low, f"{low:.3g}"), (high, f"{high:.3g}")])


# --- drawing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A part of a token that stands in one line."""

    line: int
    column: int
    width: int
    text: str
    token: Token


def draw_blocks(blocks: Sequence[Block], scale: Scale, format: Format) -> bytes:
    """Return a figure of headings and tokens, one under the other, with the scale below.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    headings: list[tuple[int, str]] = []
    pieces: list[_Piece] = []
    line = 0
    for block in blocks:
        if block.heading:
            headings.append((line, block.heading))
            line += 1
        of_block = list(_wrap(block.tokens, line))
        pieces += of_block
        line = max((piece.line for piece in of_block), default=line) + 2
    num_lines = line + 3  # the legend
    width, height = (_COLUMNS + 4) * _ADVANCE, num_lines * _LINE + 0.5

    def draw(figure: "Figure") -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-2, _COLUMNS + 2), ylim=(num_lines + 0.3, 0))
        for line, heading in headings:
            _write(axes, 0, line, heading, color="#57606a", weight="bold")
        for piece in pieces:
            _draw_piece(axes, piece, scale)
        _draw_scale(axes, scale, line=num_lines - 2)

    return draw_figure(draw, format, (width * _SIZE_PT / 72, height * _SIZE_PT / 72))


def _wrap(tokens: Sequence[Token], first_line: int) -> Iterator[_Piece]:
    """Yield tokens with their places. A token longer than the rest of a line begins the next one; newlines show as ↵."""
    line, column = first_line, 0
    for token in tokens:
        # A character of several tokens stands with its first one; the box of another one holds a dot.
        for part in (token.text or "·").splitlines(keepends=True):
            is_end = part.endswith("\n")
            shown = _drawable(f"{part[:-1]}↵" if is_end else part)
            if column and column + _width(shown) > _COLUMNS:
                line, column = line + 1, 0
            for text in _chunks(shown):
                if column and column + _width(text) > _COLUMNS:
                    line, column = line + 1, 0
                yield _Piece(line, column, _width(text), text, token)
                column += _width(text)
            if is_end:
                line, column = line + 1, 0


def _chunks(text: str) -> Iterator[str]:
    """Yield parts of a text that fit in a line."""
    chunk, width = "", 0
    for character in text:
        if width + _width(character) > _COLUMNS:
            yield chunk
            chunk, width = "", 0
        chunk, width = chunk + character, width + _width(character)
    if chunk:
        yield chunk


def _width(text: str) -> int:
    """Return the columns that a text takes: two for the wide characters of East Asia, none for marks on others."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def _draw_piece(axes: "Axes", piece: _Piece, scale: Scale) -> None:
    from matplotlib.patches import Rectangle

    token = piece.token
    position = 0.0 if token.value is None else scale.position(token.value)
    if token.value is not None:
        edge = "#000000" if token.is_special else _EDGE
        box = (piece.column, piece.line + 0.06)
        axes.add_patch(Rectangle(box, piece.width, 0.88, facecolor=colour(position), edgecolor=edge, lw=0.5))
    _write(axes, piece.column, piece.line, piece.text, color=text_colour(position))


def _draw_scale(axes: "Axes", scale: Scale, line: float) -> None:
    """Draw the scale as a row of small boxes: an image would not stay sharp in SVG."""
    from matplotlib.patches import Rectangle

    _write(axes, 0, line, scale.label, color="#000000")
    begin, width = len(scale.label) + 3.0, 40.0
    lowest = 0.0 if scale.centre is None else -1.0
    for index in range(_SCALE_STEPS):
        share = index / (_SCALE_STEPS - 1)
        box = (begin + width * index / _SCALE_STEPS, line + 0.1)
        shade = colour(lowest + share * (1 - lowest))
        axes.add_patch(Rectangle(box, width / _SCALE_STEPS, 0.8, facecolor=shade, edgecolor=shade, lw=0.2))
    axes.add_patch(Rectangle((begin, line + 0.1), width, 0.8, facecolor="none", edgecolor=_EDGE, lw=0.5))
    for value, text in scale.ticks:
        share = (scale.position(value) - lowest) / (1 - lowest)
        _write(axes, max(0.0, begin + width * share - len(text) / 2), line + 1, text, color="#000000")


def _write(axes: "Axes", column: float, line: float, text: str, color: str, weight: str = "normal") -> None:
    """Write text at a column. Characters that are not one column wide, or from another font, are placed one by one."""
    from matplotlib.font_manager import FontProperties

    fonts = {character: _font_file(character) for character in text}
    is_even = all(_width(character) == 1 and file == _font_file("a") for character, file in fonts.items())
    for part in [text] if is_even else text:
        file = _font_file("a") if is_even else fonts[part]
        font = FontProperties(size=_SIZE_PT, weight=weight, **({"family": _MONOSPACE} if is_even else {"fname": file}))
        if part.strip():
            axes.text(
                column, line + 0.5, part, color=color, va="center_baseline", parse_math=False, fontproperties=font
            )
        column += _width(part)


def _drawable(text: str) -> str:
    """Return text with escapes for what cannot be printed, or is in no font of this machine."""
    return "".join(each if each.isascii() or _font_file(each) else ascii(each)[1:-1] for each in one_line(text))


@cache
def _font_file(character: str) -> str | None:
    """Return a font that has a character: DejaVu Sans Mono, which comes with matplotlib, or any other; None if none has it."""
    from matplotlib import font_manager

    default = font_manager.findfont(_MONOSPACE)
    others = (font.fname for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name)
    return next(
        (file for file in (default, *others) if font_manager.get_font(file).get_char_index(ord(character))), None
    )
