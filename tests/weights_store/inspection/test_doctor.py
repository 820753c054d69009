"""Every finding: a planted example, and a healthy twin that differs in nothing else."""

import re
from pathlib import Path

import numpy as np
import pytest

from weights_store.inspection.doctor import CHECKS, Diagnosis, diagnose, looked_at
from weights_store.schemas import SIDES

NAME = "toy/weights"
TIS = {"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -1.5, "upper": 1.5}
TI = {"estimator": "ti"}
DOCS = Path(__file__).resolve().parents[3] / "docs" / "weights.md"


def mapped(function, *lists):
    return {side: [function(*each) for each in zip(*(values[side] for values in lists), strict=True)] for side in SIDES}


def tis_weights(made, factor=1.0, clamp=1.5):
    return {
        side: [np.exp(sign * np.clip(factor * each, -clamp, clamp)) for each in made.logratios[side]]
        for side, sign in zip(SIDES, (1, -1), strict=True)
    }


def with_last(made, factor):
    return mapped(lambda w: np.append(w[:-1], factor * w[-1]), tis_weights(made))


def with_random(made, factor):
    """One token in the middle weighs more."""
    return mapped(lambda w: np.where(np.arange(len(w)) == len(w) // 2, factor * w, w), tis_weights(made))


def with_ids(made, factor):
    """Ids 10 to 13, about a fiftieth of the tokens, weigh more."""
    return mapped(lambda w, ids: np.where((ids >= 10) & (ids < 14), factor * w, w), tis_weights(made), made.ids)


def falling(made, rng):
    """Weights that fall with relative position, or in any order."""
    shape = rng.permutation if rng is not None else np.asarray
    return mapped(lambda n: shape(np.exp(-2 * np.arange(n) / n)), made.lengths)


def thinned(made, one_in):
    """One in so many tokens of a response weighs 1, anywhere, at least one; the others next to nothing."""
    rng = np.random.default_rng(5)
    return mapped(lambda n: np.where(rng.permutation(n) < max(1, n // one_in), 1.0, 0.01), made.lengths)


def flipped(made, sign):
    return {"weights": tis_weights(made), "logratios": mapped(lambda each: sign * each, made.logratios)}


def of_pair(made, settings=TIS, factor=1.0, **metadata):
    return {
        "logratios": mapped(lambda each: np.float32(factor) * each, made.logratios),
        "settings": settings,
        **metadata,
    }


def held_out(verdict, name="tis", **record):
    record = {"log_likelihood": -0.69, "log_likelihood_se": 0.01, "accuracy": 0.51, "num_pairs": 60, **record}
    return {"statistics": {"held_out": {name: {**record, "multiplier": 0.4, "multiplier_se": 0.1, "verdict": verdict}}}}


def spread(std, factor):
    return {"statistics": {"spread": {"tis": {"std": std, "scale": factor}}}}


PLANTED = {
    "clamped": lambda made, bad: (
        {"weights": tis_weights(made, clamp=0.3 if bad else 1.0), "logratios": made.logratios}
        | {"settings": {**TIS, "lower": -0.3 if bad else -1.0, "upper": 0.3 if bad else 1.0}}
    ),
    # The same weights: the spread makes up for the size of the log-ratios.
    "hardly_differs": lambda made, bad: (
        of_pair(made, {**TIS, "spread": 0.3}, 1 / 16 if bad else 1) | spread(0.3, 16 if bad else 1)
    ),
    "inverted": lambda made, bad: flipped(made, -1 if bad else 1),
    "scorer_noise": lambda made, bad: of_pair(made, parity={"mean": 0.2 if bad else 0.02}),
    "held_out": lambda made, bad: held_out("no better than chance" if bad else "calibrated"),
    "constant": lambda made, bad: (
        {"weights": mapped(np.ones, made.lengths)} | {"settings": TIS if bad else {"estimator": "uniform"}}
    ),
    # SWIFT's clamp on the paper's formula: 1.84 against 1.07.
    "sides_apart": lambda made, bad: (
        {"settings": TI}
        | {"weights": tis_weights(made) | {"chosen": [(1.72 if bad else 1.1) * w for w in made.weights("chosen")]}}
    ),
    "position": lambda made, bad: {"weights": falling(made, None if bad else np.random.default_rng(1)), "settings": TI},
    "one_token": lambda made, bad: {"weights": with_random(made, 40 if bad else 2), "settings": TI},
    "last_token": lambda made, bad: {"weights": with_last(made, 4 if bad else 2), "settings": TI},
    "few_token_ids": lambda made, bad: {"weights": with_ids(made, 16 if bad else 2), "settings": TI},
    "effective_sample": lambda made, bad: {"weights": thinned(made, 9 if bad else 3), "settings": TI},
}


@pytest.fixture
def doctor(write_made_up, made_up):
    def run(**planted):
        return write_made_up(made_up, **planted).doctor(NAME)

    return run


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_example_is_found(name, doctor, made_up):
    found = doctor(**PLANTED[name](made_up, True))
    assert [each for each in found if each.name == name and each.severity == "warning"], found


@pytest.mark.parametrize("name", PLANTED)
def test_its_healthy_twin_has_no_findings(name, doctor, made_up):
    assert doctor(**PLANTED[name](made_up, False)) == []


def test_every_check_has_a_planted_example_and_a_row_in_the_docs():
    assert set(PLANTED) == set(CHECKS)
    section = DOCS.read_text(encoding="utf-8").partition("## What the doctor finds")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(CHECKS)


def test_a_finding_says_what_was_measured(doctor, made_up):
    weights = mapped(np.ones, made_up.lengths)
    weights["chosen"] = [2.0 * each for each in weights["chosen"]]
    found = {each.name: each for each in doctor(weights=weights, settings=TI)}["sides_apart"]
    assert found.figure == ("mean weight 2 on chosen and 1 on rejected tokens (apart by more than a factor of 1.25)")
    assert found.meaning.startswith("The loss falls by raising the log-probs of both responses alike")
    assert str(found).startswith("Mean weight 2 on chosen")


def test_the_last_token_of_ti_carries_responses_and_is_named(doctor, made_up):
    found = {each.name: each for each in doctor(weights=with_last(made_up, 60), settings=TI)}
    assert set(found) == {"position", "one_token", "last_token", "few_token_ids", "effective_sample"}
    assert "most often they are id 2 in 100 % (chosen) and id 2 in 100 % (rejected)" in found["last_token"].figure
    assert re.search(r"first of all 2\b", found["few_token_ids"].figure)


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        (held_out("wrong way round", "reversed"), "held_out"),
        (held_out("overconfident"), "held_out"),
    ],
)
def test_what_may_be_meant_is_a_note(doctor, planted, name):
    assert [(each.name, each.severity) for each in doctor(**planted)] == [(name, "note")]


def test_decay_is_meant_to_follow_the_position(doctor, made_up):
    found = doctor(weights=falling(made_up, None), settings={"estimator": "decay"})
    assert [(each.name, each.severity) for each in found] == [("position", "note")]


def test_scores_whose_spread_was_chosen_may_be_overconfident(doctor):
    assert doctor(**held_out("overconfident", spread=0.3, scale=7.0)) == []
    assert doctor(statistics={"held_out": {"tis": {"not_measured": "too few prompts"}}}) == []


def test_weights_that_are_all_0_are_constant(doctor, made_up):
    found = doctor(weights=mapped(np.zeros, made_up.lengths))
    assert [each.name for each in found] == ["constant"]


def test_warnings_come_before_notes(write_made_up, made_up):
    planted = held_out("overconfident") | {"weights": with_last(made_up, 4), "settings": TI}
    found = write_made_up(made_up, **planted).doctor(NAME)
    assert [each.severity for each in found] == ["warning", "note"]


def test_what_cannot_be_looked_at_is_not_claimed(write_made_up, made_up, tmp_path):
    store = write_made_up(made_up, settings=TI)
    survey, metadata = store.survey(NAME), store.metadata(NAME)
    words = looked_at(survey, metadata)
    assert "direction of the contrastive pair" not in words
    assert "clamped tokens" not in words
    assert "effective sample size" in words
    assert all(isinstance(each, Diagnosis) for each in diagnose(survey, metadata))
