import math

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from weights_store.errors import DamageError, NotFoundError
from weights_store.inspection import survey as module
from weights_store.inspection.survey import survey
from weights_store.schemas import SIDES

NAME = "hh-harmless/tis-dpo"


@pytest.fixture
def by_hand(small_store):
    return small_store.survey(NAME)


def test_weights_of_a_side_by_hand(by_hand):
    # a: 1 2 0.5, b: 4 1 0.5 1.5, c: 0.5 0.75, d: 1.25; squares 5.25 + 19.5 + 0.8125 + 1.5625.
    side = by_hand.chosen
    assert (side.num_responses, side.num_tokens, side.mean_weight) == (4, 10, 1.3)
    assert (side.min_weight, side.max_weight) == (0.5, 4.0)
    assert side.std_weight == pytest.approx(math.sqrt(27.125 / 10 - 1.3**2))
    # (Σw)² / (T Σw²): a 12.25 / 15.75, b 49 / 78, c 1.5625 / 1.625, d 1.
    assert side.effective_share == pytest.approx((12.25 / 15.75 + 49 / 78 + 1.5625 / 1.625 + 1) / 4)
    # Last tokens 0.5, 1.5, 0.75, 1.25; id 9 ends a, b and c.
    assert (side.last_weight, side.last_id, side.last_id_share) == (1.0, 9, 0.75)
    assert side.counts.sum() == 10
    assert dict(zip(side.edges, side.counts, strict=False))[0.5] == 3
    assert dict(zip(side.edges, side.counts, strict=False))[4.0] == 1


def test_weight_by_position_by_hand(by_hand):
    # Twentieths: a 0, 6, 13; b 0, 5, 10, 15; c 0, 10; d 0.
    expected = {0: (1 + 4 + 0.5 + 1.25) / 4, 5: 1.0, 6: 2.0, 10: (0.5 + 0.75) / 2, 13: 0.5, 15: 1.5}
    found = by_hand.chosen.weight_by_position
    assert {at: found[at] for at in np.flatnonzero(~np.isnan(found))} == expected


def test_clamped_shares_by_hand(by_hand):
    # Clamp -0.5 to 1.5. Chosen: 0 1.5 -0.5, 2 0 -1 0.5, -1 -0.5, 0.25. Rejected: 2 0, -1 -0.5 0, -1 -0.5 0 -0.5 0, 0.5.
    assert (by_hand.chosen.share_at_lower, by_hand.chosen.share_at_upper) == (4 / 10, 2 / 10)
    assert (by_hand.rejected.share_at_lower, by_hand.rejected.share_at_upper) == (5 / 11, 1 / 11)


def test_log_ratios_by_hand(by_hand):
    found = by_hand.logratios
    # Sums 1.25 and -1, squares 9.0625 and 7, sizes 7.25 and 6, over 10 and 11 tokens.
    assert found.mean == {"chosen": 0.125, "rejected": pytest.approx(-1 / 11)}
    assert found.mean_abs == pytest.approx(13.25 / 21)
    assert found.std == pytest.approx(math.sqrt(16.0625 / 21 - (0.25 / 21) ** 2))
    # Means of the responses: a 1/3 - 1, b 3/8 + 1/2, c -3/4 + 2/5, d 1/4 - 1/2. Sums favour chosen in b and c.
    gaps = [1 / 3 - 1, 3 / 8 + 1 / 2, -3 / 4 + 2 / 5, 1 / 4 - 1 / 2]
    assert (found.num_pairs, found.share_agreeing) == (4, 0.5)
    assert found.mean_gap == pytest.approx(np.mean(gaps))
    assert found.mean_gap_se == pytest.approx(np.std(gaps, ddof=1) / 2)


def test_one_token_with_ten_times_the_mean_carries_its_response(write_made_up, made_up):
    weights = {side: [np.ones(n) for n in made_up.lengths[side]] for side in SIDES}
    lengths = made_up.lengths["chosen"]
    for each, n in zip(weights["chosen"][:6], lengths, strict=False):
        each[-1] = 10.01 * (n - 1) / (n - 10) if n > 10 else 100.0  # w n = 10 (n - 1 + w)
    is_carried = lengths[:6] > 10  # in 10 tokens none can have more than ten times the mean
    assert 0 < is_carried.sum() < 6
    found = write_made_up(made_up, weights=weights, settings={"estimator": "ti"}).survey("toy/weights")
    assert found.chosen.share_carried == found.chosen.share_carried_by_last == is_carried.sum() / 60
    assert (found.rejected.share_carried, found.logratios, found.chosen.share_at_lower) == (0.0, None, None)


def test_weights_by_position_alone_are_explained_by_it(write_made_up, made_up):
    steps = {side: [1.0 + (20 * np.arange(n) // n) for n in made_up.lengths[side]] for side in SIDES}
    rng = np.random.default_rng(3)
    steps["rejected"] = [rng.permutation(each) for each in steps["rejected"]]
    found = write_made_up(made_up, weights=steps).survey("toy/weights")
    assert found.chosen.position_share == pytest.approx(1)
    assert found.rejected.position_share < 0.05


@pytest.fixture
def of_two_prompts(write_made_up, made_up):
    return write_made_up(made_up, logratios=made_up.logratios, num_parts=3, num_prompts=2)


def test_polars_counts_the_same(of_two_prompts):
    found = of_two_prompts.survey("toy/weights")
    length = pl.len().over("pair_id", "side")
    tokens = of_two_prompts.scan_tokens("toy/weights").with_columns(
        pl.col("weight").cast(pl.Float64),
        ratio=(pl.col("logp_pos") - pl.col("logp_neg")).cast(pl.Float64),
        place=pl.col("position") * 20 // length,
    )
    of_side = tokens.group_by("side").agg(
        pl.len(), mean=pl.mean("weight"), low=(pl.col("ratio") <= -0.25).mean(), abs=pl.col("ratio").abs().mean()
    )
    rows = {row["side"]: row for row in of_side.collect().to_dicts()}
    for side, seen in found.sides().items():
        assert (seen.num_tokens, seen.mean_weight) == (rows[side]["len"], pytest.approx(rows[side]["mean"]))
        places = tokens.filter(side=side).group_by("place").agg(pl.mean("weight")).sort("place").collect()
        np.testing.assert_allclose(seen.weight_by_position, places["weight"])
    counts = tokens.group_by("token_id", "side").agg(
        count=pl.len().cast(pl.Int64), mean_weight=pl.mean("weight"), total=pl.sum("weight")
    )
    counts = counts.with_columns(share_of_weight=pl.col("total") / pl.col("total").sum().over("side")).drop("total")
    expected = counts.filter(pl.col("count") >= 5).collect()
    assert 50 < expected.height < 400
    assert_frame_equal(found.tokens, expected, check_row_order=False)
    of_responses = tokens.group_by("pair_id", "side").agg(pl.mean("ratio"), total=pl.sum("ratio")).collect()
    pairs = of_responses.pivot("side", index="pair_id", values=["ratio", "total"])
    assert found.logratios.mean_gap == pytest.approx((pairs["ratio_chosen"] - pairs["ratio_rejected"]).mean())
    assert found.logratios.share_agreeing == (pairs["total_chosen"] > pairs["total_rejected"]).mean()


def test_ranges_and_slices_change_nothing(of_two_prompts, monkeypatch):
    whole = of_two_prompts.survey("toy/weights")
    monkeypatch.setattr(module, "_SLICE_PAIRS", 7)
    pieces = survey(of_two_prompts.root, of_two_prompts.resolve("toy/weights"), range_bytes=4096)
    assert_frame_equal(pieces.tokens, whole.tokens)
    for side in SIDES:
        np.testing.assert_array_equal(pieces.sides()[side].counts, whole.sides()[side].counts)
        assert pieces.sides()[side].effective_share == pytest.approx(whole.sides()[side].effective_share)
    assert pieces.logratios.mean_gap_se == pytest.approx(whole.logratios.mean_gap_se)


def test_weights_that_do_not_fit_their_tokens_stop_it(write_made_up, made_up):
    weights = {side: made_up.weights(side) for side in SIDES}
    weights["rejected"][3] = weights["rejected"][3][:-1]
    store = write_made_up(made_up, weights=weights)
    with pytest.raises(
        DamageError, match="column rejected_token_weights does not have one value for each of rejected_ids"
    ):
        store.survey("toy/weights")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_weights_that_no_training_could_use_stop_it(write_made_up, made_up, bad):
    weights = {side: made_up.weights(side) for side in SIDES}
    weights["chosen"][3][1] = bad
    store = write_made_up(made_up, weights=weights)
    with pytest.raises(
        DamageError, match=rf"column chosen_token_weights has {bad}, expected a finite number >= 0; .*--rows"
    ):
        store.survey("toy/weights")


def test_a_log_prob_that_is_not_finite_stops_it(write_made_up, made_up):
    """Means of log-ratios would be NaN, and no check of the doctor would find anything."""
    made_up.logratios["rejected"][5][0] = math.nan
    store = write_made_up(made_up, weights={side: made_up.weights(side) for side in SIDES}, logratios=made_up.logratios)
    with pytest.raises(DamageError, match="column rejected_positive has nan, expected a finite number; "):
        store.doctor("toy/weights")


def test_a_row_without_any_response_stops_it(write_made_up, made_up):
    last = len(made_up.pair_ids) - 1
    for side in SIDES:
        made_up.lengths[side][last] = 0
        for values in (made_up.ids, made_up.logratios):
            values[side][last] = values[side][last][:0]
    with pytest.raises(DamageError, match="chosen_ids and rejected_ids are empty in a pair"):
        write_made_up(made_up).survey("toy/weights")


def test_log_probs_that_are_gone_are_named(of_two_prompts):
    import shutil

    shutil.rmtree(of_two_prompts.root.path / "logps/toy/negative2")
    with pytest.raises(NotFoundError, match="no table logps/toy/negative2"):
        of_two_prompts.survey("toy/weights")
