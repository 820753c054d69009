"""Losses that need more than stored log-probs: the reference's whole distributions, its top k, annotators' scores.

The oracle is one sequence at a time, whole logits of two models in float64, and autograd through all of it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.data.dataset import Pair, PairDataset, open_weights, sample_pairs
from train.job.job import run_job
from train.job.trainer import PairTrainer
from train.model.logps import per_token_logps
from train.model.policy import load_policy, load_reference
from weights_store.errors import MismatchError

SIDES = ("chosen", "rejected")
BETA = 0.1
LOSSES = [
    {"name": "tdpo1"},
    {"name": "tdpo2", "alpha": 0.7},
    {"name": "tis_dpo", "kl": "exact", "eta_scale": 0.5},
]
TBPO_A = {"name": "tbpo_a", "bregman_lambda": -0.5}
Kl = Callable[[Tensor, Tensor], Tensor]
"""From log-probs `[T, V]` of policy and reference to KL `[T]`."""


@pytest.fixture(scope="module")
def policy(model: nn.Module) -> nn.Module:
    """The model after some noise, as after a few steps: float64, in its own right."""
    torch.manual_seed(3)
    moved = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return moved


@pytest.fixture
def make_trainer(make_config, model_folder, tmp_path, policy) -> Callable[..., PairTrainer]:
    """Return a function that builds a trainer whose policy has moved away from the reference."""

    def make(**changes: Any) -> PairTrainer:
        config = make_config(**{"optim": {"tokens_per_batch": 64}, **changes})
        needs = config.loss.needs
        views = {"with_ref_top": needs.ref_top, "with_scores": needs.scores}
        pairs = PairDataset(open_weights(config.data), config.data, vocab_size=128, **views)
        loaded = load_policy(model_folder, config.model)
        loaded.model.load_state_dict(policy.state_dict())
        reference = load_reference(model_folder, config.model, loaded) if needs.reference_model else None
        return PairTrainer(loaded, pairs, config, checkpoints=tmp_path / "checkpoints", reference=reference)

    return make


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of logits at a time, computed again in the backward pass."""
    monkeypatch.setitem(per_token_logps.__kwdefaults__, "chunk_logits", 3 * 128 * 4)
    monkeypatch.setitem(per_token_logps.__kwdefaults__, "kept_logits", 0)


@pytest.fixture
def with_top(write_weights, rows, model) -> Callable[[int], None]:
    """Return a function that writes the dataset with the reference's K likeliest ids at every response token."""

    def write(num_top: int) -> None:
        changed = []
        for row in rows:
            more: dict[str, Any] = {}
            for side in SIDES:
                top = _log_probs(model, row["prompt_ids"], row[f"{side}_ids"]).topk(num_top)
                more[f"{side}_ref_top_ids"] = top.indices.flatten().tolist()
                more[f"{side}_ref_top_logps"] = top.values.flatten().tolist()
            changed.append({**row, **more})
        write_weights(changed, statistics={"ref_top_k": num_top})

    return write


def _log_probs(model: nn.Module, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Tensor:
    """Return the distribution that every response token is drawn from, `[T, V]` float64."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].double().log_softmax(-1)


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def terms_of(pair: Pair, policy: nn.Module, reference: nn.Module, kl: Kl) -> dict[str, Tensor]:
    """Sums over both responses of one pair: log-ratios, KL, and both with token weights."""
    terms = {}
    for side in SIDES:
        response = getattr(pair, side)
        ids, weights = torch.tensor(response.ids).long(), torch.tensor(response.token_weights).double()
        ours = _log_probs(policy, pair.prompt_ids.tolist(), response.ids.tolist())
        with torch.no_grad():
            theirs = _log_probs(reference, pair.prompt_ids.tolist(), response.ids.tolist())
        ratios = ours.gather(-1, ids[:, None])[:, 0] - torch.tensor(response.ref_logps).double()
        kls = kl(ours, theirs)
        terms |= {f"m_{side}": ratios.sum(), f"k_{side}": kls.sum()}
        terms |= {f"wm_{side}": (weights * ratios).sum(), f"wk_{side}": (weights * kls).sum()}
        terms[f"advantages_{side}"] = ratios + kls
        terms |= {f"a_{side}": (ratios + torch.tensor(response.ref_logps)).mean(), f"mean_{side}": ratios.mean()}
    return terms


def margin_of(loss: dict[str, Any], t: dict[str, Tensor]) -> Tensor:
    """What the logistic of a loss is taken of, before beta."""
    if loss["name"] == "tdpo1":
        return t["m_chosen"] - t["m_rejected"] - (t["k_rejected"] - t["k_chosen"])
    if loss["name"] == "tdpo2":
        return t["m_chosen"] - t["m_rejected"] - loss["alpha"] * (t["k_rejected"] - t["k_chosen"].detach())
    return t["wm_chosen"] - t["wm_rejected"] - loss["eta_scale"] * (t["wk_chosen"] - t["wk_rejected"])


def mean_loss(loss: dict[str, Any], pairs: Sequence[Pair], policy: nn.Module, reference: nn.Module, kl: Kl) -> Tensor:
    terms = [terms_of(pair, policy, reference, kl) for pair in pairs]
    if loss["name"] == "tbpo_a":  # with lambda -1/2: exp(log R / 2) - 1
        sides = [(t["advantages_chosen"], t["advantages_rejected"]) for t in terms]
        shared = [(c[: len(r)], r[: len(c)]) for c, r in sides]
        return sum((torch.exp(BETA * (r - c) / 2) - 1).mean() for c, r in shared) / len(pairs)
    margins = [BETA * margin_of(loss, t) for t in terms]
    return sum(torch.log1p(torch.exp(-margin)) for margin in margins) / len(pairs)


def direction(loss: dict[str, Any], kl: Kl) -> Kl:
    """KL(pi‖ref) for TIS-DPO, KL(ref‖pi) for TDPO."""
    return kl if loss["name"] == "tis_dpo" else lambda ours, theirs: kl(theirs, ours)


def one_step(trainer: PairTrainer, pairs: Sequence[Pair]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one optimizer step, as the trainer comes to them."""
    step = trainer.cut_step(pairs, trainer.args.device)
    assert len(step.batches) > 1
    total = trainer.training_step(trainer.model, step).item()
    return total, {name: parameter.grad for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize("loss", [*LOSSES, TBPO_A], ids=lambda loss: loss["name"])
def test_an_exact_kl_equals_the_one_of_whole_logits_in_value_and_gradient(
    make_trainer, policy, model, small_chunks, loss
) -> None:
    trainer = make_trainer(loss=loss)
    pairs = sample_pairs(trainer.train_dataset.pairs, 40)[:8]
    got, gradients = one_step(trainer, pairs)

    policy = copy.deepcopy(policy)
    reference = copy.deepcopy(model).double()
    expected = mean_loss(loss, pairs, policy, reference, direction(loss, kl_of))
    assert abs(expected.item() - math.log(2)) > 0.01
    assert got == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, parameter in policy.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-4 * scale)


def test_the_live_reference_takes_no_gradient_and_does_not_move(make_trainer, model_folder) -> None:
    trainer = make_trainer(
        loss={"name": "tdpo1"}, model={"dtype": "bfloat16"}, optim={"max_steps": 2, "warmup_share": 0}
    )
    reference = trainer.model.forward.__func__.keywords["divergence"].reference
    before = copy.deepcopy(reference.state_dict())
    trained = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, tensor in reference.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
        assert not torch.equal(trainer.model.state_dict()[name], trained[name])
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reference.parameters())
    assert not set(map(id, reference.parameters())) & set(map(id, trainer.model.parameters()))


@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: loss["name"])
def test_the_top_k_of_the_whole_vocabulary_is_the_exact_kl(make_trainer, with_top, policy, model, loss) -> None:
    exact = make_trainer(loss=loss)
    pairs = sample_pairs(exact.train_dataset.pairs, 40)[:8]
    loss_exact, gradients_exact = one_step(exact, pairs)
    with_top(128)
    trainer = make_trainer(loss={**loss, "kl": "top_k"})
    loss_top, gradients_top = one_step(trainer, sample_pairs(trainer.train_dataset.pairs, 40)[:8])
    assert loss_top == pytest.approx(loss_exact, rel=1e-3)  # what is stored has 12 bits of mantissa
    for name, expected in gradients_exact.items():
        assert torch.cosine_similarity(gradients_top[name].flatten(), expected.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize("loss", LOSSES[1:], ids=lambda loss: loss["name"])
def test_eight_of_the_vocabulary_are_these_and_a_bucket_for_the_others(
    make_trainer, with_top, policy, model, small_chunks, loss
) -> None:
    with_top(8)
    trainer = make_trainer(loss={**loss, "kl": "top_k"})
    pairs = sample_pairs(trainer.train_dataset.pairs, 40)

    def bucketed(ours: Tensor, theirs: Tensor) -> Tensor:
        top = theirs.topk(8).indices
        merged = []
        for logps in (ours, theirs):
            probs = logps.exp()
            rest = 1 - probs.gather(-1, top).sum(-1, keepdim=True)
            merged.append(torch.cat([probs.gather(-1, top), rest], -1).log())
        return kl_of(*merged) if loss["name"] == "tis_dpo" else kl_of(merged[1], merged[0])

    got, gradients = one_step(trainer, pairs[:8])
    policy, reference = copy.deepcopy(policy), copy.deepcopy(model).double()
    expected = mean_loss(loss, pairs[:8], policy, reference, bucketed)
    assert got == pytest.approx(expected.item(), rel=1e-3)
    expected.backward()
    for name, parameter in policy.named_parameters():
        assert torch.cosine_similarity(gradients[name].double().flatten(), parameter.grad.flatten(), dim=0) > 0.999, (
            name
        )

    metrics = trainer.measure(pairs)
    name = "kl_policy_ref/chosen" if loss["name"] == "tis_dpo" else "kl_ref_policy/chosen"
    with torch.no_grad():
        exact = sum(terms_of(p, policy, reference, direction(loss, kl_of))["k_chosen"].item() for p in pairs) / len(
            pairs
        )
    assert 0.1 * exact < metrics[name] < exact  # merging outcomes loses information; of this flat model a lot


def test_annotators_scores_reach_the_loss_of_uni_dpo(make_trainer, write_weights, rows, policy, model) -> None:
    scored = [{**row, "chosen_score": 3.0 + i % 3, "rejected_score": 1.0 + i % 2} for i, row in enumerate(rows)]
    write_weights(scored, statistics={"num_pairs": len(rows), "num_scored_pairs": len(rows)})
    settings = {"quality_eta": 0.7, "tau_ref": 0.8, "focal_gamma": 3.0, "nll_lambda": 0.1, "tau_good": 3.2}
    trainer = make_trainer(loss={"name": "uni_dpo", "beta": 2.0, **settings})
    pairs = sample_pairs(trainer.train_dataset.pairs, 40)[:8]
    got, gradients = one_step(trainer, pairs)

    policy = copy.deepcopy(policy)
    losses, num_behind = [], 0
    for pair in pairs:
        t = terms_of(pair, policy, model, kl_of)
        quality = 1 / (1 + math.exp(-0.7 * (pair.chosen_score - pair.rejected_score)))
        ability = (1 - torch.sigmoid(2.0 * (t["a_chosen"] - t["a_rejected"]) - 0.8)) ** 3
        preference = -torch.log(torch.sigmoid(2.0 * (t["mean_chosen"] - t["mean_rejected"])))
        falls_behind = pair.chosen_score >= 3.2 and t["mean_chosen"].item() < 0
        num_behind += falls_behind
        losses.append(quality * ability * preference - (0.1 * t["a_chosen"] if falls_behind else 0.0))
    assert 0 < num_behind < 8
    expected = sum(losses) / 8
    assert got == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, parameter in policy.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"name": "tis_dpo", "kl": "top_k"},
            r"needs chosen_ref_top_ids, .*, which toy/tis@\d lacks .*`tokenweights build RECIPE --set score.top_k=16`",
        ),
        ({"name": "uni_dpo"}, r"needs chosen_score, rejected_score, which toy/tis@\d lacks .*then build it again with"),
    ],
)
def test_a_dataset_without_the_columns_is_refused_before_anything_is_loaded(
    make_config, write_weights, rows, monkeypatch, loss, message
) -> None:
    monkeypatch.setattr("train.job.prepare.find_folder", lambda *_: pytest.fail("a model was looked for"))
    config = make_config(loss=loss)
    with pytest.raises(MismatchError, match=message):
        run_job(config)
    write_weights(rows, statistics={"num_response_tokens": 7})  # a commit that says nothing of scores
    with pytest.raises(MismatchError, match=message):
        run_job(config)
