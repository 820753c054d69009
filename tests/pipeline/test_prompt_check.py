"""What a contrastive pair says about a sample: numbers by hand, words, and the whole check with a made-up engine."""

import dataclasses
import re

import numpy as np
import pytest

import tokenweights
from pipeline.prompt_check import Figures, check_lines, check_prompts, figures, figures_of_all, verdict
from tests.pipeline.stages.test_score import interpreter
from weights_store.errors import InputError

REF = {"chosen": [np.array([-1.0, -1.0]), np.array([-1.0])], "rejected": [np.array([-1.0]), np.array([-1.0, -1.0])]}


def logps(*values):
    """Log-probs of two pairs: chosen of both, then rejected of both."""
    one, two, three, four = (np.array(each) for each in values)
    return {"chosen": [one, two], "rejected": [three, four]}


POSITIVE = logps([-0.5, -1.0], [-0.5], [-1.0], [-1.0, -0.5])
NEGATIVE = logps([-1.0, -2.0], [-1.0], [-2.0], [-1.0, -1.5])
# Log-ratios: chosen (0.5, 1.0) and (0.5); rejected (1.0) and (0.0, 1.0).


def test_figures_by_hand():
    found = figures(POSITIVE, NEGATIVE, REF, (0.0, 1.0))
    assert (found.num_pairs, found.num_tokens) == (2, 6)
    assert found.size == pytest.approx(4.0 / 6)
    assert found.share_clamped == pytest.approx(4 / 6)  # 1, 1, 0 and 1 lie at an end
    # Means of the responses: 0.75, 0.5, 1 and 0.5, on average 0.6875.
    assert found.spread == pytest.approx(np.sqrt((0.0625**2 + 2 * 0.1875**2 + 0.3125**2) / 3))
    # Differences of the pairs: -0.25 and 0; standard deviation 0.25 / sqrt 2, over sqrt 2.
    assert (found.margin, found.margin_error) == (pytest.approx(-0.125), pytest.approx(0.125))
    assert found.accuracy == 0.5  # sums: 1.5 against 1, and 0.5 against 1
    # From the reference: 0.5, 0, 0.5, 0, 0, 0.5 and 0, 1, 0, 1, 0, 0.5.
    assert found.moved == (pytest.approx(1.5 / 6), pytest.approx(2.5 / 6))


def test_a_tie_counts_half():
    same = logps([-1.0, -1.0], [-1.0], [-1.0], [-1.0, -1.0])
    assert figures(same, same, REF, (0.0, 1.0)).accuracy == 0.5
    assert figures(POSITIVE, POSITIVE, REF, (-1.0, 1.0)).size == 0


def test_the_average_is_that_of_the_log_ratios():
    # The second pair of prompts is the first one reversed, so the average says nothing.
    several = {"ref": REF, "positive": POSITIVE, "negative": NEGATIVE, "positive2": NEGATIVE, "negative2": POSITIVE}
    found = figures_of_all(several, 2, (-0.5, 1.5))
    assert list(found) == ["1", "2", "average"]
    assert found["1"].size == found["2"].size > 0
    assert found["average"].size == 0
    assert list(figures_of_all(several, 1, (-0.5, 1.5))) == ["1"]


def test_the_interval_is_wilsons():
    # 8 of 10, as in statsmodels' proportion_confint(8, 10, method="wilson").
    found = dataclasses.replace(CLEAR, num_pairs=10, accuracy=0.8)
    assert found.interval == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))


CLEAR = Figures(100, 5000, 0.4, 0.1, 0.2, 0.08, 0.01, 0.8, (0.5, 0.6))
CHANCE = dataclasses.replace(CLEAR, margin=0.005, accuracy=0.52)


@pytest.mark.parametrize(
    ("found", "dtype", "words"),
    [
        (CLEAR, "float32", r"^says something: it prefers the chosen response in 80% of the pairs \(71% to 87%\)$"),
        (CHANCE, "float32", "^says little: .*may be chance; try prompts that name what the annotators judged"),
        (dataclasses.replace(CHANCE, moved=(0.04, 0.01)), "float32", 'try contrast.role = "user", .* hardly acts on them$'),
        (dataclasses.replace(CHANCE, size=0.1), "float32", "differ in one word, the attribute: these two move .* alike$"),
        (dataclasses.replace(CLEAR, size=0.03), "bfloat16", r"rounding of bfloat16 \(0.04\); set score.dtype .* again$"),
        (dataclasses.replace(CLEAR, size=1e-4), "float32", r"rounding of float32 \(0.001\); try prompts that differ"),
        (dataclasses.replace(CLEAR, size=0.03), "float32", "^says something"),
        (dataclasses.replace(CLEAR, margin=-0.08, accuracy=0.2), "float32", "^is the wrong way round: .*exchange the two"),
        (dataclasses.replace(CLEAR, margin=-0.08), "float32", "^is unclear: .*the length of the responses decides"),
        (dataclasses.replace(CHANCE, margin=0.03), "float32", "^says something"),  # three standard errors
    ],
)  # fmt: skip
def test_the_verdict_is_one_line_with_what_to_try(found, dtype, words):
    assert re.search(words, verdict(found, dtype))
    assert "\n" not in verdict(found, dtype)


@pytest.fixture
def recipe_with(make_recipe, toy_pairs, write_jsonl, tmp_path):
    """Return a function that makes a recipe whose scorer is the made-up engine."""
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:12])
    python = {"score.python": str(interpreter(tmp_path))}
    return lambda **settings: make_recipe(**python, **settings)


def test_the_command_scores_every_pair_of_prompts_and_leaves_nothing_behind(recipe_with, tmp_path, monkeypatch, capsys):
    prompts = {"contrast.positive_prompt": ["good", "kind"], "contrast.negative_prompt": ["bad", "unkind"]}
    recipe, checks = recipe_with(**{"contrast.method": "prompt", **prompts}), []
    monkeypatch.setattr("pipeline.recipe.load_recipe", lambda *_: recipe)
    monkeypatch.setattr("pipeline.prompt_check.check_lines", lambda check: checks.append(check) or check_lines(check))
    assert tokenweights.main(["check-prompts", "recipe.toml", "--pairs", "8"]) == 0
    (check,) = checks
    assert list(check.figures) == ["1", "2", "average"]
    assert {found.num_pairs + check.num_unscored for found in check.figures.values()} == {8}
    assert (check.clamp, check.dtype) == ((-0.5, 1.5), "float32")
    # The made-up engine's log-probs change with the ids of the prompt.
    assert 0 < check.figures["average"].size < max(check.figures[name].size for name in "12")
    assert all(0.1 < moved < 2 for found in check.figures.values() for moved in found.moved)
    text = capsys.readouterr().out
    assert re.match(
        r"8 pairs, \d+ response tokens, of a sample of the first 10,000 rows of .*; scored in float32\n", text
    )
    assert "1 + good\n1 − bad\n2 + kind\n2 − unkind\n" in text
    assert re.findall(r"^(pair 1|pair 2|the average of the pairs) (?:says|is) ", text, re.MULTILINE) == [
        "pair 1", "pair 2", "the average of the pairs"
    ]  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_a_pair_that_is_trained_has_no_prompts_to_check(recipe_with):
    with pytest.raises(InputError, match="contrast.method is 'dpo', which has no prompts to check; --set"):
        check_prompts(recipe_with())
