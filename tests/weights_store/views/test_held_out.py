"""What is said of recorded figures: each verdict in its words, with the factor and what to do."""

import pytest

from weights_store.views.held_out import held_out_lines

RECORD = {"num_pairs": 1234, "log_likelihood": -0.6262, "log_likelihood_se": 0.0041, "accuracy": 0.614}
FIGURES = "log-likelihood -0.626 ± 0.004 nats a pair (chance -0.693), 61 % right in 1,234 pairs"
SET = 'set weights.scale = "calibrated"'


def line(**record):
    figures, (label, verdict) = held_out_lines({"held_out": {"tis": RECORD | record}})
    assert figures == ("held-out labels", FIGURES)
    assert label == "verdict"
    return verdict


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"multiplier": 0.07, "scale": 1.0}, f"the scores are 14 times overconfident: {SET}, or use no weights"),
        ({"multiplier": 0.07, "scale": 0.35}, f"the scores are 5.0 times overconfident: {SET}, or use no weights"),
        ({"multiplier": 0.07}, "the scores are 14 times overconfident"),  # of an estimator without a scale
    ],
)
def test_overconfidence_is_that_of_the_scores_as_they_are_used(record, words):
    assert line(**record, verdict="overconfident") == words


def test_every_other_verdict():
    assert (
        line(multiplier=3.0, scale=2.0, verdict="underconfident") == f"the scores are 1.5 times underconfident: {SET}"
    )
    assert line(multiplier=1.0, scale=1.0, verdict="calibrated") == "the scores are calibrated"
    assert line(multiplier=0.07, scale=0.07, verdict="calibrated").startswith(
        "the scores times 0.07 (weights.scale) are"
    )
    assert line(multiplier=0.0, verdict="no better than chance").endswith("chance: use other scores, or no weights")
    assert line(multiplier=-1.0, verdict="wrong way round").startswith("the scores predict the opposite of the labels")


def test_what_is_left_out_and_what_is_assumed_are_said():
    found = {"multiplier": 1.0, "scale": 1.0, "verdict": "calibrated", "num_seen_pairs": 5678}
    (_, text), _ = held_out_lines({"held_out": {"tis": RECORD | found | {"assumption": "so"}}})
    assert text == f"{FIGURES} (5,678 with prompts that the models were trained on are left out); assumed: so"


def test_figures_of_a_sample_say_of_how_many_pairs():
    found = {"multiplier": 1.0, "scale": 1.0, "verdict": "calibrated", "num_seen_pairs": 0, "num_unseen_pairs": 98765}
    (_, text), _ = held_out_lines({"held_out": {"tis": RECORD | found}})
    assert text == f"{FIGURES}, a sample of 98,765"


def test_a_comparison_with_dpo_counts_only_if_it_is_larger_than_its_error():
    found = {"multiplier": 1.0, "scale": 1.0, "verdict": "calibrated", "gain_over_dpo_se": 0.01}
    assert line(**found, gain_over_dpo=0.021).endswith(
        "they predict better than DPO's own implicit reward (+0.021 ± 0.010 nats)"
    )
    assert "; they predict no better than DPO's own implicit reward (+0.019" in line(**found, gain_over_dpo=0.019)


def test_each_member_of_an_ensemble_has_its_line_and_versions_without_scores_have_none():
    records = {"tis": {"not_measured": "too few"}, "head": {"not_measured": "as few"}}
    assert held_out_lines({"held_out": records}) == [
        ("held-out labels, tis", "not measured: too few"),
        ("held-out labels, head", "not measured: as few"),
    ]
    assert held_out_lines({"num_pairs": 3}) == []
