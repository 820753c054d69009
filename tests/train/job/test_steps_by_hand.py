"""A whole step of every loss against formulas of the papers, one response at a time and in float64: value and gradient."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from tests.train.conftest import Row
from train.data.dataset import PairDataset, open_weights
from train.job.trainer import PairTrainer
from train.loss.config import LOSSES
from train.model.policy import load_policy, load_reference

NUM_ROWS, BETA, NLL = 8, 0.3, 0.4
SETTINGS = {
    "dpo": {"label_smoothing": 0.1},
    "tdpo2": {"alpha": 0.7},
    "tis_dpo": {"kl": "exact", "eta_scale": 0.5},
    "ti_dpo": {"variant": "release", "alpha": 0.7, "triplet_gamma": 0.2, "triplet_margin": 0.3},
    "treg": {"reg_alpha": 0.5},
    "bpo": {"bregman_lambda": 0.3, "min_ratio": 1e-6},
    "tbpo_a": {"bregman_lambda": 0.2},
    "simpo": {"gamma_beta_ratio": 0.4, "label_smoothing": 0.2},
    "confpo": {"gamma_beta_ratio": 0.4},
    "d2po": {"gamma": 0.9},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
    "tis_kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
}


class Response:
    """One response under the policy, the stored reference log-probs, and the frozen reference model."""

    def __init__(self, policy, reference, row: Row, name: str) -> None:
        ids, prompt = row[f"{name}_ids"], row["prompt_ids"]
        self.row, self.length = row, len(ids)
        whole, places = torch.tensor([prompt + ids]), torch.arange(len(ids))
        own, frozen = (model(input_ids=whole).logits[0, len(prompt) - 1 : -1] for model in (policy, reference))
        own, frozen = (logits.log_softmax(-1) for logits in (own, frozen.detach()))
        self.logps = own[places, ids]
        self.ref = torch.tensor(row[f"{name}_ref_logps"], dtype=torch.float64)
        self.ratios = self.logps - self.ref
        self.weights = torch.tensor(row.get(f"{name}_token_weights") or [1.0] * len(ids), dtype=torch.float64)
        self.kl_of_ref = (frozen.exp() * (frozen - own)).sum(-1)
        self.kl_of_policy = (own.exp() * (own - frozen)).sum(-1)


def bregman(log_ratio: Tensor, power: float) -> Tensor:
    """h'(R) R - h(R) - h'(1 / R) less its value at R = 1, for h(R) = (R^(1 + power) - R) / (4 power (1 + power))."""

    def h(r: Tensor) -> Tensor:
        return (r ** (1 + power) - r) / (4 * power * (1 + power))

    def slope(r: Tensor) -> Tensor:
        return ((1 + power) * r**power - 1) / (4 * power * (1 + power))

    def risk(r: Tensor) -> Tensor:
        return slope(r) * r - h(r) - slope(1 / r)

    return risk(log_ratio.exp()) - risk(torch.ones((), dtype=torch.float64))


def soft(margin: Tensor, smoothing: float = 0.0) -> Tensor:
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def unlikely(side: Response) -> Tensor:
    probs = side.logps.detach().exp()
    return side.logps[probs <= probs.mean()].mean()


def pair_loss(name: str, w: Response, l: Response, anchor: Response) -> Tensor:  # noqa: E741
    """The loss of a pair, w chosen and l rejected."""
    given = SETTINGS.get(name, {})
    plain = BETA * (w.ratios.sum() - l.ratios.sum())
    weighted = BETA * ((w.weights * w.ratios).sum() - (l.weights * l.ratios).sum())
    match name:
        case "dpo":
            return soft(plain, given["label_smoothing"])
        case "ipo":
            return (w.ratios.mean() - l.ratios.mean() - 1 / (2 * BETA)) ** 2
        case "tdpo1":
            return soft(plain - BETA * (l.kl_of_ref.sum() - w.kl_of_ref.sum()))
        case "tdpo2":
            return soft(plain - BETA * given["alpha"] * (l.kl_of_ref.sum() - w.kl_of_ref.sum().detach()))
        case "tis_dpo":
            eta = (w.weights * w.kl_of_policy).sum() - (l.weights * l.kl_of_policy).sum()
            return soft(weighted - BETA * given["eta_scale"] * eta)
        case "ti_dpo":
            tdpo2 = weighted - BETA * given["alpha"] * (l.kl_of_ref.sum() - w.kl_of_ref.sum().detach())
            near, far = (
                ((anchor.ratios[:both] - side.ratios[:both]) ** 2).sum()
                for side in (w, l)
                for both in [min(anchor.length, side.length)]
            )
            return soft(tdpo2) + given["triplet_gamma"] * (near - far + given["triplet_margin"]).clamp(min=0)
        case "treg":
            rewards = ((w.weights - 1) * w.logps).sum() + ((1 - l.weights) * l.logps).sum()
            start = ((w.weights - 1) * w.ref).sum() + ((1 - l.weights) * l.ref).sum()
            return soft(plain) - given["reg_alpha"] * torch.sigmoid(-plain.detach()) * BETA * (rewards - start)
        case "bpo":
            return bregman(-plain, given["bregman_lambda"])
        case "tbpo_a":
            both = min(w.length, l.length)
            ours, theirs = ((side.ratios + side.kl_of_ref)[:both] for side in (w, l))
            return bregman(BETA * (theirs - ours), given["bregman_lambda"]).mean()
        case "simpo":
            margin = BETA * (w.logps.mean() - l.logps.mean()) - BETA * given["gamma_beta_ratio"]
            return soft(margin, given["label_smoothing"])
        case "confpo":
            return soft(BETA * (unlikely(w) - unlikely(l)) - BETA * given["gamma_beta_ratio"])
        case "sepo":
            means = [(side.weights * side.logps).sum() / side.weights.sum() for side in (w, l)]
            return soft(means[0] - means[1])
        case "d2po":
            decayed = [(given["gamma"] ** torch.arange(1, side.length + 1) * side.ratios).sum() for side in (w, l)]
            return soft(BETA * (decayed[0] - decayed[1]))
        case "uni_dpo":
            quality = torch.sigmoid(torch.tensor(0.7 * (w.row["chosen_score"] - w.row["rejected_score"])))
            focal = (1 - torch.sigmoid(BETA * (w.logps.mean() - l.logps.mean()) - 0.8)) ** 3
            loss = quality * focal * soft(BETA * (w.ratios.mean() - l.ratios.mean()))
            is_behind = w.row["chosen_score"] >= 3.2 and w.ratios.mean() < 0
            return loss - 0.001 * w.logps.mean() * is_behind
    raise AssertionError(name)


def step_loss(loss: dict, rows: list[Row], policy, reference) -> Tensor:
    """The mean over pairs; of KTO over responses, of SFT over tokens."""
    name, given = loss["name"], SETTINGS.get(loss["name"], {})
    sides = {
        side: [Response(policy, reference, row, side) if row[f"{side}_ids"] else None for row in rows]
        for side in ("chosen", "rejected")
    }
    weights = torch.tensor([row["pair_weight"] for row in rows], dtype=torch.float64)
    anchors = [Response(policy, reference, row, "anchor") for row in rows]
    there = [(i, side, found) for side, column in sides.items() for i, found in enumerate(column) if found]
    if name == "sft":
        chosen = [(i, found) for i, side, found in there if side == "chosen"]
        return sum(-weights[i] * found.logps.sum() for i, found in chosen) / sum(found.length for _, found in chosen)
    nll = (
        sum(-weights[i] * NLL * found.logps.mean() for i, side, found in there if side == "chosen")
        if "nll_lambda" in loss
        else 0
    )
    if name in ("kto", "tis_kto"):
        z0 = max(0.0, sum(anchor.ratios.sum().item() for anchor in anchors) / len(anchors))
        total = 0
        for i, side, found in there:
            reward = ((found.weights if name == "tis_kto" else 1) * found.ratios).sum()
            signed, factor = (reward - z0, "desirable") if side == "chosen" else (z0 - reward, "undesirable")
            total = total + weights[i] * given[f"{factor}_weight"] * (1 - torch.sigmoid(BETA * signed))
        return (total + nll) / len(there)
    losses = [pair_loss(name, *pair) for pair in zip(sides["chosen"], sides["rejected"], anchors, strict=True)]
    return (sum(w * each for w, each in zip(weights, losses, strict=True)) + nll) / len(rows)


@pytest.fixture(scope="module")
def scored_rows(anchored_rows) -> list[Row]:
    """Rows whose reference is not the policy, with pair weights, one of them 0, and annotators' scores."""
    rows = copy.deepcopy(anchored_rows[:NUM_ROWS])
    draw = torch.Generator().manual_seed(0)
    for index, row in enumerate(rows):
        for name in ("chosen", "rejected", "anchor"):
            shift = (torch.randn(len(row[f"{name}_ids"]), generator=draw) * 0.5).tolist()
            row[f"{name}_ref_logps"] = [min(x - s, 0.0) for x, s in zip(row[f"{name}_ref_logps"], shift, strict=True)]
        row |= {"pair_weight": [1.0, 0.5, 0.0, 2.0][index % 4], "chosen_score": 3.0 + index % 2, "rejected_score": 2.0}
    return rows


@pytest.fixture(scope="module")
def references(model_folder) -> tuple:
    """The policy in float64, and another model as the frozen reference, in float32 and in float64."""
    policy, frozen = (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval() for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return policy.double(), frozen, copy.deepcopy(frozen).double()


def trained_step(make_config, model_folder, folder, loss, reference, *, packing: bool) -> dict:
    config = make_config(
        loss=loss,
        optim={"pairs_per_step": NUM_ROWS, "tokens_per_batch": 45, "max_steps": 1, "max_grad_norm": 1e9},
        model={"packing": packing},
    )
    needs = config.loss.needs
    pairs = PairDataset(
        open_weights(config.data), config.data, vocab_size=128, with_scores=needs.scores, with_anchors=needs.anchors
    )
    policy = load_policy(model_folder, config.model, None)
    frozen = load_reference(model_folder, config.model, policy) if needs.reference_model else None
    if frozen is not None:
        frozen.load_state_dict(reference.state_dict())
    trainer = PairTrainer(policy, pairs, config, checkpoints=folder, reference=frozen)
    trainer.train()
    return next(log for log in trainer.state.log_history if "loss" in log)


OF_PAIRS = [name for name, loss in LOSSES.items() if loss.compares]
CASES = [(name, False, index % 2 == 0) for index, name in enumerate([*OF_PAIRS, "kto", "tis_kto", "sft"])]
CASES += [("kto", True, True), ("tis_kto", True, False), ("sft", True, True)]


@pytest.mark.parametrize(("name", "is_unpaired", "packing"), CASES)
def test_a_step_is_what_its_paper_says(
    make_config, write_weights, model_folder, scored_rows, references, tmp_path, name, is_unpaired, packing
) -> None:
    policy, frozen, reference = references
    rows = copy.deepcopy(scored_rows)
    for index, row in enumerate(rows if is_unpaired else ()):
        side = "rejected" if name == "sft" or index % 3 else "chosen"
        row |= {f"{side}_{what}": [] for what in ("ids", "token_weights", "ref_logps")}
    write_weights(rows)
    loss = {"name": name, "beta": BETA, **SETTINGS.get(name, {})}
    if name in ("sepo", "sft"):
        loss["beta"] = None
    if name not in ("uni_dpo", "sft"):
        loss["nll_lambda"] = NLL
    policy.zero_grad()
    wanted = step_loss(loss, rows, policy, reference)
    wanted.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in policy.parameters() if p.grad is not None))
    log = trained_step(make_config, model_folder, tmp_path / "checkpoints", loss, frozen, packing=packing)
    assert log["loss"] == pytest.approx(wanted.item(), rel=2e-3)  # stored log-probs have 12 bits
    assert log["grad_norm"] == pytest.approx(norm, rel=3e-3)
