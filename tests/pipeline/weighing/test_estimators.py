import math

import numpy as np
import pytest

from pipeline.weighing.draws import token_keys
from pipeline.weighing.estimators import SideScores, SideWeights, ensemble
from pipeline.weighing.estimators.other_sources import activation, decay, entropy, surprise, ti
from pipeline.weighing.estimators.tis_dpo import random, reversed_tis, tis, uniform
from pipeline.weighing.estimators.tis_release import (
    origin,
    random_scale,
    rank_based,
    select,
    threshold,
    threshold_and_scale,
)

PAIR_IDS = ["0" * 31 + "1", "f" * 32]


CLAMP = {"k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5}


def _scores(side, positive, negative, lengths=None):
    lengths = np.array(lengths or [len(positive)])
    return SideScores(side, lengths, np.array(positive, np.float32), np.array(negative, np.float32))


# log pi+ - log pi- = 0.5, -0.25, 3 (clamped to U = 1.5), -2 (clamped to L = -0.5), 0
POSITIVE = [-1.0, -1.25, -0.5, -3.0, -7.0]
NEGATIVE = [-1.5, -1.0, -3.5, -1.0, -7.0]


def test_chosen_weights_by_hand():
    # w = exp(+clamp): exp(0.5), exp(-0.25), exp(1.5), exp(-0.5), exp(0)
    weighed = tis(_scores("chosen", POSITIVE, NEGATIVE), **CLAMP)
    np.testing.assert_allclose(weighed.token_weights, [1.6487213, 0.7788008, 4.4816891, 0.6065307, 1.0], rtol=1e-6)
    assert (weighed.num_at_lower, weighed.num_at_upper) == (1, 1)


def test_rejected_weights_by_hand():
    # mu is negative on rejected tokens and the clamp stands before it: exp(-0.5), exp(0.25), exp(-1.5), exp(0.5), exp(0)
    weighed = tis(_scores("rejected", POSITIVE, NEGATIVE), **CLAMP)
    np.testing.assert_allclose(weighed.token_weights, [0.6065307, 1.2840254, 0.2231302, 1.6487213, 1.0], rtol=1e-6)


def test_k_scales_and_mu_stretches():
    weighed = tis(_scores("chosen", [-1.0], [-1.8]), k=2.0, mu=0.5, lower=-1.0, upper=1.0)
    np.testing.assert_allclose(weighed.token_weights, [2 * math.exp(0.5 * 0.8)], rtol=1e-6)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_swapped_contrastive_models_invert_the_weights(side):
    wide = {"k": 3.0, "mu": 1.0, "lower": -100.0, "upper": 100.0}
    there = tis(_scores(side, POSITIVE, NEGATIVE), **wide).token_weights
    back = tis(_scores(side, NEGATIVE, POSITIVE), **wide).token_weights
    np.testing.assert_allclose(there * back, np.full(5, 9.0), rtol=1e-5)  # k**2


def test_equal_models_give_k_everywhere():
    weighed = tis(_scores("rejected", POSITIVE, POSITIVE), **{**CLAMP, "k": 1.5})
    np.testing.assert_array_equal(weighed.token_weights, np.full(5, 1.5, np.float32))


def test_reversed_is_tis_with_the_pair_swapped():
    for side in ("chosen", "rejected"):
        reverse = reversed_tis(_scores(side, POSITIVE, NEGATIVE), **CLAMP).token_weights
        np.testing.assert_array_equal(reverse, tis(_scores(side, NEGATIVE, POSITIVE), **CLAMP).token_weights)


def test_last_token_is_weighted_like_the_same_token_elsewhere():
    # EOS is the last token. It has the weight of its log-ratio, not 0 or 1 by rule.
    first = tis(_scores("chosen", [-1.0, -2.0], [-1.7, -2.0]), **CLAMP).token_weights
    last = tis(_scores("chosen", [-2.0, -1.0], [-2.0, -1.7]), **CLAMP).token_weights
    assert first[0] == last[1] == pytest.approx(math.exp(0.7), rel=1e-5)


def test_uniform_is_one():
    assert uniform(_scores("chosen", POSITIVE, NEGATIVE)).token_weights.tolist() == [1.0] * 5


def test_random_weights_stay_in_the_range_of_the_clamp_and_fill_it():
    lengths = np.array([50_000, 50_000])
    keys = token_keys(PAIR_IDS, "rejected", lengths)
    weights = random(SideScores("rejected", lengths, token_keys=keys), **CLAMP, seed=0).token_weights
    assert weights.min() >= math.exp(-1.5) - 1e-6
    assert weights.max() <= math.exp(0.5) + 1e-6
    # -log w is uniform on [-0.5, 1.5]: mean 0.5, and a quarter of it below 0 (standard errors 0.002 and 0.0014).
    assert -np.log(weights).mean() == pytest.approx(0.5, abs=0.01)
    assert (weights > 1).mean() == pytest.approx(0.25, abs=0.01)


def test_random_weights_of_a_pair_do_not_depend_on_its_neighbours():
    def weights(pair_ids, lengths, seed=0):
        keys = token_keys(pair_ids, "chosen", np.array(lengths))
        scores = SideScores("chosen", np.array(lengths), token_keys=keys)
        return random(scores, **CLAMP, seed=seed).token_weights

    both = weights(PAIR_IDS, [3, 4])
    np.testing.assert_array_equal(both[3:], weights(PAIR_IDS[1:], [4]))
    assert not np.array_equal(both, weights(PAIR_IDS, [3, 4], seed=1))


def test_keys_tell_pairs_sides_and_positions_apart():
    lengths = np.array([1000, 1000])
    keys = np.concatenate([token_keys(PAIR_IDS, side, lengths) for side in ("chosen", "rejected")])
    assert len(np.unique(keys)) == 4000


def _selected(side, logratios, lengths, share):
    return select(_of(side, logratios, lengths), share=share).token_weights.tolist()


def _of(side, logratios, lengths=None):
    """Scores with these log-ratios: sums of eighths, which float32 holds exactly."""
    negative = np.full(len(logratios), -9.0, np.float32)
    return _scores(side, negative + np.array(logratios, np.float32), negative, lengths)


# Three responses of 5, 1 and 4 tokens. floor(0.4 * 5) = 2, max(1, floor(0.4 * 1)) = 1, floor(0.4 * 4) = 1.
LOGRATIOS = [0.5, -0.25, 3.0, -2.0, 0.0, -7.0, -1.0, 2.0, 1.0, -3.0]
LENGTHS = [5, 1, 4]


def test_sepo_selects_the_best_chosen_tokens_of_each_response():
    # 3 and 0.5 of the first, -7 as the only one, 2 of the last. The first token of a response can be selected.
    assert _selected("chosen", LOGRATIOS, LENGTHS, 0.4) == [1, 0, 1, 0, 0, 1, 0, 1, 0, 0]


def test_sepo_selects_the_worst_rejected_tokens_of_each_response():
    # -2 and -0.25 of the first, -7, and -3 of the last: its EOS counts like any other.
    assert _selected("rejected", LOGRATIOS, LENGTHS, 0.4) == [0, 1, 0, 1, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_of_equal_scores_sepo_selects_the_earlier(side):
    # floor(0.5 * 5) = 2 of five equal ones. -0 equals 0: bits that differ are no order.
    assert _selected(side, [1.0] * 5 + [-0.0, 0.0, -0.0], [5, 3], 0.5) == [1, 1, 0, 0, 0, 1, 0, 0]


def test_sepo_rounds_the_number_of_tokens_down_but_never_to_none():
    for n, expected in ((1, 1), (3, 1), (6, 1), (7, 2), (10, 3), (100, 30)):  # share 0.3
        assert sum(_selected("chosen", [float(i % 13) for i in range(n)], [n], 0.3)) == expected


def test_a_share_of_one_selects_every_token():
    assert _selected("rejected", LOGRATIOS, LENGTHS, 1.0) == [1.0] * 10


def test_sepo_selects_what_sorting_each_response_by_itself_selects():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, size=200).tolist()
    logratios = (rng.integers(-40, 40, size=sum(lengths)) / 8).tolist()  # of both signs, with many ties
    for side, sign in (("chosen", -1), ("rejected", 1)):
        expected, start = [0] * len(logratios), 0
        for n in lengths:
            ranked = sorted(range(start, start + n), key=lambda at: (sign * logratios[at], at))
            for at in ranked[: max(1, int(0.3 * n))]:
                expected[at] = 1
            start += n
        assert _selected(side, logratios, lengths, 0.3) == expected


Z = [0.5, -0.25, 3.0, -2.0, 0.0]


@pytest.mark.parametrize(("side", "sign"), [("chosen", 1), ("rejected", -1)])
def test_origin_is_z_and_nothing_below_zero_by_hand(side, sign):
    weighed = origin(_of(side, [sign * z for z in Z]))
    assert weighed.token_weights.tolist() == [0.5, 0, 3, 0, 0]
    assert weighed.num_at_lower == 3


@pytest.mark.parametrize(("side", "sign"), [("chosen", 1), ("rejected", -1)])
def test_threshold_clips_z_by_hand(side, sign):
    weighed = threshold(_of(side, [sign * z for z in Z]), lower=-1.0, upper=1.0)
    assert weighed.token_weights.tolist() == [0.5, 0, 1, 0, 0]  # the release: 0.5, -0.25, 1, -1, 0
    assert (weighed.num_at_lower, weighed.num_at_upper) == (3, 1)
    assert threshold(_of("chosen", Z), lower=0.25, upper=1.0).token_weights.tolist() == [0.5, 0.25, 1, 0.25, 0.25]


@pytest.mark.parametrize(("side", "sign"), [("chosen", 1), ("rejected", -1)])
def test_threshold_and_scale_by_hand(side, sign):
    # 0.7 + (c + 1.5) * 0.6 / 3 with c = 0.5, -0.25, 1.5, -1.5, 0; z = 0 is weight 1.
    settings = {"lower": -1.5, "upper": 1.5, "min_weight": 0.7, "max_weight": 1.3}
    weighed = threshold_and_scale(_of(side, [sign * z for z in Z]), **settings)
    np.testing.assert_allclose(weighed.token_weights, [1.1, 0.95, 1.3, 0.7, 1.0], rtol=1e-6)
    assert (weighed.num_at_lower, weighed.num_at_upper) == (1, 1)


def _ranked(side, logratios, lengths=None, min_weight=0.7, max_weight=1.3):
    return rank_based(_of(side, logratios, lengths), min_weight=min_weight, max_weight=max_weight).token_weights


def test_ranks_by_hand():
    # Order of z: -2, -0.25, 0, 0.5, 3, in steps of 0.6 / 4. On rejected tokens the smallest log-ratio ranks highest.
    np.testing.assert_allclose(_ranked("chosen", Z), [1.15, 0.85, 1.3, 0.7, 1.0], rtol=1e-6)
    np.testing.assert_allclose(_ranked("rejected", Z), [0.85, 1.15, 0.7, 1.3, 1.0], rtol=1e-6)


def test_equal_scores_share_their_ranks():
    # The release makes 0.7, 1, 1.3 of three equal ones. 1, 2, 2, 0 have ranks 1, 2.5, 2.5, 0 of 3.
    np.testing.assert_allclose(_ranked("chosen", [0.0, 0.0, -0.0]), 1, rtol=1e-6)
    np.testing.assert_allclose(_ranked("chosen", [1, 2, 2, 0]), [0.9, 1.2, 1.2, 0.7], rtol=1e-6)


def test_a_single_token_ranks_in_the_middle_of_its_range():
    np.testing.assert_allclose(_ranked("chosen", [4.0, 1.0, 2.0], [1, 2], 0.5, 2.5), [1.5, 0.5, 2.5], rtol=1e-6)


def test_ranks_have_mean_one_and_equal_those_of_each_response_alone():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 40, size=100).tolist()
    logratios = rng.integers(-20, 20, size=sum(lengths)) / 8  # with many ties
    together = np.split(_ranked("rejected", logratios, lengths), np.cumsum(lengths)[:-1])
    for weights, own in zip(together, np.split(logratios, np.cumsum(lengths)[:-1]), strict=True):
        np.testing.assert_array_equal(weights, _ranked("rejected", own))
        smaller, equal = (np.array([op(-own, -x).sum() for x in own]) for op in (np.less, np.equal))
        shares = (smaller + (equal - 1) / 2) / (len(own) - 1) if len(own) > 1 else np.array([0.5])
        np.testing.assert_allclose(weights, 0.7 + 0.6 * shares, rtol=1e-6)
        assert weights.mean(dtype=np.float64) == pytest.approx(1, rel=1e-6)


def test_random_scale_fills_its_range():
    lengths = np.array([50_000, 50_000])
    scores = SideScores("chosen", lengths, token_keys=token_keys(PAIR_IDS, "chosen", lengths))
    weights = random_scale(scores, min_weight=0.7, max_weight=1.3, seed=0).token_weights
    assert (weights.min() >= 0.7, weights.max() <= 1.3) == (True, True)
    # U(0.7, 1.3): mean 1 with standard error 0.0005, a tenth below 0.76 with standard error 0.001.
    assert weights.mean() == pytest.approx(1.0, abs=0.003)
    assert (weights < 0.76).mean() == pytest.approx(0.1, abs=0.006)
    assert not np.array_equal(weights, random_scale(scores, min_weight=0.7, max_weight=1.3, seed=1).token_weights)


def test_decay_starts_with_gamma_in_each_response():
    weights = decay(SideScores("chosen", np.array([3, 1])), decay_gamma=0.5).token_weights
    assert weights.tolist() == [0.5, 0.25, 0.125, 0.5]


def test_surprise_by_hand():
    # 1, 3, 2 have mean 2. What was certain throughout has nothing to be weighed by.
    scores = SideScores("chosen", np.array([3, 2]), ref_logps=np.array([-1, -3, -2, 0, 0], np.float32))
    weighed = surprise(scores)
    assert (weighed.token_weights.tolist(), weighed.num_without_mass) == ([0.5, 1.5, 1, 1, 1], 1)


def test_entropy_by_hand():
    # Halves of two outcomes: log 2. A half, a quarter and the rest, a quarter: 1.5 log 2. Certain: 0. Mean 2.5 / 3 log 2.
    half, quarter = math.log(0.5), math.log(0.25)
    tops = np.array([half, half, half, quarter, 0.0, -80.0], np.float32)
    weighed = entropy(SideScores("chosen", np.array([3]), top_logps=tops))
    np.testing.assert_allclose(weighed.token_weights, [1.2, 1.8, 0], atol=1e-6)


def test_entropy_of_all_outcomes_but_some_is_at_most_that_of_all():
    probs = np.sort(np.random.default_rng(0).dirichlet(np.ones(12), size=6))[:, ::-1]
    whole = -(probs * np.log(probs)).sum(axis=1)
    # The last place is a coin, with an entropy of log 2 in any k: it gives the unit.
    for k in (2, 5, 12):
        tops = np.full((7, k), -90.0)
        tops[:6], tops[6, :2] = np.log(probs[:, :k]), math.log(0.5)
        weights = entropy(SideScores("chosen", np.array([7]), top_logps=tops.ravel().astype(np.float32))).token_weights
        found = weights[:6] / weights[6] * math.log(2)
        assert (found <= whole + 1e-5).all()
        assert np.allclose(found, whole, atol=1e-5) == (k == 12)


def test_entropy_of_log_probs_rounded_past_one_has_no_rest():
    tops = np.log(np.array([0.5004, 0.5, 0.5004, 0.5], np.float32))
    assert entropy(SideScores("chosen", np.array([2]), top_logps=tops)).token_weights.tolist() == [1, 1]


def test_activation_is_relative_to_its_response():
    scores = SideScores("rejected", np.array([2, 1]), activations=np.array([1, 3, 7], np.float32))
    assert activation(scores).token_weights.tolist() == [0.5, 1.5, 1]


def test_ti_mixes_over_the_span_that_it_is_told():
    # As in tests/train/model/test_hybrid.py, by hand: 3 tokens alone, and behind a prompt of 2 tokens with an attribution of 8.
    scores = SideScores(
        "chosen",
        np.array([3]),
        attributions=np.array([2, 0, 6], np.float32),
        prompt_lengths=np.array([2]),
        prompt_attributions=np.array([8.0], np.float32),
    )
    alone = ti(scores, ti_lambda=0.5, sigma_divisor=4.0, span="response")
    behind = ti(scores, ti_lambda=0.5, sigma_divisor=4.0, span="sequence")
    np.testing.assert_allclose(alone.token_weights, [0.7861029, 0.6777942, 1.5361029], rtol=1e-6)
    np.testing.assert_allclose(behind.token_weights[0], 5 * (0.5 / 8 + 0.5 / 3.0083726), rtol=1e-6)
    assert (alone.num_without_mass, alone.num_at_lower) == (0, None)


def test_an_ensemble_is_the_geometric_mean_and_keeps_zeros():
    members = [SideWeights(np.array(weights, np.float32)) for weights in ([4, 1, 0, 8], [1, 1, 5, 1], [2, 1, 3, 1])]
    np.testing.assert_allclose(ensemble(members).token_weights, [2, 1, 0, 2], rtol=1e-6)
    np.testing.assert_allclose(ensemble(members[:1]).token_weights, [4, 1, 0, 8], rtol=1e-6)
