import math

import numpy as np
import pytest

from pipeline.weigh import ClampSettings, SideScores, select, token_keys, weigh

PAIR_IDS = ["0" * 31 + "1", "f" * 32]


def _scores(side, positive, negative):
    return SideScores(side, len(positive), np.array(positive, np.float32), np.array(negative, np.float32))


# log pi+ - log pi- = 0.5, -0.25, 3 (clamped to U = 1.5), -2 (clamped to L = -0.5), 0
POSITIVE = [-1.0, -1.25, -0.5, -3.0, -7.0]
NEGATIVE = [-1.5, -1.0, -3.5, -1.0, -7.0]


def test_chosen_weights_by_hand():
    # w = exp(+clamp): exp(0.5), exp(-0.25), exp(1.5), exp(-0.5), exp(0)
    weighed = weigh(_scores("chosen", POSITIVE, NEGATIVE), "tis", ClampSettings())
    np.testing.assert_allclose(weighed.token_weights, [1.6487213, 0.7788008, 4.4816891, 0.6065307, 1.0], rtol=1e-6)
    assert (weighed.num_at_lower, weighed.num_at_upper) == (1, 1)


def test_rejected_weights_by_hand():
    # mu is negative on rejected tokens and the clamp stands before it: exp(-0.5), exp(0.25), exp(-1.5), exp(0.5), exp(0)
    weighed = weigh(_scores("rejected", POSITIVE, NEGATIVE), "tis", ClampSettings())
    np.testing.assert_allclose(weighed.token_weights, [0.6065307, 1.2840254, 0.2231302, 1.6487213, 1.0], rtol=1e-6)


def test_k_scales_and_mu_stretches():
    settings = ClampSettings(k=2.0, mu=0.5, lower=-1.0, upper=1.0)
    weighed = weigh(_scores("chosen", [-1.0], [-1.8]), "tis", settings)
    np.testing.assert_allclose(weighed.token_weights, [2 * math.exp(0.5 * 0.8)], rtol=1e-6)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_swapped_contrastive_models_invert_the_weights(side):
    wide = ClampSettings(k=3.0, lower=-100.0, upper=100.0)
    there = weigh(_scores(side, POSITIVE, NEGATIVE), "tis", wide).token_weights
    back = weigh(_scores(side, NEGATIVE, POSITIVE), "tis", wide).token_weights
    np.testing.assert_allclose(there * back, np.full(5, 9.0), rtol=1e-5)  # k**2


def test_equal_models_give_k_everywhere():
    weighed = weigh(_scores("rejected", POSITIVE, POSITIVE), "tis", ClampSettings(k=1.5))
    np.testing.assert_array_equal(weighed.token_weights, np.full(5, 1.5, np.float32))


def test_reversed_is_tis_with_the_pair_swapped():
    for side in ("chosen", "rejected"):
        reverse = weigh(_scores(side, POSITIVE, NEGATIVE), "reversed", ClampSettings()).token_weights
        np.testing.assert_array_equal(
            reverse, weigh(_scores(side, NEGATIVE, POSITIVE), "tis", ClampSettings()).token_weights
        )


def test_last_token_is_weighted_like_the_same_token_elsewhere():
    # EOS is the last token; whatever stands there has the weight that its log-ratio says, no 0 and no 1 by rule.
    first = weigh(_scores("chosen", [-1.0, -2.0], [-1.7, -2.0]), "tis", ClampSettings()).token_weights
    last = weigh(_scores("chosen", [-2.0, -1.0], [-2.0, -1.7]), "tis", ClampSettings()).token_weights
    assert first[0] == last[1] == pytest.approx(math.exp(0.7), rel=1e-5)


def test_uniform_is_one():
    weighed = weigh(_scores("chosen", POSITIVE, NEGATIVE), "uniform", ClampSettings(k=7.0))
    assert weighed.token_weights.tolist() == [1.0] * 5


def test_random_weights_stay_in_the_range_of_the_clamp_and_fill_it():
    lengths = np.array([50_000, 50_000])
    keys = token_keys(PAIR_IDS, "rejected", lengths)
    weights = weigh(SideScores("rejected", 100_000, token_keys=keys), "random", ClampSettings()).token_weights
    assert weights.min() >= math.exp(-1.5) - 1e-6
    assert weights.max() <= math.exp(0.5) + 1e-6
    # -log w is uniform on [-0.5, 1.5]: mean 0.5, and a quarter of it below 0 (standard errors 0.002 and 0.0014).
    assert -np.log(weights).mean() == pytest.approx(0.5, abs=0.01)
    assert (weights > 1).mean() == pytest.approx(0.25, abs=0.01)


def test_random_weights_of_a_pair_do_not_depend_on_its_neighbours():
    def weights(pair_ids, lengths, seed=0):
        keys = token_keys(pair_ids, "chosen", np.array(lengths))
        scores = SideScores("chosen", len(keys), token_keys=keys)
        return weigh(scores, "random", ClampSettings(seed=seed)).token_weights

    both = weights(PAIR_IDS, [3, 4])
    np.testing.assert_array_equal(both[3:], weights(PAIR_IDS[1:], [4]))
    assert not np.array_equal(both, weights(PAIR_IDS, [3, 4], seed=1))


def test_keys_tell_pairs_sides_and_positions_apart():
    lengths = np.array([1000, 1000])
    keys = np.concatenate([token_keys(PAIR_IDS, side, lengths) for side in ("chosen", "rejected")])
    assert len(np.unique(keys)) == 4000


def _selected(side, logratios, lengths, share):
    negative = np.full(len(logratios), -9.0, np.float32)
    scores = SideScores(side, len(logratios), negative + np.array(logratios, np.float32), negative, np.array(lengths))
    return select(scores, share).token_weights.tolist()


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


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown estimator 'magic'"):
        weigh(_scores("chosen", POSITIVE, NEGATIVE), "magic", ClampSettings())
