"""The view in a terminal: what it shows, and what must never reach it."""

import dataclasses
import re
import unicodedata

import pytest

from weights_store.inspection.ansi import (
    MAX_STEP,
    choose_colours,
    render,
    safe,
    step_of,
    style_of,
)
from weights_store.inspection.measures import ABOVE, BELOW

NAME = "hh-harmless/tis-dpo"
OURS = re.compile(r"\x1b\[(?:0|2|38;5;\d+;48;5;\d+|38;2;\d+;\d+;\d+;48;2;\d+;\d+;\d+)m")
HOSTILE = {
    "\x1b[2J": r"\x1b[2J",
    "\x9b31m": r"\x9b31m",
    "\x1b]0;owned\x07": r"\x1b]0;owned\x07",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\ud800": r"\ud800",
    "a\rb": r"a\rb",
    "\x00\x08": r"\x00\x08",
    "\u2066x\u2069": r"\u2066x\u2069",
    "\u2028": r"\u2028",
}


def text_of(lines):
    return OURS.sub("", "\n".join(lines))


def width_of(line):
    letters = [letter for letter in OURS.sub("", line) if unicodedata.category(letter) not in ("Mn", "Me")]
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in letters)


@pytest.fixture(scope="module")
def view(read_store, texts):
    return read_store.view(NAME, pairs=["a", "b"], tokenizer=texts)


def with_texts(view, *shown):
    """Return the view with other texts of the first pair's chosen response."""
    pair = view.pairs[0]
    chosen = dataclasses.replace(pair.chosen, texts=shown, is_special=[False] * len(shown))
    return dataclasses.replace(view, pairs=[dataclasses.replace(pair, chosen=chosen, prompt="".join(shown))])


@pytest.mark.parametrize(("text", "shown"), HOSTILE.items(), ids=list(HOSTILE.values()))
@pytest.mark.parametrize("colours", ["none", "256", "truecolor"])
def test_nothing_of_a_text_is_obeyed_by_the_terminal(view, text, shown, colours):
    lines = list(render(with_texts(view, "Yes", text, "</s>"), 200, colours))
    rest = text_of(lines)
    assert all(letter.isprintable() or letter == "\n" for letter in rest)
    assert rest.count(shown) == 2  # in the prompt and in the response
    assert rest.encode("utf-8")


def test_names_and_selections_are_made_safe_too(view):
    pair = dataclasses.replace(view.pairs[0], pair_id="p\x1b[31m", split="s\x9b")
    lines = list(render(dataclasses.replace(view, pairs=[pair], selection="with \u202e"), 80, "256"))
    assert all(letter.isprintable() or letter == "\n" for letter in text_of(lines))


def test_line_breaks_are_visible_and_joiners_stay():
    assert safe("a\n\tb") == "a↵\n⇥b"
    assert safe("👩\u200d👧 می\u200cخواهم") == "👩\u200d👧 می\u200cخواهم"


def test_runs_of_the_same_step_stand_together_with_their_mean(view):
    # a: Yes 1.0, sir 2.0, EOS 0.5; No 0.25, EOS 1.0. b: caf 4, EOS 1, é 0.5, EOS 1.5; ! 2, Yes 1.5 (one step), EOS 1.
    lines = list(render(view, 80, "none"))
    assert "  Yes ‹sir›2‹⟦</s>⟧›0.5" in lines
    assert "  ‹No›0.25⟦</s>⟧" in lines
    assert "  ‹!›2‹Yes›1.5⟦</s>⟧" in lines
    assert not any("\x1b" in line for line in lines)
    sixes = dataclasses.replace(view.pairs[0].chosen, measures={"weight": [2.0, 2.1, 0.5]})
    lines = render(dataclasses.replace(view, pairs=[dataclasses.replace(view.pairs[0], chosen=sixes)]), 80, "none")
    assert "  ‹Yes sir›2‹⟦</s>⟧›0.5" in list(lines)  # (2.0 + 2.1) / 2 = 2.05


def test_colours_are_closed_at_the_end_of_every_line(view):
    lines = list(render(view, 30, "256"))
    opened = [line for line in lines if "\x1b" in line]
    assert len(opened) > 4
    assert all(len(OURS.findall(line)) % 2 == 0 and OURS.findall(line)[-1] == "\x1b[0m" for line in opened)
    blue, orange = style_of(-4, "256"), style_of(4, "256")
    assert any(f"{blue}No\x1b[0m" in line for line in lines)
    assert any(f"{orange} caf\x1b[0m" in line for line in lines)
    assert any("\x1b[2mQ?\x1b[0m" in line for line in lines)  # the prompt is dimmed


@pytest.mark.parametrize(
    ("weight", "step"),
    [(1.0, 0), (1.18, 0), (1.2, 1), (2.0, 2), (4.0, 4), (211.0, 4), (0.5, -2), (0.25, -4), (0.0, -4), (-1.0, -4)],
)
def test_steps_are_halves_of_log2_around_1(weight, step):
    assert step_of(weight) == step


def luminance(colour):
    parts = [value / 255 for value in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", ["256", "truecolor"])
def test_text_has_the_contrast_of_wcag_aa_on_every_step(colours):
    levels = (0, 95, 135, 175, 215, 255)

    def indexed(number):
        return tuple(levels[place] for place in ((number - 16) // 36, (number - 16) // 6 % 6, (number - 16) % 6))

    for step in range(-MAX_STEP, MAX_STEP + 1):
        if step == 0:
            assert style_of(step, colours) == ""
            continue
        numbers = [int(number) for number in re.findall(r"\d+", style_of(step, colours))]
        pair = (indexed(numbers[2]), indexed(numbers[5])) if colours == "256" else (numbers[2:5], numbers[7:10])
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, step
        red, _, blue = pair[1]
        assert (blue > red) == (step < 0)


def test_the_ends_of_the_scale_are_those_of_the_page():
    assert style_of(-MAX_STEP, "truecolor").endswith("48;2;{};{};{}m".format(*BELOW))
    assert style_of(MAX_STEP, "truecolor").endswith("48;2;{};{};{}m".format(*ABOVE))


@pytest.mark.parametrize("width", [20, 33, 80])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(view, width):
    texts = ["Überlänge ohne jede Lücke " + "x" * 90, " 한국어로 된 텍스트 " * 9, "e\u0301" * 50]
    lines = list(render(with_texts(view, *texts), width, "truecolor"))
    assert max(map(width_of, lines)) <= width
    assert OURS.sub("", "".join(lines)).replace(" ", "").count("".join(texts).replace(" ", "")) >= 1


@pytest.mark.parametrize(
    ("is_terminal", "environment", "colours"),
    [
        (True, {"TERM": "xterm"}, "256"),
        (True, {"COLORTERM": "truecolor"}, "truecolor"),
        (True, {"NO_COLOR": "1", "COLORTERM": "truecolor"}, "none"),
        (True, {"NO_COLOR": ""}, "256"),  # no-color.org: only if it is not empty
        (True, {"TERM": "dumb"}, "none"),
        (False, {"COLORTERM": "truecolor"}, "none"),
        (False, {"FORCE_COLOR": "1"}, "256"),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, "none"),
    ],
)
def test_colours_follow_the_terminal_and_its_conventions(is_terminal, environment, colours):
    assert choose_colours(is_terminal, environment) == colours


def test_ids_are_kept_apart(read_store):
    lines = list(render(read_store.view(NAME, pairs=["a"]), 80, "none"))
    assert "  #3 ‹#4›2 ‹⟦#9⟧›0.5" in lines


def test_two_datasets_show_both_weights(read_store, texts):
    view = read_store.view(NAME, "hh-harmless/reversed", pairs=["a"], tokenizer=texts)
    text = text_of(render(view, 200, "none"))
    assert "chosen by hh-harmless/tis-dpo@1, mean weight 1.17\n  Yes ‹sir›2‹⟦</s>⟧›0.5" in text
    assert "chosen by hh-harmless/reversed@0, mean weight 1.17\n  Yes ‹sir›0.5‹⟦</s>⟧›2" in text
    assert "4 pairs in both; 0 only in the first, 0 only in the second; 0 with other tokens" in text
    assert "disagreement 1.60" in text
