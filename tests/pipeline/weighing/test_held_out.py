"""The measure of held-out labels, against numbers by hand and against a search over a grid."""

import math

import numpy as np
import pytest

from pipeline.weighing.held_out import CHANCE, HeldOut, compare, fit_multiplier, held_out_log_likelihoods, measure

ALONE = np.arange(4000, dtype=np.uint64)
"""Prompts with one pair each."""


def _labelled(num_pairs, overconfident, seed=0):
    """Margins whose labels are right with probability sigmoid(margin / overconfident)."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0, 1.5, num_pairs)
    is_right = rng.random(num_pairs) < 1 / (1 + np.exp(-margins))
    return overconfident * np.where(is_right, margins, -margins)


@pytest.mark.parametrize("margin", [2.0, -0.25, 1e300])
def test_equal_margins_follow_the_rule_of_succession(margin):
    # Slope at b = a * |margin|: 9 sigmoid(-b) - tanh(b / 2) = 0, so e^b = 10, and the sign is that of the margin.
    a, _ = fit_multiplier(np.full(9, margin), ALONE[:9])
    assert a == pytest.approx(math.log(10) / margin, rel=1e-9)


def test_a_pair_is_held_out_of_its_own_fit():
    # All labels are right, so a pair in a fold of s pairs gets log((n + 1) / (n + 2)) with n = 40 - s, by the test above. In a
    # fit on all pairs n is 40.
    found = held_out_log_likelihoods(np.full(40, 3.0), ALONE[:40])
    others, num_pairs = np.unique(np.round(np.exp(found) / (1 - np.exp(found)) - 1, 6), return_counts=True)
    np.testing.assert_array_equal(others, np.round(others))
    assert len(others) >= 2
    assert (num_pairs % (40 - others) == 0).all()


def test_the_fit_is_the_maximum_and_the_error_that_of_the_curvature():
    margins = _labelled(4000, 14)
    a, error = fit_multiplier(margins, ALONE)
    rms = math.sqrt(np.mean(margins**2))
    grid = np.linspace(0.05, 0.1, 5001)  # 1e-5 apart
    made_up = -np.logaddexp(0, -grid * rms) - np.logaddexp(0, grid * rms)
    of_grid = made_up + np.array([-np.logaddexp(0, -b * margins).sum() for b in grid])
    assert a == pytest.approx(grid[of_grid.argmax()], abs=1e-5)
    second = np.gradient(np.gradient(of_grid, grid), grid)[of_grid.argmax()]
    assert error == pytest.approx(1 / math.sqrt(-second), rel=0.05)  # labels of one model: both estimates agree


def test_a_scale_of_the_margins_changes_nothing_but_the_multiplier():
    margins = _labelled(4000, 1)
    one, fourteen = measure(margins, ALONE), measure(14 * margins, ALONE)
    assert one.multiplier == pytest.approx(1, abs=2 * one.multiplier_se)
    assert fourteen.multiplier == pytest.approx(one.multiplier / 14, rel=1e-9)
    assert fourteen.log_likelihood == pytest.approx(one.log_likelihood, rel=1e-9)
    assert (one.verdict(), fourteen.verdict(), fourteen.verdict(scale=1 / 14)) == (
        "calibrated",
        "overconfident",
        "calibrated",
    )
    assert measure(margins / 14, ALONE).verdict() == "underconfident"
    assert measure(-margins, ALONE).verdict() == "wrong way round"


def test_margins_that_know_nothing_do_no_better_than_chance():
    margins = np.random.default_rng(1).normal(0, 20, 4000)
    found = measure(margins, ALONE)
    assert found.verdict() == "no better than chance"
    assert found.log_likelihood == pytest.approx(CHANCE, abs=0.002)
    assert found.log_likelihood <= CHANCE + 2 * found.log_likelihood_se


def test_pairs_of_one_prompt_count_as_one():
    # Each pair twice with the same prompt is no more evidence than each pair once; as prompts of their own they would be.
    margins = _labelled(400, 1)
    once = measure(margins, ALONE[:400])
    twice = measure(np.repeat(margins, 2), np.repeat(ALONE[:400], 2))
    assert (twice.num_pairs, twice.num_prompts) == (800, 400)
    assert twice.log_likelihood_se == pytest.approx(once.log_likelihood_se, rel=0.01)
    assert twice.multiplier_se == pytest.approx(once.multiplier_se, rel=0.1)  # two estimates, see `fit_multiplier`
    apart = measure(np.repeat(margins, 2), ALONE[:800])
    assert apart.log_likelihood_se == pytest.approx(once.log_likelihood_se / math.sqrt(2), rel=0.01)


def test_the_order_of_pairs_does_not_matter_and_folds_depend_on_prompts_alone():
    margins, order = _labelled(500, 3), np.random.default_rng(2).permutation(500)
    found, shuffled = (held_out_log_likelihoods(margins[at], ALONE[:500][at]) for at in (np.arange(500), order))
    np.testing.assert_allclose(shuffled, found[order], rtol=1e-9)


def test_two_kinds_of_scores_are_compared_pair_by_pair():
    margins = _labelled(2000, 1)
    noisy = margins + np.random.default_rng(3).normal(0, 1.5, 2000)
    gain, error = compare(margins, noisy, ALONE[:2000])
    better, worse = (measure(each, ALONE[:2000]) for each in (margins, noisy))
    assert gain == pytest.approx(better.log_likelihood - worse.log_likelihood)
    assert 0 < error < math.hypot(better.log_likelihood_se, worse.log_likelihood_se)
    assert compare(margins, 5 * margins, ALONE[:2000]) == pytest.approx((0, 0), abs=1e-9)


ODD = {
    "zeros": (np.zeros(50), 0.5, "no better than chance"),
    "all right": (np.full(50, 1e308), 1.0, "overconfident"),
    "all wrong": (np.full(50, -3.0), 0.0, "wrong way round"),
    "too small to divide by": (np.full(50, 1e-320), 1.0, "no better than chance"),
    "one outlier": (np.where(ALONE[:50] == 3, -1e300, 1.0), 0.98, "no better than chance"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_margins_neither_overflow_nor_give_anything_infinite(name):
    margins, accuracy, verdict = ODD[name]
    with np.errstate(all="raise", under="ignore"):
        found = measure(margins, ALONE[:50])
    assert all(math.isfinite(getattr(found, field)) for field in HeldOut.__slots__)
    assert (found.accuracy, found.verdict()) == (pytest.approx(accuracy), verdict)


def test_few_prompts_are_not_measured_and_nan_is_refused():
    assert measure(np.ones(90), np.repeat(ALONE[:9], 10)) is None
    assert measure(np.empty(0), np.empty(0, np.uint64)) is None
    with pytest.raises(ValueError, match="2 of 12 margins are not finite"):
        measure(np.array([np.nan, np.inf, *[1.0] * 10]), ALONE[:12])
