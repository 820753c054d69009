"""Which pairs are measured, on which scores, and the scale that is fitted on them."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from pipeline.weighing.fits import with_fits
from pipeline.weighing.held_out import fit_multiplier, measure
from pipeline.weighing.margins import Margins, SeenLabels
from pipeline.weighing.section import AnyWeights
from pipeline.weighing.weigh import Weigher
from train.data.selection import Selection, is_held_out
from weights_store.errors import InputError
from weights_store.tables.checksums import mix


def _section(**settings):
    return TypeAdapter(AnyWeights).validate_python({"name": "toy/weights", "estimator": "tis", **settings})


def _pairs(log_ratios, splits=None, prompts=None, rewards=None):
    """Joined columns: each pair has two chosen tokens, whose log-ratios are given, and one rejected token with -1.

    `prompts` are numbers, by default one of its own for each pair; `rewards` are log pi+ - log ref of the first chosen token.
    """
    num_pairs = len(log_ratios)
    prompts = prompts or range(num_pairs)
    zeros = [[0.0, 0.0]] * num_pairs
    columns = {
        "pair_id": [f"{prompt:012x}{row:020x}" for row, prompt in enumerate(prompts)],
        "split": splits or ["train"] * num_pairs,
        "prompt_ids": [[1]] * num_pairs,
        "chosen_ids": [[0, 0]] * num_pairs,
        "rejected_ids": [[0]] * num_pairs,
        "chosen_positive_logps": log_ratios,
        "chosen_negative_logps": zeros,
        "rejected_positive_logps": [[-1.0]] * num_pairs,
        "rejected_negative_logps": [[0.0]] * num_pairs,
        "chosen_ref_logps": [[a - r, b] for (a, b), r in zip(log_ratios, rewards or [0.0] * num_pairs, strict=True)],
        "rejected_ref_logps": [[-1.0]] * num_pairs,
    }
    floats = {name: pa.array(values, pa.list_(pa.float32())) for name, values in columns.items() if "logps" in name}
    return pa.table(columns | floats)


def _margins(batches, seen=None, **settings):
    weigher = Weigher(_section(**settings))
    margins = Margins(weigher.section.estimators, seen or SeenLabels())
    for lists in batches:
        margins.add(lists, weigher.scores(lists))
    return margins


def _log_ratios(num_pairs, seed=0):
    return np.random.default_rng(seed).normal(0.25, 1, (num_pairs, 2)).astype(np.float32).tolist()


def test_a_margin_is_the_sum_over_chosen_minus_the_sum_over_rejected_tokens():
    log_ratios = _log_ratios(30)
    found = _margins([_pairs(log_ratios)]).measure("tis")
    by_hand = np.array([a + b + 1 for a, b in log_ratios])
    a, _ = fit_multiplier(by_hand, np.arange(30, dtype=np.uint64))
    assert (found.num_pairs, found.multiplier) == (30, pytest.approx(a, rel=1e-6))
    assert found.accuracy == np.mean(by_hand > 0)
    opposite = _margins([_pairs(log_ratios)], estimator="reversed").measure("reversed")
    assert opposite.multiplier == pytest.approx(-a, rel=1e-6)


def test_prompts_that_the_models_were_trained_on_are_left_out():
    lists = _pairs(_log_ratios(200))
    num_held_out = sum(is_held_out(pair_id, 0.25) for pair_id in lists["pair_id"].to_pylist())
    found = _margins([lists.slice(0, 90), lists.slice(90)], SeenLabels(Selection(share=0.25))).measure("tis")
    assert found.num_pairs == num_held_out
    assert 20 < num_held_out < 80


def test_a_prompt_of_another_split_is_left_out_if_it_was_trained_on_too():
    # Prompts 0 to 4 have a pair that trains and one that does not, 5 to 9 one that does, 10 to 34 one that does not. Batches
    # end between the pairs of prompt 2, of which the first trains, and of prompt 3, of which the second does.
    prompts = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, *range(5, 35)]
    splits = ["train", "test"] * 3 + ["test", "train"] * 2 + ["train"] * 5 + ["test"] * 25
    lists = _pairs(_log_ratios(40), splits, prompts)
    batches = [lists.slice(0, 5), lists.slice(5, 2), lists.slice(7)]
    found = _margins([batch.combine_chunks() for batch in batches], SeenLabels(Selection("train"))).records({})["tis"]
    assert (found["num_pairs"], found["num_seen_pairs"]) == (25, 15)


def test_what_was_trained_on_everything_is_not_measured_and_says_what_to_do():
    margins = _margins([_pairs(_log_ratios(40))], SeenLabels(Selection(), by_dpo=True))
    assert (margins.can_measure, margins.measure("tis")) == (False, None)
    remedy = "trained on all these labels; set contrast.held_out, for example to 0.1"
    assert margins.records({}) == {"tis": {"not_measured": f"the models of the contrastive pair were {remedy}"}}
    few = _margins([_pairs(_log_ratios(5))]).records({})
    problem = "only 5 prompts of 5 pairs have labels that the scores have not seen, and at least 10 are needed"
    assert few == {"tis": {"not_measured": problem}}
    few = _margins([_pairs(_log_ratios(5))], SeenLabels(Selection(share=0.99))).records({})
    assert few == {"tis": {"not_measured": f"{problem}; raise contrast.held_out above 0.99"}}


def test_prompts_of_other_pairs_that_trained_the_models_are_left_out():
    lists = _pairs(_log_ratios(40))
    seen = SeenLabels(other_prompts=np.array([*range(0, 30, 2), 99], np.uint64), other="other/uniform@3")
    found = _margins([lists.slice(0, 7), lists.slice(7)], seen).records({})["tis"]
    assert (found["num_pairs"], found["num_seen_pairs"]) == (25, 15)
    all_seen = SeenLabels(other_prompts=np.arange(35, dtype=np.uint64), other="other/uniform@3")
    assert _margins([lists], all_seen).records({})["tis"] == {
        "not_measured": "only 5 prompts of 40 pairs have labels that the scores have not seen, and at least 10 are needed; the "
        "models were trained on the other prompts, which are also in other/uniform@3; set contrast.held_out, for example to 0.1"
    }


@pytest.fixture
def small_sample(monkeypatch):
    """At most 60 pairs are measured."""
    monkeypatch.setattr("pipeline.weighing.margins.MAX_PAIRS", 60)


@pytest.mark.parametrize("ends", [[], [1, 100, 150], list(range(10, 300, 10))])
def test_of_many_pairs_those_of_the_prompts_with_the_smallest_hashes_are_measured(small_sample, ends):
    # 100 prompts of one, two, three and four pairs in turn: 250 pairs.
    prompts = np.repeat(np.arange(100), [1 + prompt % 4 for prompt in range(100)])
    log_ratios = _log_ratios(250)
    ordered, kept = sorted(range(100), key=lambda prompt: int(mix(np.array([prompt], np.uint64))[0])), []
    while len(kept) + 1 + ordered[0] % 4 <= 60:
        kept += np.flatnonzero(prompts == ordered.pop(0)).tolist()
    lists = _pairs(log_ratios, prompts=prompts.tolist())
    batches = [lists.slice(a, b - a).combine_chunks() for a, b in pairwise([0, *(e for e in ends if e < 250), 250])]
    together, parts = _margins(batches), [_margins([batch]) for batch in batches]
    merged = _margins([])
    for part in parts:
        merged.merge(part.collected)
    rows = sorted(kept)
    by_hand = measure(np.array([a + b + 1 for a, b in log_ratios])[rows], prompts[rows].astype(np.uint64))
    for found in (together, merged):
        record = found.records({})["tis"]
        assert (record["num_pairs"], record["num_prompts"]) == (len(kept), 100 - len(ordered))
        assert (record["num_unseen_pairs"], record["num_seen_pairs"]) == (250, 0)
        assert record["log_likelihood"] == pytest.approx(by_hand.log_likelihood, rel=1e-6)
        assert record["multiplier"] == pytest.approx(by_hand.multiplier, rel=1e-6)
    assert 55 < len(kept) <= 60


def test_a_sample_is_of_the_pairs_that_the_scores_have_not_seen_and_the_same_for_dpo(small_sample):
    log_ratios = _log_ratios(400)
    lists = _pairs(log_ratios, rewards=[a + b for a, b in log_ratios])
    num_unseen = sum(is_held_out(pair_id, 0.5) for pair_id in lists["pair_id"].to_pylist())
    records = _margins([lists], SeenLabels(Selection(share=0.5), by_dpo=True)).records({"tis": 1.0})
    for record in (records["tis"], records["dpo"]):
        found = [record[key] for key in ("num_pairs", "num_unseen_pairs", "num_seen_pairs")]
        assert found == [60, num_unseen, 400 - num_unseen]
    assert records["tis"]["gain_over_dpo"] == pytest.approx(
        records["tis"]["log_likelihood"] - records["dpo"]["log_likelihood"], abs=1e-9
    )


def test_up_to_so_many_pairs_nothing_is_left_out(small_sample):
    record = _margins([_pairs(_log_ratios(60))]).records({})["tis"]
    assert (record["num_pairs"], "num_unseen_pairs" in record) == (60, False)


def test_what_is_kept_is_bounded(small_sample):
    margins = _margins([])
    for part in range(50):
        margins.merge(_margins([_pairs(_log_ratios(40), prompts=list(range(40 * part, 40 * part + 40)))]).collected)
        assert margins.collected.margins["tis"]._num_kept < 120
    assert margins.records({})["tis"]["num_unseen_pairs"] == 2000


def test_estimators_without_scores_have_nothing_to_measure():
    for settings in ({"estimator": "uniform"}, {"estimator": "decay"}, {"estimator": "random"}):
        assert _margins([_pairs(_log_ratios(40))], **settings).records({}) == {}
    ensemble = _margins([_pairs(_log_ratios(40))], estimator="ensemble", members=["decay", "sepo", "reversed"])
    assert list(ensemble.records({})) == ["sepo", "reversed"]


def test_dpos_own_reward_is_measured_on_the_same_pairs():
    # Its margins are the given rewards: the rejected token has log pi+ = log ref, and so has the second chosen one.
    log_ratios = _log_ratios(400)
    rewards = np.random.default_rng(1).normal([a + b for a, b in log_ratios], 1).tolist()
    lists = _pairs(log_ratios, rewards=rewards)
    records = _margins([lists], SeenLabels(Selection(share=0.5), by_dpo=True)).records({"tis": 1.0})
    unseen = [row for row, pair_id in enumerate(lists["pair_id"].to_pylist()) if is_held_out(pair_id, 0.5)]
    prompts = np.array(unseen, np.uint64)
    a, _ = fit_multiplier(np.array(rewards)[unseen], prompts)
    assert records["dpo"]["multiplier"] == pytest.approx(a, rel=1e-5)
    assert records["dpo"]["num_pairs"] == records["tis"]["num_pairs"] == len(unseen)
    gain = records["tis"]["log_likelihood"] - records["dpo"]["log_likelihood"]
    assert records["tis"]["gain_over_dpo"] == pytest.approx(gain, abs=1e-9)
    assert ("scale" in records["tis"], "scale" in records["dpo"]) == (True, False)
    assert "dpo" not in _margins([lists]).records({})  # two prompts of one model: there is no DPO


def test_a_calibrated_scale_is_fitted_on_held_out_pairs_before_anything_is_weighed():
    lists = _pairs(_log_ratios(300))
    seen = SeenLabels(Selection(share=0.5))
    section = _section(scale="calibrated", lower=-9.0, upper=9.0, transforms=["position"], position_bins=2)
    weigher = with_fits(
        Weigher(section, seen=seen), lambda collect: [collect([lists.slice(0, 100)]), collect([lists.slice(100)])]
    )
    a = _margins([lists], seen).measure("tis").multiplier
    assert weigher.scales == {"tis": pytest.approx(a)}
    assert a > 0
    # The curves come after it: the mean weight at the first half of the chosen responses, in which the first token lies.
    first = np.array(lists["chosen_positive_logps"].to_pylist())[:, 0]
    assert weigher.curves["chosen"][0] == pytest.approx(np.exp(a * first).mean(), rel=1e-5)
    weights = weigher.sides(lists)["chosen"].weights.token_weights
    assert weights[0] == pytest.approx(math.exp(a * first[0]) / np.exp(a * first).mean(), rel=1e-5)


def test_members_of_an_ensemble_have_scales_of_their_own_and_wrong_scores_get_none():
    lists = _pairs(_log_ratios(300))
    section = _section(estimator="ensemble", members=["tis", "reversed", "decay"], scale="calibrated")
    scales = with_fits(Weigher(section), lambda collect: [collect([lists])]).scales
    assert scales["tis"] > 0
    assert scales == {"tis": pytest.approx(_margins([lists]).measure("tis").multiplier), "reversed": 0}


def test_a_scale_that_cannot_be_fitted_is_refused():
    seen = SeenLabels(Selection(), by_dpo=True)
    with pytest.raises(InputError, match=r"'tis' on labels .* trained on all these labels; set contrast.held_out"):
        with_fits(Weigher(_section(scale="calibrated"), seen=seen), lambda _: pytest.fail("nothing needs to be read"))
    with pytest.raises(InputError, match=r"only 5 prompts .* or give weights.scale a number"):
        with_fits(Weigher(_section(scale="calibrated")), lambda collect: [collect([_pairs(_log_ratios(5))])])
