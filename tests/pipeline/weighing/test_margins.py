"""Which pairs are measured, on which scores, and the scale that is fitted on them."""

import math

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from pipeline.weighing.fits import with_fits
from pipeline.weighing.held_out import fit_multiplier
from pipeline.weighing.margins import Margins, SeenLabels
from pipeline.weighing.section import AnyWeights
from pipeline.weighing.weigh import Weigher
from train.data.selection import Selection, is_held_out
from weights_store.errors import InputError


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
    # Pairs 0 to 9 train. Pairs 10 to 39 do not, but 10 to 14 have prompts of pairs that do, one of them in another batch.
    splits = ["train"] * 10 + ["test"] * 30
    lists = _pairs(_log_ratios(40), splits, [*range(10), *range(5), *range(100, 125)])
    seen = SeenLabels(Selection("train"))
    assert _margins([lists.slice(12), lists.slice(0, 12).combine_chunks()], seen).measure("tis").num_pairs == 25


def test_what_was_trained_on_everything_is_not_measured_and_says_what_to_do():
    margins = _margins([_pairs(_log_ratios(40))], SeenLabels(Selection(), by_dpo=True))
    assert (margins.can_measure, margins.measure("tis")) == (False, None)
    remedy = "trained on all these labels; set contrast.held_out, for example to 0.1"
    assert margins.records({}) == {"tis": {"not_measured": f"the models of the contrastive pair were {remedy}"}}
    few = _margins([_pairs(_log_ratios(5))]).records({})
    problem = "only 5 prompts have labels that the scores have not seen, and at least 10 are needed"
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
        "not_measured": "only 5 of 40 prompts have labels that the scores have not seen, and at least 10 are needed; the "
        "models were trained on the other prompts, which are also in other/uniform@3; set contrast.held_out, for example to 0.1"
    }


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
