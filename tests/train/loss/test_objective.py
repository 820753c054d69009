import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from train.loss.config import LOSSES, LossSection
from train.loss.loss_config import LossConfig
from train.loss.needs import Needs
from train.loss.objective import check_columns_for, compute_pair_losses, count_units
from train.loss.terms import ResponseLogps
from weights_store.errors import MismatchError
from weights_store.schemas import WEIGHTS


def config(name: str, **settings: Any) -> LossConfig:
    beta = {} if name in ("sepo", "sft", "distill") else {"beta": 0.1}
    return TypeAdapter(LossSection).validate_python({"name": name, **beta, **settings})


def sides() -> tuple[ResponseLogps, ResponseLogps]:
    """Log-ratios: chosen 0.5, -0.2; rejected -0.4, 0.3, 0.1. Shapes [1, 3], the last of chosen masked."""
    mask = torch.tensor([[True, True, False]])
    chosen = [torch.tensor([row]) for row in ([-1.0, -2.2, 9.0], [-1.5, -2.0, 9.0], [2.0, 1.0, 9.0], [0.1, 0.2, 9.0])]
    other = [torch.tensor([row]) for row in ([-3.4, -0.7, -0.1], [-3.0, -1.0, -0.2], [0.5, 1.0, 2.0], [0.3, 0.1, 0.4])]
    return (
        ResponseLogps(chosen[0], mask, *chosen[1:]),
        ResponseLogps(other[0], torch.ones_like(mask), *other[1:]),
    )


def anchor() -> ResponseLogps:
    """Log-ratios 0.1, 0.2, the last masked."""
    chosen, _ = sides()
    return chosen._replace(policy_logps=torch.tensor([[-1.4, -1.8, 9.0]]))


REWARDS = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
PLAIN = REWARDS | {"logps/chosen", "logps/rejected"}
WEIGHTED = PLAIN | {f"weighted_{name}" for name in REWARDS}
TRIPLET = {"triplet", "triplet/active", "triplet/to_chosen", "triplet/to_rejected"}


@pytest.mark.parametrize(
    ("loss", "needs"),
    [
        (config("dpo"), Needs(ref_logps=True)),
        (config("ipo"), Needs(ref_logps=True)),
        (config("d2po"), Needs(ref_logps=True)),
        (config("tdpo1"), Needs(ref_logps=True, kl_direction="ref_policy", reference_model=True)),
        (config("tdpo2", kl="top_k"), Needs(ref_logps=True, kl_direction="ref_policy", ref_top=True)),
        (config("tis_dpo"), Needs(ref_logps=True, token_weights=True)),
        (
            config("tis_dpo", kl="exact"),
            Needs(ref_logps=True, token_weights=True, kl_direction="policy_ref", reference_model=True),
        ),
        (
            config("tis_dpo", kl="top_k"),
            Needs(ref_logps=True, token_weights=True, kl_direction="policy_ref", ref_top=True),
        ),
        (config("ti_dpo"), Needs(ref_logps=True, token_weights=True, anchors=True)),
        (config("ti_dpo", triplet_gamma=0.0), Needs(ref_logps=True, token_weights=True)),
        (
            config("ti_dpo", variant="release"),
            Needs(ref_logps=True, token_weights=True, anchors=True, kl_direction="ref_policy", reference_model=True),
        ),
        (
            config("ti_dpo", variant="release", kl="top_k"),
            Needs(ref_logps=True, token_weights=True, anchors=True, kl_direction="ref_policy", ref_top=True),
        ),
        (
            config("ti_dpo", anchor="online"),
            Needs(
                ref_logps=True,
                token_weights=True,
                anchors=True,
                fresh_anchors=True,
                reference_model=True,
                refresh_steps=1,
            ),
        ),
        (
            config("ti_dpo", importance="online", refresh_steps=4),
            Needs(ref_logps=True, fresh_weights=True, anchors=True, refresh_steps=4),
        ),
        (config("treg"), Needs(ref_logps=True, token_weights=True)),
        (config("bpo"), Needs(ref_logps=True)),
        (config("tbpo_a"), Needs(ref_logps=True, kl_direction="ref_policy", reference_model=True)),
        (config("tbpo_a", kl="top_k"), Needs(ref_logps=True, kl_direction="ref_policy", ref_top=True)),
        (config("simpo"), Needs()),
        (config("simpo", nll_lambda=1.0), Needs()),
        (config("confpo"), Needs()),
        (config("sepo"), Needs(token_weights=True)),
        (config("uni_dpo"), Needs(ref_logps=True, scores=True)),
        (config("kto"), Needs(ref_logps=True, anchors=True, mismatched=True)),
        (config("tis_kto"), Needs(ref_logps=True, token_weights=True, anchors=True, mismatched=True)),
        (config("sft"), Needs(rejected=False)),
        (config("distill"), Needs(token_weights=True, rejected=False, kl_direction="ref_policy", ref_top=True)),
    ],
)
def test_what_a_loss_needs_is_enough_for_it(loss: LossConfig, needs: Needs) -> None:
    assert loss.needs == needs
    bare = []
    for side in sides():
        ref_logps, token_weights = side.ref_logps, side.token_weights
        kls = side.kls if needs.kl_direction else None
        has_weights = needs.token_weights or needs.fresh_weights
        keep = (ref_logps if needs.ref_logps else None, token_weights if has_weights else None, kls)
        bare.append(ResponseLogps(side.policy_logps, side.completion_mask, *keep))
    scores = (torch.tensor([4.0]), torch.tensor([3.0])) if needs.scores else None
    bare_anchor = anchor()._replace(token_weights=None, kls=None) if needs.anchors else None
    z0 = torch.zeros(()) if needs.mismatched else None
    rejected = bare[1] if needs.rejected else None
    result, metrics = compute_pair_losses(loss, bare[0], rejected, scores, bare_anchor, z0)
    assert result.losses.isfinite().all()
    assert ("rewards/chosen" in metrics) == needs.ref_logps


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (config("dpo"), PLAIN),
        (config("dpo", nll_lambda=0.0), PLAIN),
        (config("dpo", nll_lambda=0.5), PLAIN | {"nll"}),
        (config("sft"), PLAIN),
        (config("distill", nll_lambda=0.5), PLAIN | {"kl_ref_policy/chosen", "kl_ref_policy/rejected"}),
        (config("treg"), PLAIN),
        (config("bpo"), PLAIN),
        (config("tbpo_a"), WEIGHTED | {"kl_ref_policy/chosen", "kl_ref_policy/rejected"}),
        (config("ipo"), WEIGHTED),
        (config("simpo"), WEIGHTED),
        (config("confpo"), WEIGHTED),
        (config("sepo"), WEIGHTED),
        (config("d2po"), WEIGHTED),
        (config("uni_dpo"), WEIGHTED),
        (config("tis_dpo"), WEIGHTED),
        (config("tis_dpo", kl="top_k"), WEIGHTED | {"kl_policy_ref/chosen", "kl_policy_ref/rejected"}),
        (config("ti_dpo"), WEIGHTED | TRIPLET),
        (config("ti_dpo", triplet_gamma=0.0), WEIGHTED),
        (
            config("ti_dpo", variant="release"),
            WEIGHTED | TRIPLET | {"kl_ref_policy/chosen", "kl_ref_policy/rejected"},
        ),
        (config("tdpo1"), WEIGHTED | {"kl_ref_policy/chosen", "kl_ref_policy/rejected"}),
        (config("tdpo2"), WEIGHTED | {"kl_ref_policy/chosen", "kl_ref_policy/rejected"}),
    ],
)
def test_metric_names_are_those_of_trl_and_everything_else_apart(loss: LossConfig, names: set[str]) -> None:
    scores = (torch.tensor([4.0]), torch.tensor([3.0]))
    _, metrics = compute_pair_losses(loss, *sides(), scores=scores, anchor=anchor())
    assert set(metrics) == names
    assert all(values.shape == (1,) and not values.requires_grad for values in metrics.values())


def test_metrics_are_unweighted_sums_and_weighted_ones_what_the_loss_sees() -> None:
    result, metrics = compute_pair_losses(config("tis_dpo", kl="exact"), *sides())
    expected = {
        "rewards/chosen": 0.03,  # 0.1 * (0.5 - 0.2)
        "rewards/rejected": 0.0,  # 0.1 * (-0.4 + 0.3 + 0.1)
        "rewards/margins": 0.03,
        "rewards/accuracies": 1.0,
        "logps/chosen": -3.2,
        "logps/rejected": -4.2,
        "weighted_rewards/chosen": 0.04,  # 0.1 * (2*0.5 - 0.2 - (2*0.1 + 0.2))
        "weighted_rewards/rejected": -0.075,  # 0.1 * (-0.5*0.4 + 0.3 + 2*0.1 - (0.5*0.3 + 0.1 + 2*0.4))
        "weighted_rewards/margins": 0.115,
        "weighted_rewards/accuracies": 1.0,
        "kl_policy_ref/chosen": 0.3,  # unweighted
        "kl_policy_ref/rejected": 0.8,
    }
    assert {name: values.item() for name, values in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert result.losses.item() == pytest.approx(math.log1p(math.exp(-0.115)), abs=1e-6)


def test_the_triplet_is_logged_without_its_factor_and_is_no_part_of_the_rewards() -> None:
    result, metrics = compute_pair_losses(config("ti_dpo", triplet_margin=0.7), *sides(), anchor=anchor())
    expected = {
        "triplet": 0.76,  # 0.32 - 0.26 + 0.7
        "triplet/active": 1.0,
        "triplet/to_chosen": 0.32,  # (0.1 - 0.5)^2 + (0.2 + 0.2)^2
        "triplet/to_rejected": 0.26,  # (0.1 + 0.4)^2 + (0.2 - 0.3)^2
        "weighted_rewards/chosen": 0.08,  # 0.1 * (2*0.5 - 0.2)
        "weighted_rewards/rejected": 0.03,  # 0.1 * (-0.5*0.4 + 0.3 + 2*0.1)
    }
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, abs=1e-6)
    assert result.losses.item() == pytest.approx(math.log1p(math.exp(-0.05)) + 0.1 * 0.76, abs=1e-6)
    near_chosen = anchor()._replace(policy_logps=sides()[0].policy_logps)
    _, metrics = compute_pair_losses(config("ti_dpo", triplet_margin=0.7), *sides(), anchor=near_chosen)
    # 0 - (0.9^2 + 0.5^2) + 0.7 < 0
    assert (metrics["triplet"].item(), metrics["triplet/active"].item()) == (0.0, 0.0)


def test_losses_without_a_beta_log_plain_log_ratios() -> None:
    for name in ("sepo", "sft"):
        _, metrics = compute_pair_losses(config(name), *sides())
        assert metrics["rewards/chosen"].item() == pytest.approx(0.3, abs=1e-6)
    _, metrics = compute_pair_losses(config("sft", beta=0.1), sides()[0], None)
    assert set(metrics) == {"rewards/chosen", "logps/chosen"}
    assert metrics["rewards/chosen"].item() == pytest.approx(0.03, abs=1e-6)


def test_settings_reach_their_loss() -> None:
    chosen, rejected = sides()
    scores = (torch.tensor([4.0]), torch.tensor([3.0]))
    for name, changed in [
        ("dpo", {"beta": 0.2}),
        ("dpo", {"label_smoothing": 0.2}),
        ("ipo", {"beta": 0.2}),
        ("tdpo2", {"alpha": 0.1}),
        ("tis_dpo", {"kl": "exact"}),
        ("simpo", {"gamma_beta_ratio": 0.1}),
        ("d2po", {"gamma": 0.5}),
        ("treg", {"reg_alpha": 0.1}),
        ("bpo", {"bregman_lambda": 0.5}),
        ("bpo", {"min_ratio": 0.99}),
        ("tbpo_a", {"bregman_lambda": 0.5}),
        ("uni_dpo", {"quality_eta": 0.1}),
        ("uni_dpo", {"tau_ref": 0.1}),
        ("uni_dpo", {"focal_gamma": 1.0}),
        ("ti_dpo", {"triplet_gamma": 0.3}),
        ("ti_dpo", {"triplet_gamma": 0.0}),
        ("ti_dpo", {"triplet_margin": 0.9}),
        ("ti_dpo", {"variant": "release", "triplet_gamma": 0.1, "triplet_margin": 0.5}),
    ]:
        plain, _ = compute_pair_losses(config(name), chosen, rejected, scores, anchor())
        other, _ = compute_pair_losses(config(name, **changed), chosen, rejected, scores, anchor())
        assert abs(plain.losses.item() - other.losses.item()) > 1e-6, (name, changed)


@pytest.mark.parametrize("name", [name for name in LOSSES if "nll_lambda" in LOSSES[name].model_fields])
def test_nll_lambda_adds_the_mean_nll_of_chosen_to_every_loss_that_has_it(name: str) -> None:
    if name in ("uni_dpo", "distill"):  # have terms of their own, for some pairs and for each token
        return
    data = (*sides(), (torch.tensor([4.0]), torch.tensor([3.0])), anchor(), torch.zeros(()))
    plain, _ = compute_pair_losses(config(name), *data)
    with_nll, metrics = compute_pair_losses(config(name, nll_lambda=0.5), *data)
    assert metrics["nll"].item() == pytest.approx(1.6)  # (1.0 + 2.2) / 2
    assert with_nll.losses.item() == pytest.approx(plain.losses.item() + 0.8, abs=1e-6)
    assert with_nll.chosen_rewards == plain.chosen_rewards


@pytest.mark.parametrize(
    ("loss", "at_start"),
    [
        (config("dpo"), math.log(2)),
        (config("treg"), math.log(2)),
        (config("bpo"), 0.0),
        (config("tbpo_a"), 0.0),
        (config("dpo", nll_lambda=0.5), math.log(2) + 0.5 * 1.75),  # log ref of chosen: -1.5, -2.0
        (config("tis_dpo", nll_lambda=2.0), math.log(2) + 2 * 1.75),
    ],
)
def test_the_loss_before_the_first_step_follows_from_the_stored_log_probs(loss: LossConfig, at_start: float) -> None:
    chosen, rejected = (side._replace(policy_logps=side.ref_logps, kls=torch.zeros(1, 3)) for side in sides())
    result, _ = compute_pair_losses(loss, chosen, rejected)
    assert result.losses.item() == pytest.approx(at_start, abs=1e-6)


def test_a_side_or_scores_that_are_missing_are_refused() -> None:
    with pytest.raises(ValueError, match="dpo needs the rejected side; none was given"):
        compute_pair_losses(config("dpo"), sides()[0], None)
    with pytest.raises(ValueError, match="uni_dpo needs annotator scores; none were given"):
        compute_pair_losses(config("uni_dpo"), *sides())
    with pytest.raises(ValueError, match="ti_dpo with triplet_gamma above 0 needs an anchor; none was given"):
        compute_pair_losses(config("ti_dpo"), *sides())


def test_sft_and_distillation_are_means_over_tokens_kto_over_responses_and_the_others_over_pairs() -> None:
    others = {"sft": 50, "distill": 50, "kto": 4, "tis_kto": 4}
    for name in LOSSES:
        assert count_units(config(name), num_pairs=3, num_chosen_tokens=50, num_responses=4) == others.get(name, 3)


@pytest.mark.parametrize(
    ("loss", "absent", "message"),
    [
        (config("dpo"), "chosen_ref_logps", "loss.name='dpo' needs chosen_ref_logps, which toy/x@3 lacks"),
        (
            config("tis_dpo"),
            "rejected_token_weights",
            "^loss.name='tis_dpo' needs rejected_token_weights,.*--set weights.estimator=tis`",
        ),
        (config("ti_dpo"), "token_weights", "needs chosen_token_weights, rejected_.*--set weights.estimator=ti`"),
        (
            config("ti_dpo", variant="release"),
            "anchor",
            "needs anchor_ids, anchor_ref_logps, which toy/x@3 lacks in some or all rows; build it again with `tokenweights "
            "build RECIPE --set anchors.seed=0`, or train with loss.anchor='online' or loss.triplet_gamma=0$",
        ),
        (config("kto"), "anchor", "loss.name='kto' needs anchor_ids, .*--set anchors.source=mismatched`$"),
        (config("ti_dpo", variant="release", kl="top_k"), "ref_top", "loss.kl='top_k' needs chosen_ref_top_ids, "),
        (config("sepo"), "chosen_token_weights", "needs chosen_token_weights,.*--set weights.estimator=sepo`"),
        (config("treg"), "chosen_token_weights", "needs chosen_token_weights,.*--set weights.estimator=treg`"),
        (config("distill"), "ref_top", "name='distill' needs chosen_ref_top_ids, .*RECIPE --set score.top_k=16`$"),
        (config("tbpo_a", kl="top_k"), "ref_top", "loss.name='tbpo_a' with loss.kl='top_k' needs chosen_ref_top_ids, "),
        (
            config("uni_dpo"),
            "score",
            r"needs chosen_score, rejected_score,.*the source needs annotator scores.*\(columns chosen_score and",
        ),
        (
            config("tis_dpo", kl="top_k"),
            "ref_top",
            "loss.kl='top_k' needs chosen_ref_top_ids, rejected_ref_top_ids, chosen_ref_top_logps, "
            "rejected_ref_top_logps, which toy/x@3 lacks in some or all rows; build it again with `tokenweights build "
            "RECIPE --set score.top_k=16`, or train with loss.kl='exact'$",
        ),
    ],
)
def test_a_dataset_that_lacks_a_column_is_refused_with_the_command_that_makes_it(loss, absent, message) -> None:
    check_columns_for(loss, "toy/x@3", WEIGHTS.names)
    columns = {name for name in WEIGHTS.names if absent not in name}
    with pytest.raises(MismatchError, match=message):
        check_columns_for(loss, "toy/x@3", columns)


def test_losses_that_need_less_take_a_dataset_that_has_less() -> None:
    for name in ("simpo", "sft"):
        check_columns_for(config(name), "toy/x@3", set())
    for name in ("dpo", "ipo", "d2po", "tdpo1"):
        check_columns_for(config(name), "toy/x@3", {"chosen_ref_logps", "rejected_ref_logps"})
    for settings in ({"triplet_gamma": 0.0}, {"anchor": "online"}):
        check_columns_for(
            config("ti_dpo", **settings), "toy/x@3", set(WEIGHTS.names) - {"anchor_ids", "anchor_ref_logps"}
        )
    ref_logps = {"chosen_ref_logps", "rejected_ref_logps"}
    check_columns_for(config("ti_dpo", anchor="online", importance="online"), "toy/x@3", ref_logps)
