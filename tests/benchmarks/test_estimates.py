"""Rows of the quality benchmark that are made in parts: scores must not know the label of their own pair."""

import numpy as np
import pytest
import torch

from benchmarks.quality import estimates, needed, scores, worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = worlds.planted_model(tmp_path_factory.mktemp("estimates") / "model", num_epochs=0)
    return worlds.planted(folder, "sparse", 0, num_pairs=32, num_samples=8)


def test_cross_fitted_scores_do_not_depend_on_the_label_of_their_pair(world, monkeypatch):
    """The label of pair 0 is flipped: scores of its fold stay the same to the bit, those of the other fold do not."""
    monkeypatch.setattr(estimates, "NUM_FOLDS", 2)  # fast
    prompt, chosen, rejected = world.rows[0]
    flipped = worlds.replace(world, rows=[(prompt, rejected, chosen), *world.rows[1:]])
    before, after = (estimates.cross_fitted(scores.Scorers(each)) for each in (world, flipped))
    assert np.array_equal(before[0], after[1])
    assert np.array_equal(before[1], after[0])
    changed = [not np.array_equal(*each) for each in zip(before[2:], after[2:], strict=True)]
    assert 0.3 < np.mean(changed) < 0.7


def test_stacking_trusts_what_predicts_labels():
    """Factors of noise and of scores that point the wrong way are 0 or nearly so; a calibrated score keeps its scale."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, 4000)
    labels = np.where(rng.random(4000) < 1 / (1 + np.exp(-truth)), 1, -1)
    noise = rng.normal(0, 1, 4000)
    good, useless, wrong = estimates.fit_factors(np.stack([labels * truth, labels * noise, -labels * truth], axis=1))
    assert good == pytest.approx(1, abs=0.1)
    assert useless == pytest.approx(0, abs=0.1)
    assert wrong == 0


def test_attributed_pairs_have_hybrid_weights_and_an_anchor_of_their_prompt(world):
    """Weights are T times a mix of two distributions (TI-DPO, eq. 8): their mean is 1. Mix 1 leaves no floor of the prior."""
    pairs = scores.as_pairs(world.rows, scores.Scorers(world).ref_logps)
    mixed, pure = (needed.attributed(scores.Scorers(world), pairs, mix) for mix in (0.7, 1.0))
    for pair in (*mixed, *pure):
        for side in (pair.chosen, pair.rejected):
            assert side.token_weights.mean() == pytest.approx(1, abs=1e-5)
            assert pair.anchor is not None
    first, same_prompt = (
        mixed[0],
        next(each for each in mixed[1:] if np.array_equal(each.prompt_ids, mixed[0].prompt_ids)),
    )
    assert np.array_equal(first.anchor.ids, same_prompt.anchor.ids)
    # weight = 0.7 * pure + 0.3 * prior, and the prior is symmetric about the middle of the response
    rest = (mixed[0].chosen.token_weights - 0.7 * pure[0].chosen.token_weights) / 0.3
    assert rest == pytest.approx(rest[::-1], abs=1e-4)
    assert rest.argmax() in (len(rest) // 2, (len(rest) - 1) // 2)
