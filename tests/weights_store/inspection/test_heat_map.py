"""Heat maps of tokens: the scale, the contrast of texts, where lines break, and texts that no font shows."""

import math
import re

import pytest

from weights_store.errors import InputError
from weights_store.inspection.heat_map import WEIGHT_SCALE, Scale, Token, _wrap, colour, draw_pair, text_colour
from weights_store.inspection.pairs import ShownPair, ShownSide


def side(texts, weights):
    measures = {"weight": weights, "surprise": [-math.log(weight) for weight in weights]}
    ids = range(len(texts))
    return ShownSide(ids, texts, [text.startswith("<|") for text in texts], measures, [0] * len(texts))


def pair(chosen, rejected):
    return ShownPair("3f9c", "train", 0, "<|user|>\nWhy?\n", chosen, rejected, None, None, 1.0)


def test_the_scale_of_weights_is_even_in_their_logarithm():
    places = [WEIGHT_SCALE.position(weight) for weight in (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 211.0)]
    assert places == [-1, -1, -1, -0.5, 0, 0.5, 1, 1]
    assert [colour(place) for place in (-1, 0, 1)] == ["#2166ac", "#ffffff", "#b35806"]
    # Half way between white and orange: (255 + 179) / 2 = 217, (255 + 88) / 2 = 171.5, (255 + 6) / 2 = 130.5.
    assert colour(0.5) == "#d9ac82"


def test_a_scale_without_a_centre_begins_at_white():
    scale = Scale("surprise", 1.0, 5.0, [])
    assert [scale.position(value) for value in (1.0, 2.0, 5.0, math.nan)] == [0, 0.25, 1, 0]
    assert Scale("all the same", 2.0, 2.0, []).position(2.0) == 0


def luminance(shade):
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(factor * part for factor, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("place", [step / 20 for step in range(-20, 21)])
def test_every_text_can_be_read(place):
    shades = sorted(map(luminance, (colour(place), text_colour(place))))
    assert (shades[1] + 0.05) / (shades[0] + 0.05) >= 4.5


def places(*texts):
    return [(piece.line, piece.column, piece.text) for piece in _wrap([Token(text) for text in texts], 0)]


def test_lines_break_between_tokens_at_newlines_and_inside_what_is_longer_than_a_line():
    assert places("a\n", "\n\nb", " c") == [(0, 0, "a↵"), (1, 0, "↵"), (2, 0, "↵"), (3, 0, "b"), (3, 1, " c")]
    assert places("x" * 90, "seven77") == [(0, 0, "x" * 90), (1, 0, "seven77")]
    assert places("ab", "y" * 200) == [(0, 0, "ab"), (1, 0, "y" * 96), (2, 0, "y" * 96), (3, 0, "y" * 8)]


def test_what_cannot_be_printed_is_escaped_and_no_token_is_without_a_box():
    assert [text for _, _, text in places("\u202e", "\ud800", "\x07", "", "é")] == [
        "\\u202e",
        "\\ud800",
        "\\x07",
        "·",
        "é",
    ]


def test_a_figure_has_one_box_in_the_colour_of_each_weight():
    made = draw_pair(pair(side(["No", "<|end|>"], [4.0, 0.25]), side(["Yes $x_1$"], [2.0])), "svg").decode()
    assert made == draw_pair(pair(side(["No", "<|end|>"], [4.0, 0.25]), side(["Yes $x_1$"], [2.0])), "svg").decode()
    for text in ("prompt of pair 3f9c", "chosen", "rejected", "Yes $x_1$", "No", "weight", "≥ 4"):
        assert f"<!-- {text} -->" in made
    # Boxes have borders, the steps of the legend have the colour of their own.
    fills = re.findall(r'style="fill: (#\w+); stroke: (?:#d0d7de|#000000)', made)
    assert sorted(fills) == ["#2166ac", "#b35806", "#d9ac82"]


def test_a_huge_token_is_cut_after_one_line():
    made = draw_pair(pair(side(["x" * 1_000_000], [4.0]), side(["No"], [1.0])), "svg").decode()
    assert f"<!-- {'x' * 95}… -->" in made
    assert made.count("xxx") <= 95  # in one comment


def test_the_measure_must_be_one_of_the_pair():
    one = pair(side(["No"], [1.0]), side(["Yes"], [2.0]))
    with pytest.raises(InputError, match="no measure 'attribution' to colour by: expected one of weight, surprise"):
        draw_pair(one, "svg", "attribution")
    assert draw_pair(one, "png", "surprise").startswith(b"\x89PNG")
