"""What a run says of its data, in its first lines and wherever its result is read."""

import json
import math

import pytest

from train.data.dataset import open_weights
from train.job.job import run_job
from train.job.notices import held_out_was_seen
from train.job.prepare import open_inputs, open_pairs
from weights_store.errors import MismatchError

HALF = {"mean_pair_weight": 0.5, "min_pair_weight": 0.25, "max_pair_weight": 1.0}


@pytest.fixture
def notices_of(make_config):
    """Return a function that opens a job and returns its notices."""

    def notices(**changes) -> list[str]:
        return list(open_pairs(open_inputs(make_config(**changes))).notices)

    return notices


@pytest.fixture
def weighted(store, write_weights, rows) -> None:
    """A dataset whose pairs weigh 0.25 to 1, by annotators' scores."""
    weights = (0.25, 0.25, 0.5, 1.0)
    changed = [
        {**row, "pair_weight": weights[i % 4], "chosen_score": 4.0, "rejected_score": 3.0} for i, row in enumerate(rows)
    ]
    statistics = {"num_pairs": len(rows), "num_scored_pairs": len(rows), **HALF}
    write_weights(changed, statistics=statistics, recipe={"weights": {"pair_weight": "quality"}})


@pytest.mark.parametrize(
    ("counts", "changes", "line"),
    [
        # 30 / 20 = 1.5; 1 / 1.5 = 0.667, 1.33 / 1.5 = 0.887; 1.5 / 1.33 = 1.13
        (
            (30, 20),
            {},
            "toy/tis@1 has 30 desirable and 20 undesirable responses, which with their factors count 1.5 to 1; KTO's paper, "
            "as TRL quotes it, advises 1 to 1.33: set loss.desirable_weight between 0.667 and 0.887, or "
            "loss.undesirable_weight between 1.13 and 1.5",
        ),
        ((30, 20), {"loss": {"undesirable_weight": 1.5}}, None),
        ((30, 20), {"loss": {"desirable_weight": 0.8}}, None),
        # The other way round: 20 / (2 * 30) = 1 / 3
        (
            (30, 20),
            {"data": {"swap": True}, "loss": {"undesirable_weight": 2.0}},
            "toy/tis@1 has 20 desirable and 30 undesirable responses, which with their factors count 0.333 to 1; KTO's paper, "
            "as TRL quotes it, advises 1 to 1.33: set loss.desirable_weight between 3 and 3.99, or loss.undesirable_weight "
            "between 0.501 and 0.667",
        ),
        ((40, 40), {}, None),
        ((999, 1000), {}, None),
        ((40, 0), {}, "all 40 responses of toy/tis@1 are desirable, and kto is made for both kinds"),
        (
            (40, 0),
            {"data": {"swap": True}},
            "all 40 responses of toy/tis@1 are undesirable, and kto is made for both kinds",
        ),
        ((30, 20), {"loss": {"name": "dpo"}}, None),
    ],
)
def test_responses_that_count_unequally_in_kto_are_said(
    notices_of, write_weights, anchored_rows, counts, changes, line
) -> None:
    sides = {side: {"num_responses": count} for side, count in zip(("chosen", "rejected"), counts, strict=True)}
    statistics = {"num_pairs": 40, "num_anchored_pairs": 40, **sides}
    write_weights(anchored_rows, statistics=statistics, identity={"settings": {"anchors": {"source": "mismatched"}}})
    assert notices_of(**{**changes, "loss": {"name": "kto", **changes.get("loss", {})}}) == (
        [] if line is None else [line]
    )


def test_an_ordinary_dataset_needs_no_notice(notices_of) -> None:
    assert notices_of() == notices_of(loss={"name": "dpo"}) == []


@pytest.mark.usefixtures("weighted")
def test_pair_weights_are_said_and_can_be_ignored(notices_of, make_config) -> None:
    (line,) = notices_of(loss={"name": "dpo"})
    assert line == (
        "the pair weights of toy/tis@1 are 0.25 to 1, 0.5 in the mean, and each multiplies the loss of its pair: this is not "
        "plain dpo; data.use_pair_weights=false ignores them"
    )
    (line,) = notices_of(loss={"name": "dpo"}, data={"use_pair_weights": False})
    assert line.endswith("0.5 in the mean; data.use_pair_weights=false ignores them, and every pair counts once")
    identities = [
        open_inputs(make_config(data=data)).identity["data"]
        for data in ({}, {"use_pair_weights": True}, {"use_pair_weights": False})
    ]
    assert identities[0] == identities[1] == {"swap": False, "split": "", "max_pairs": None}
    assert identities[2] == {**identities[0], "use_pair_weights": False}


@pytest.mark.usefixtures("weighted")
def test_uni_dpo_on_quality_weights_applies_the_scores_twice(notices_of) -> None:
    assert notices_of(loss={"name": "uni_dpo"})[1] == (
        "uni_dpo weighs pairs by annotators' scores itself, and so do these pair weights, so the scores count twice; set "
        "data.use_pair_weights=false"
    )


def test_weights_that_were_not_counted_are_those_of_the_sample(write_weights, rows, notices_of) -> None:
    write_weights([{**row, "pair_weight": 0.5 if i % 2 else 0.0} for i, row in enumerate(rows)])
    assert notices_of()[0].startswith("the pair weights of toy/tis@1 are 0 to 0.5, 0.25 in the mean")


def test_pairs_that_all_weigh_nothing_are_refused(write_weights, rows, notices_of) -> None:
    write_weights(
        [{**row, "pair_weight": 0.0} for row in rows],
        statistics={"num_pairs": 40, "mean_pair_weight": 0.0, "min_pair_weight": 0.0, "max_pair_weight": 0.0},
    )
    with pytest.raises(MismatchError, match="all pair weights of toy/tis@1 are 0, so nothing would be learnt"):
        notices_of()
    assert notices_of(data={"use_pair_weights": False})[0].startswith("the pair weights of toy/tis@1 are 0 to 0")


def test_training_on_all_of_several_splits_is_said(write_weights, rows, notices_of) -> None:
    write_weights(rows, statistics={"num_pairs_by_split": {"test": 10, "train": 30}})
    assert notices_of() == [
        "data.split is empty, so all splits of toy/tis@1 are trained on: test (10 pairs), train (30 pairs)"
    ]
    assert notices_of(data={"split": "train"}) == []


# --- held-out pairs that contrastive models have seen ------------------------------------------------------------------

ALL = {"held_out": 0.0, "split": None}
OTHER = {"held_out": 0.0, "split": "train", "weights": "other/uniform@2", "num_seen_pairs": 12}
MARGIN = {"weights": {"pair_weight": "margin"}}


@pytest.mark.parametrize(
    ("trained_on", "recipe", "changes", "expected"),
    [
        (ALL, {}, {"eval": {"share": 0.2}}, True),
        (ALL, {}, {"data": {"split": "train"}, "eval": {"split": "test"}}, True),
        (ALL, {}, {}, False),  # nothing is held out
        (None, {}, {"eval": {"share": 0.2}}, False),  # nothing was trained: construction P, attributions
        (ALL, {}, {"eval": {"share": 0.2}, "loss": {"name": "dpo"}}, False),  # reads no weights
        (ALL, MARGIN, {"eval": {"share": 0.2}, "loss": {"name": "dpo"}}, True),  # but these
        (ALL, MARGIN, {"eval": {"share": 0.2}, "loss": {"name": "dpo"}, "data": {"use_pair_weights": False}}, False),
        ({"held_out": 0.2, "split": None}, {}, {"eval": {"share": 0.2}}, False),  # the same prompts
        ({"held_out": 0.3, "split": None}, {}, {"eval": {"share": 0.2}}, False),  # and more
        ({"held_out": 0.1, "split": None}, {}, {"eval": {"share": 0.2}}, True),  # only half of them
        ({"held_out": 0.3, "split": None}, {}, {"data": {"split": "train"}, "eval": {"split": "test"}}, True),
        ({"held_out": 0.0, "split": "train"}, {}, {"data": {"split": "train"}, "eval": {"split": "test"}}, False),
        ({"held_out": 0.0, "split": "train"}, {}, {"data": {"split": "train"}, "eval": {"share": 0.2}}, True),
        ({"held_out": 0.0, "split": "train"}, {}, {"data": {"split": "test"}, "eval": {"share": 0.2}}, False),
        ({"held_out": 0.0, "split": "train"}, {}, {"eval": {"share": 0.2}}, True),  # of all splits, that one too
        (OTHER, {}, {"eval": {"share": 0.2}}, True),
        (OTHER | {"num_seen_pairs": 0}, {}, {"eval": {"share": 0.2}}, False),  # no prompt in common
        (OTHER | {"held_out": 0.2}, {}, {"eval": {"share": 0.2}}, False),  # the same prompts in both datasets
        (OTHER, {}, {"data": {"split": "a"}, "eval": {"split": "b"}}, True),  # its splits are not these
    ],
)
def test_held_out_pairs_were_seen_where_contrastive_models_were_trained_on_them(
    write_weights, rows, make_config, trained_on, recipe, changes, expected
) -> None:
    write_weights(rows, recipe=recipe, **({} if trained_on is None else {"contrast": trained_on}))
    loss = {"beta": 0.1, **changes.get("loss", {})}
    config = make_config(**{**changes, "loss": loss})
    assert held_out_was_seen(config, open_weights(config.data)) is expected


def test_what_other_pairs_may_have_told_is_said(write_weights, rows, notices_of) -> None:
    write_weights(rows, contrast=OTHER)
    assert notices_of(eval={"share": 0.2}) == [
        "held-out pairs may have been seen: the contrastive models behind toy/tis@1 were trained on other/uniform@2, which has "
        "the prompts of 12 of its pairs; for a clean measurement build it with contrast.held_out=0.2, or a contrast.weights "
        "without these prompts"
    ]


def test_what_an_estimator_learnt_from_is_said(write_weights, rows, notices_of) -> None:
    write_weights(rows, contrast={"held_out": 0.0, "split": None, "is_head": True})
    assert notices_of(eval={"share": 0.2}) == [
        "held-out pairs were seen: the estimator behind toy/tis@1 was fitted on all pairs, so its weights know labels that are "
        "held out here; for a clean measurement build it with contrast.held_out=0.2"
    ]


def test_what_was_seen_is_said_in_log_card_metrics_and_dry_run(
    write_weights, rows, make_config, caplog, capsys
) -> None:
    write_weights(rows, contrast={"held_out": 0.05, "split": None})
    config = make_config(eval={"share": 0.3}, optim={"max_steps": 1})
    expected = (
        "held-out pairs were seen: the contrastive models behind toy/tis@1 were trained on all pairs but a share of 0.05 of "
        "the prompts, so its weights know labels that are held out here; for a clean measurement build it with "
        "contrast.held_out=0.3"
    )
    run_job(config, dry_run=True)
    assert f"{'notice':9}  {expected}" in capsys.readouterr().out.splitlines()
    folder = run_job(config).folder
    begin = next(i for i, line in enumerate(caplog.messages) if line.startswith("training tis_dpo on"))
    assert caplog.messages[begin + 1] == expected
    assert any(line.startswith("held out, but seen: ") for line in caplog.messages)
    card = (folder / "README.md").read_text()
    assert f"Note: {expected}." in card
    assert "| held out, but seen |" in card
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["held_out_was_seen"], metrics["notices"]) == (True, [expected])
    assert json.loads((folder / "lineage.json").read_text())["result"]["notices"] == [expected]


@pytest.mark.usefixtures("weighted")
def test_ignored_pair_weights_give_the_plain_loss(make_config) -> None:
    result = run_job(make_config(loss={"name": "dpo"}, data={"use_pair_weights": False}, optim={"max_steps": 1}))
    assert result.before["loss"] == pytest.approx(math.log(2), abs=1e-4)  # policy = reference
    weighted = run_job(make_config(loss={"name": "dpo"}, optim={"max_steps": 1}), overwrite=True)
    assert weighted.before["loss"] == pytest.approx(0.5 * math.log(2), abs=1e-4)
