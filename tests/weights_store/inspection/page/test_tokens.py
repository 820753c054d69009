"""Tokens as HTML: colours, marks, alignment, and text that must not act."""

import base64
import re

import numpy as np
import pytest

from tests.weights_store.inspection.page.conftest import make_pair, make_side
from weights_store.inspection.page.tokens import packed, packed_indices, rows_of, side_html, step_of, visible


def test_steps_are_eighths_of_two_doublings():
    # log2: -2, -1, -0.25, 0, 0.5, 2, far beyond; an eighth of two doublings is a quarter of one
    weights = np.array([0.25, 0.5, 2**-0.25, 1.0, 2**0.5, 4.0, 211.0, 0.0])
    assert step_of(weights).tolist() == [-8, -4, -1, 0, 2, 8, 8, -8]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" word", " word"),
        ("  ", "␣␣"),
        ("a\nb", "a↵\nb"),
        ("\n\n", "↵\n↵\n"),
        ("\x00\x1b[31m", "␀␛[31m"),
        ("\u202eevil\u2066", "⟨U+202E⟩evil⟨U+2066⟩"),
        ("\ud800", "\ufffd"),
        ("\x9b", "⟨U+009B⟩"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # a joiner inside a word is part of it
        ("\u200d", "⟨U+200D⟩"),
        ("a\U000e0041", "a⟨U+E0041⟩"),  # invisible, but models read it
        ("שלום", "שלום"),
        ("x" * 1_000_000, "x" * 2_000 + "… (1,000,000 characters)"),
    ],
)
def test_what_has_no_shape_of_its_own_is_made_visible(text, shown):
    assert visible(text) == shown


def test_markup_in_a_token_is_text():
    html = side_html(make_side([5], [1.0]), 0, 1)
    assert html == "<i>&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;</i>"


def test_a_token_has_its_step_and_its_kind_as_classes():
    html = side_html(make_side([1, 10, 9, 3], [4.0, 0.25, 1.0, 1.0]), 0, 4)
    assert html == '<i class=h8>I</i><i class="l8 s">&lt;eos&gt;</i><i class=e></i> <i>sorry</i>'


def test_shared_runs_stand_in_rows_of_their_own():
    shared = [3, 3, 2, 3]
    chosen, rejected = make_side([1, *shared, 2], [1.0] * 6), make_side([*shared, 4, 10], [1.0] * 6)
    rows = [
        (re.sub("<[^>]*>", "", a), re.sub("<[^>]*>", "", b), same)
        for a, b, same in rows_of(make_pair("p", chosen, rejected, 0, 1))
    ]
    middle = " sorry sorry am sorry"
    assert rows == [("I", "", False), (middle, middle, True), (" am", "↵\n&lt;eos&gt;", False)]


def test_responses_with_little_in_common_are_one_row():
    chosen, rejected = make_side([1, 2, 3, 10], [1.0] * 4), make_side([2, 1, 10], [1.0] * 3)
    assert len(list(rows_of(make_pair("p", chosen, rejected, 0, 1)))) == 1


def test_no_token_is_lost_in_rows():
    rng = np.random.default_rng(3)
    for _ in range(50):
        ids = [rng.integers(1, 4, size=rng.integers(1, 40)).tolist() for _ in range(2)]
        sides = [make_side(each, [1.0] * len(each)) for each in ids]
        rows = list(rows_of(make_pair("p", *sides, 0, 1)))
        assert "".join(a for a, _, _ in rows) == side_html(sides[0], 0, len(ids[0]))
        assert "".join(b for _, b, _ in rows) == side_html(sides[1], 0, len(ids[1]))
        assert all(a == b for a, b, same in rows if same)


def test_numbers_keep_three_digits():
    values = [0.0, 1.0, -13.37, 211.4, 1e-3, -65_000.0, 1e9]
    read = np.frombuffer(base64.b64decode(packed(values)), "<f2").astype(float)
    np.testing.assert_allclose(read, [*values[:-1], 65504.0], rtol=5e-4)


@pytest.mark.parametrize("num_bytes", [2, 4])
def test_indices_come_back(num_bytes):
    values = [0, 1, 65_535]
    assert np.frombuffer(base64.b64decode(packed_indices(values, num_bytes)), f"<u{num_bytes}").tolist() == values
