"""Weights that TGDPO, T-REG and cDPO make of log-ratios, and ConfPO's selection."""

import math

import numpy as np
import pytest

from pipeline.weighing.estimators import ESTIMATORS, SideScores
from pipeline.weighing.estimators.other_sources import confidence
from pipeline.weighing.estimators.token_rewards import critical, tgdpo, treg

SIDES = ["chosen", "rejected"]


def _scores(side, positive=None, negative=None, ref=None, lengths=None):
    logps = [None if each is None else np.array(each, np.float32) for each in (positive, negative, ref)]
    return SideScores(side, np.array(lengths or [len(next(x for x in logps if x is not None))]), *logps)


def test_tgdpo_by_hand():
    # log pi+ - log ref = 2, -3, -6; with alpha beta = 0.2: 1 + 0.4, 1 - 0.6, 1 - 1.2 < 0. On rejected tokens 1 - 0.4 ...
    positive, ref = [-1.0, -4.0, -7.0], [-3.0, -1.0, -1.0]
    chosen = tgdpo(_scores("chosen", positive, [-99.0] * 3, ref), reward_factor=0.2)
    rejected = tgdpo(_scores("rejected", positive, [-99.0] * 3, ref), reward_factor=0.2)
    np.testing.assert_allclose(chosen.token_weights, [1.4, 0.4, 0], rtol=1e-6)
    np.testing.assert_allclose(rejected.token_weights, [0.6, 1.6, 2.2], rtol=1e-6)
    assert (chosen.num_at_lower, rejected.num_at_lower) == (1, 0)


@pytest.mark.parametrize("side", SIDES)
def test_a_dpo_model_that_learned_nothing_gives_plain_dpo(side):
    logps = np.random.default_rng(0).normal(-2, 1, 50)
    assert (tgdpo(_scores(side, logps, logps, logps)).token_weights == 1).all()
    assert (treg(_scores(side, logps, logps)).token_weights == 1).all()


def test_tgdpo_measures_the_implicit_reward_of_its_dpo_model():
    """The margins that a build compares with labels are those of what the weights are made of."""
    scores = _scores("rejected", [-1.0, -2.0], [-5.0, -5.0], [-1.5, -1.0])
    np.testing.assert_allclose(ESTIMATORS["tgdpo"].token_scores(scores), [0.5, -1.0])
    np.testing.assert_allclose(ESTIMATORS["treg"].token_scores(scores), [4.0, 3.0])


def test_treg_by_hand():
    # z = log 3, -log 3, 0: sigmoid 3/4, 1/4, 1/2
    log3 = math.log(3)
    chosen = treg(_scores("chosen", [-1, -1 - log3, -2], [-1 - log3, -1, -2])).token_weights
    rejected = treg(_scores("rejected", [-1, -1 - log3, -2], [-1 - log3, -1, -2])).token_weights
    np.testing.assert_allclose(chosen, [1.25, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(rejected, [0.75, 1.25, 1], rtol=1e-6)


def test_treg_of_the_two_sides_adds_up_to_2_and_stays_in_bounds():
    """sigmoid(x) + sigmoid(-x) = 1, also where exp(x) would overflow."""
    logratios = np.array([0.3, -7.0, 500.0, -500.0], np.float32)
    weights = [treg(_scores(side, logratios, np.zeros(4))).token_weights for side in SIDES]
    np.testing.assert_allclose(weights[0] + weights[1], 2, rtol=1e-6)
    np.testing.assert_array_equal(weights[0][2:], [1.5, 0.5])


def test_critical_by_hand():
    # p+ = 1/2, 1/8, 1/2; p- = 1/4, 1/2, 1/2. p+^2 / p- = 1, 1/32, 1/2.
    positive, negative = np.log([1 / 2, 1 / 8, 1 / 2]), np.log([1 / 4, 1 / 2, 1 / 2])
    rejected = critical(_scores("rejected", positive, negative))
    np.testing.assert_allclose(rejected.token_weights, [0, 31 / 32, 1 / 2], atol=1e-6)
    # with beta 0 the model of right answers decides alone; with 1/3: 1/8 (1/4)^(1/3)
    np.testing.assert_allclose(
        critical(_scores("rejected", positive, negative), critical_beta=0.0).token_weights,
        [1 / 2, 7 / 8, 1 / 2],
        rtol=1e-6,
    )
    assert critical(_scores("chosen", positive, negative)).token_weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_critical_is_at_most_the_weight_of_the_release_and_equal_where_the_models_agree(beta):
    """The release divides by the sum over the vocabulary, which is at least 1."""
    rng = np.random.default_rng(0)
    positive, negative = rng.dirichlet(np.full(30, 0.3), size=200), rng.dirichlet(np.full(30, 0.3), size=200)
    negative[::2] = positive[::2]
    tokens = np.array([rng.choice(30, p=row) for row in negative])
    rows = np.arange(200)
    logits = (1 + beta) * np.log(positive) - beta * np.log(negative)
    of_release = 1 - np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[rows, tokens]
    scores = _scores("rejected", np.log(positive[rows, tokens]), np.log(negative[rows, tokens]))
    weighed = critical(scores, critical_beta=beta)
    assert (weighed.token_weights <= of_release + 1e-5).all()
    np.testing.assert_allclose(weighed.token_weights[::2], of_release[::2], atol=1e-5)
    assert weighed.num_at_lower == np.count_nonzero(weighed.token_weights == 0)


@pytest.mark.parametrize("side", SIDES)
def test_confidence_by_hand(side):
    # 1/2, 1/4, 1/8, 3/4: the mean is 13/32, below 1/2. A single token is its own mean, and so are equal ones.
    ref = np.log([1 / 2, 1 / 4, 1 / 8, 3 / 4, 0.9, 0.3, 0.3, 0.3])
    weighed = confidence(_scores(side, ref=ref, lengths=[4, 1, 3]))
    assert weighed.token_weights.tolist() == [0, 1, 1, 0, 1, 1, 1, 1]
    assert weighed.token_weights.dtype == np.float32


def test_confidence_always_selects_a_token_and_equals_a_loop():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, size=300).tolist()
    ref = np.log(rng.random(sum(lengths)).astype(np.float32) ** rng.integers(1, 9))
    ref[rng.random(len(ref)) < 0.3] = -0.125  # ties
    found = np.split(confidence(_scores("chosen", ref=ref, lengths=lengths)).token_weights, np.cumsum(lengths)[:-1])
    for weights, own in zip(found, np.split(ref.astype(np.float32), np.cumsum(lengths)[:-1]), strict=True):
        probs = np.exp(own).astype(np.float64)
        expected = probs <= math.fsum(probs) / len(probs)
        assert weights.any()
        np.testing.assert_array_equal(weights, expected)


def test_no_estimator_changes_what_it_reads():
    scores = _scores("rejected", [-1.0, -2.0], [-5.0, -5.0], [-1.5, -1.0])
    before = [each.copy() for each in (scores.positive_logps, scores.negative_logps, scores.ref_logps)]
    for estimate in (tgdpo, treg, critical, confidence):
        estimate(scores)
    for now, was in zip((scores.positive_logps, scores.negative_logps, scores.ref_logps), before, strict=True):
        np.testing.assert_array_equal(now, was)
