"""Token rewards from labels: that they are found, that no pair's own label makes its scores, and that order does not matter."""

import math

import numpy as np
import pytest

from pipeline.weighing.head import Differences, LabelledPairs, Responses, fit_head
from pipeline.weighing.held_out import CHANCE, NUM_FOLDS, folds_of

VOCAB_SIZE, NUM_CONTEXTS = 120, 4


def _responses(rng, num_pairs, with_contexts=False):
    lengths = rng.integers(5, 30, num_pairs)
    ids = rng.integers(0, VOCAB_SIZE, lengths.sum()).astype(np.int32)
    contexts = rng.normal(0, NUM_CONTEXTS**-0.5, (len(ids), NUM_CONTEXTS)).astype(np.float32)
    return Responses(ids, lengths, contexts if with_contexts else None)


def _sums(values, responses):
    return np.add.reduceat(values, np.cumsum(responses.lengths) - responses.lengths)


def _merged(first, second, pick_first):
    """The responses of `first` where `pick_first`, else those of `second`."""
    pairs = np.concatenate([first.lengths, second.lengths])
    starts = np.concatenate([np.cumsum(pairs) - pairs])
    n = len(first.lengths)
    chosen = np.where(pick_first, np.arange(n), np.arange(n) + n)
    at = np.concatenate([np.arange(starts[i], starts[i] + pairs[i]) for i in chosen])
    contexts = None if first.contexts is None else np.concatenate([first.contexts, second.contexts])[at]
    return Responses(np.concatenate([first.ids, second.ids])[at], pairs[chosen], contexts)


def _world(num_pairs, seed=0, with_contexts=False, size=0.6):
    """Pairs whose labels follow rewards of tokens, or of tokens in contexts: chosen, rejected, prompts, reward of a token."""
    rng = np.random.default_rng(seed)
    rewards = np.where(rng.random(VOCAB_SIZE) < 0.3, rng.normal(0, 2 * size, VOCAB_SIZE), 0.0)

    def true(responses):
        factor = 1.0 if responses.contexts is None else 3 * responses.contexts[:, 0]
        return rewards[responses.ids] * factor

    first, second = (_responses(rng, num_pairs, with_contexts) for _ in range(2))
    margins = _sums(true(first), first) - _sums(true(second), second)
    is_first = rng.random(num_pairs) < 1 / (1 + np.exp(-margins))
    groups = rng.integers(0, 1 << 48, num_pairs).astype(np.uint64)
    return _merged(first, second, is_first), _merged(first, second, ~is_first), groups, true


def _swapped(chosen, rejected, swap):
    return _merged(chosen, rejected, ~swap), _merged(chosen, rejected, swap)


def _both(head, chosen, rejected, groups):
    return np.concatenate([head.scores(side, groups) for side in (chosen, rejected)])


def test_one_token_by_hand():
    # Chosen is always "7 3" and rejected "3": token 3 cancels, and x = 1 for token 7. Of n pairs in the other folds, theta
    # solves n sigmoid(-theta) = strength * theta.
    groups = np.arange(40, dtype=np.uint64)
    chosen = Responses(np.tile([7, 3], 40), np.full(40, 2))
    rejected = Responses(np.full(40, 3), np.full(40, 1))
    head = fit_head(chosen, rejected, groups, strengths=[5.0])
    scores, folds = head.scores(chosen, groups).reshape(40, 2), folds_of(groups)
    num_others = 40 - np.bincount(folds, minlength=NUM_FOLDS)[folds]
    theta = scores[:, 0].astype(np.float64)
    np.testing.assert_allclose(num_others / (1 + np.exp(theta)), 5 * theta, rtol=1e-5)
    assert (scores[:, 1] == 0).all()  # token 3 says nothing
    assert head.record["log_likelihood"] == pytest.approx(np.mean(np.log(1 / (1 + np.exp(-theta)))), abs=1e-3)
    unseen = head.scores(Responses(np.array([7, 9]), np.array([2])), np.array([999], np.uint64))
    np.testing.assert_allclose(unseen, [np.mean(head.rewards[:NUM_FOLDS, 0]), 0], rtol=1e-6)


def test_planted_rewards_are_found_and_labels_of_chance_are_not():
    chosen, rejected, groups, true = _world(2000)
    head = fit_head(chosen, rejected, groups)
    scores = _both(head, chosen, rejected, groups)
    truth = np.concatenate([true(chosen), true(rejected)])
    assert np.corrcoef(scores, truth)[0, 1] > 0.8
    assert 0.8 < np.polyfit(scores, truth, 1)[0] < 1.4  # shrunk like a posterior mean, and not overconfident
    assert head.record["log_likelihood"] > CHANCE + 0.2
    # Labels by chance: a pair that had seen its own label would predict it.
    swap = np.random.default_rng(9).random(2000) < 0.5
    chosen, rejected = _swapped(chosen, rejected, swap)
    by_chance = fit_head(chosen, rejected, groups)
    margins = _sums(by_chance.scores(chosen, groups), chosen) - _sums(by_chance.scores(rejected, groups), rejected)
    assert np.mean(margins > 0) == pytest.approx(0.5, abs=0.04)
    assert by_chance.record["strength"] >= 100
    assert by_chance.record["log_likelihood"] == pytest.approx(CHANCE, abs=0.01)


def test_a_label_changes_no_score_of_its_own_fold():
    """With one strength to choose from. Otherwise the label has a vote in which strength is chosen, and nothing else."""
    chosen, rejected, groups, _ = _world(200)
    folds = folds_of(groups)
    for swap in (np.arange(200) == 17, folds == 2):
        fold = folds[17] if swap.sum() == 1 else 2
        before = fit_head(chosen, rejected, groups, strengths=[30.0])
        after = fit_head(*_swapped(chosen, rejected, swap), groups, strengths=[30.0])
        scores = [each.scores(chosen, groups) for each in (before, after)]
        is_own = np.repeat(folds == fold, chosen.lengths)
        np.testing.assert_array_equal(scores[0][is_own], scores[1][is_own])
        assert (scores[0][~is_own] != scores[1][~is_own]).mean() > 0.9


def test_prompts_that_were_not_fitted_on_get_the_mean_of_the_folds():
    chosen, rejected, groups, _ = _world(200)
    head = fit_head(chosen, rejected, groups, strengths=[30.0])
    others = head.scores(chosen, np.setdiff1d(np.arange(300, dtype=np.uint64), groups)[:200])
    places = np.searchsorted(head.ids, chosen.ids)
    np.testing.assert_allclose(others, head.rewards[:NUM_FOLDS].mean(0)[places], rtol=1e-4, atol=1e-7)


def test_token_rewards_that_depend_on_contexts_are_found():
    chosen, rejected, groups, true = _world(1500, with_contexts=True, size=1.0)
    head = fit_head(chosen, rejected, groups)
    truth = np.concatenate([true(chosen), true(rejected)])
    correlation = np.corrcoef(_both(head, chosen, rejected, groups), truth)[0, 1]
    tokens = [Responses(side.ids, side.lengths) for side in (chosen, rejected)]
    of_tokens = fit_head(*tokens, groups)
    assert correlation > 0.75
    assert abs(np.corrcoef(_both(of_tokens, *tokens, groups), truth)[0, 1]) < 0.2  # the mean over contexts is 0
    assert head.record["log_likelihood"] > of_tokens.record["log_likelihood"] + 0.05
    assert head.record["log_likelihoods"].keys() > of_tokens.record["log_likelihoods"].keys()
    assert head.context_rewards.shape == (NUM_FOLDS + 1, VOCAB_SIZE + 1, NUM_CONTEXTS)


def test_contexts_that_say_nothing_are_left_out():
    chosen, rejected, groups, _ = _world(2000)
    rng = np.random.default_rng(5)
    noisy = [
        Responses(s.ids, s.lengths, rng.normal(0, 0.5, (len(s.ids), 4)).astype(np.float32)) for s in (chosen, rejected)
    ]
    head, plain = fit_head(*noisy, groups), fit_head(chosen, rejected, groups)
    assert head.record.get("context_strength", math.inf) >= 300
    scores = [each.scores(side, groups) for each, side in ((head, noisy[0]), (plain, chosen))]
    assert np.corrcoef(*scores)[0, 1] > 0.95


def test_only_tokens_that_occur_four_times_have_coefficients_of_contexts():
    # Token 11 is in both responses of every pair, and its context tells them apart. 5 is in four pairs, 9 in three.
    groups = np.arange(20, dtype=np.uint64)
    ids = np.stack([np.full(20, 11), np.where(groups < 4, 5, np.where(groups < 7, 9, 11))], axis=1).ravel()
    chosen = Responses(ids, np.full(20, 2), np.ones((40, 1), np.float32))
    rejected = Responses(np.full(20, 11), np.ones(20, np.int64), -np.ones((20, 1), np.float32))
    head = fit_head(chosen, rejected, groups, strengths=[0.5])
    assert head.context_ids.tolist() == [5, 11]
    assert head.context_rewards[NUM_FOLDS, 1, 0] > 0.3


def test_pairs_are_chosen_by_their_keys_and_the_order_of_batches_changes_nothing():
    chosen, rejected, groups, _ = _world(300)
    keys = np.random.default_rng(4).permutation(300).astype(np.uint64)
    whole = Differences.of(chosen, rejected)

    def collected(cuts, order, **limits):
        labelled = LabelledPairs(**limits)
        for part in np.split(order, cuts):
            labelled.add(whole.take(part), groups[part], keys[part])
        return labelled.fit([30.0])

    orders = np.arange(300), np.random.default_rng(5).permutation(300)
    small = {"max_pairs": 120, "max_values": 4 * int(whole.num_values.sum())}
    heads = [collected(cuts, order, **small) for cuts, order in [((), orders[0]), ([7, 200], orders[1])]]
    assert heads[0].record == heads[1].record
    np.testing.assert_array_equal(heads[0].rewards, heads[1].rewards)
    np.testing.assert_array_equal(heads[0].prompts, np.sort(groups[keys < 120]))
    smallest = np.argsort(keys)
    budget = int(whole.num_values[smallest][:50].sum())
    few = [collected(cuts, orders[1], max_values=budget) for cuts in ((), list(range(10, 300, 10)))]
    for each in few:
        np.testing.assert_array_equal(each.prompts, np.sort(groups[keys < 50]))


def test_differences_by_hand():
    contexts = [np.array([[1.0], [2.0], [4.0]], np.float32), np.array([[8.0], [16.0]], np.float32)]
    chosen, rejected = Responses(np.array([5, 6, 5]), np.array([3])), Responses(np.array([6, 2]), np.array([2]))
    plain = Differences.of(chosen, rejected)
    assert (plain.lengths.tolist(), plain.ids.tolist(), plain.counts.tolist()) == ([2], [2, 5], [-1, 2])
    with_contexts = Differences.of(
        Responses(chosen.ids, chosen.lengths, contexts[0]), Responses(rejected.ids, rejected.lengths, contexts[1])
    )
    assert with_contexts.ids.tolist() == [2, 5, 6]
    assert with_contexts.contexts.tolist() == [[-16], [5], [2 - 8]]
    assert with_contexts.occurrences.tolist() == [1, 2, 2]


def test_too_few_prompts_and_contexts_that_are_not_numbers_are_refused():
    chosen, rejected, groups, _ = _world(40, with_contexts=True)
    with pytest.raises(ValueError, match=r"labels of only 3 prompts, and at least 10 are needed"):
        fit_head(chosen, rejected, groups % np.uint64(3))
    chosen.contexts[3, 1] = math.nan
    with pytest.raises(ValueError, match="a context is not finite"):
        fit_head(chosen, rejected, groups)
    with pytest.raises(ValueError, match="no labels"):
        LabelledPairs().fit()
