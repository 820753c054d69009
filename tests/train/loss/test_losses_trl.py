"""Our losses against TRL's own code: its trainers' loss methods run as they are, only the model is made up.

Not here, for TRL 1.16 has nothing of the kind: TDPO, TIS-DPO, SePO, D2PO and the weights of Uni-DPO.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.loss import losses
from train.loss.divergence import top_k_kl
from train.loss.terms import PairLosses, ResponseLogps

pytest.importorskip("trl")
from trl.trainer.dpo_trainer import DPOTrainer

VOCAB_SIZE, LENGTH = 11, 12
SPANS = {"chosen": [(3, 12), (4, 5), (1, 6), (2, 5)], "rejected": [(3, 6), (4, 12), (1, 2), (2, 9)]}
Sides = tuple[ResponseLogps, ResponseLogps]


def make_side(name: str) -> ResponseLogps:
    """Four responses of unequal length, one of them a single token, float64 [4, 12]."""
    generator = torch.Generator().manual_seed(len(name))
    policy, ref = (-3 * torch.rand(4, LENGTH, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(4, LENGTH, dtype=torch.bool)
    for row, (begin, end) in enumerate(SPANS[name]):
        mask[row, begin:end] = True
    return ResponseLogps(policy.requires_grad_(), mask, ref)


class GivenLogps(nn.Module):
    """Stands for a model with TRL's fused output layer: returns log-probs that were worked out already."""

    is_gradient_checkpointing = False

    def __init__(self, logps: list[Tensor], masks: list[Tensor]) -> None:
        """Take [B, T] of each side; TRL's entry t belongs to token t + 1 and is 0 outside the response."""
        super().__init__()
        self.log_probs = torch.cat([torch.where(m, x, 0.0)[:, 1:] for x, m in zip(logps, masks, strict=True)])

    def forward(self, **inputs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def make_accelerator() -> SimpleNamespace:
    def keep(values: Tensor) -> Tensor:
        return values

    return SimpleNamespace(device=torch.device("cpu"), gather=keep, gather_for_metrics=keep)


def trl_dpo_loss(sides: Sides, loss_type: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """What `DPOTrainer._compute_loss` makes of the log-probs of `sides`, a mean over pairs."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    masks = [side.completion_mask for side in sides]
    settings = {
        "model": GivenLogps([side.policy_logps for side in sides], masks),
        "ref_model": GivenLogps([side.ref_logps for side in sides], masks),
        "accelerator": make_accelerator(),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "beta": beta,
        "label_smoothing": label_smoothing,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in settings.items():
        setattr(trainer, name, value)
    completion_mask = torch.cat(masks).long()
    inputs = {name: torch.ones_like(completion_mask) for name in ("input_ids", "attention_mask")}
    return trainer._compute_loss(trainer.model, {**inputs, "completion_mask": completion_mask}, return_outputs=False)


def one_pair(sides: Sides, row: int) -> Sides:
    return tuple(side._replace(**{k: v[[row]] for k, v in side._asdict().items() if v is not None}) for side in sides)


def assert_equal_to_trl(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """Scalar value and gradients, float64."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True) for value in (ours, theirs)]
    for mine, wanted in zip(*gradients, strict=True):
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            assert wanted.abs().max() > 1e-6
            assert torch.allclose(mine, wanted, rtol=1e-10, atol=1e-15)


def run_normalised(sides: Sides) -> PairLosses:
    """Uni-DPO without its weights and its likelihood term."""
    scores = torch.zeros(4, dtype=torch.float64)
    settings = {"beta": 2.0, "quality_eta": 0.0, "tau_ref": 0.0, "focal_gamma": 0.0, "nll_lambda": 0.0, "tau_good": 1.0}
    result = losses.uni_dpo(*sides, chosen_scores=scores, rejected_scores=scores, **settings)
    return result._replace(losses=2 * result.losses)  # its w_qual is 1/2


@pytest.mark.parametrize(
    ("loss_type", "beta", "ours"),
    [
        ("sigmoid", 0.1, lambda sides: losses.dpo(*sides, beta=0.1)),
        ("ipo", 0.3, lambda sides: losses.ipo(*sides, beta=0.3)),
        ("sigmoid_norm", 2.0, run_normalised),
    ],
)
def test_losses_of_pairs_equal_those_of_trl_in_value_and_gradient(loss_type: str, beta: float, ours) -> None:
    sides = make_side("chosen"), make_side("rejected")
    inputs = [side.policy_logps for side in sides]
    assert_equal_to_trl(ours(sides).losses.mean(), trl_dpo_loss(sides, loss_type, beta), inputs)


@pytest.mark.parametrize("row", range(4))
def test_label_smoothing_is_that_of_trl(row: int) -> None:
    """TRL 1.16 ignores it with "sigmoid"; "aot_unpaired" has it, and on one pair there is nothing for that to sort."""
    sides = one_pair((make_side("chosen"), make_side("rejected")), row)
    ours = losses.dpo(*sides, beta=0.4, label_smoothing=0.2).losses.mean()
    theirs = trl_dpo_loss(sides, "aot_unpaired", 0.4, label_smoothing=0.2)
    assert_equal_to_trl(ours, theirs, [side.policy_logps for side in sides])


def test_sft_over_response_tokens_is_that_of_trl() -> None:
    sides = make_side("chosen"), make_side("rejected")
    ours = losses.sft(*sides).losses.sum() / sides[0].completion_mask.sum()
    assert_equal_to_trl(ours, trl_dpo_loss(sides, "sft", 0.1), [sides[0].policy_logps])


@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_distillation_is_that_of_trl_with_its_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer

    generator = torch.Generator().manual_seed(4)
    logits, teacher = (torch.randn(4, LENGTH, VOCAB_SIZE, generator=generator, dtype=torch.float64) for _ in range(2))
    student, top = logits.requires_grad_().log_softmax(-1), teacher.log_softmax(-1).topk(4)
    mask = make_side("chosen").completion_mask
    trainer = ServerDistillationTrainer.__new__(ServerDistillationTrainer)
    trainer.loss_add_tail = True  # its default
    stored = {"topk_logprobs": top.values, "topk_token_ids": top.indices}
    theirs = trainer._compute_server_forward_kl_loss(stored, student, torch.where(mask, 0, -100))
    at_ids = student.gather(-1, top.indices).flatten(0, 1)
    kls = top_k_kl(at_ids, top.values.flatten(0, 1), "ref_policy").view(mask.shape)
    chosen = ResponseLogps(student[..., 0], mask, token_weights=torch.ones_like(kls), kls=kls)
    assert_equal_to_trl(losses.distill(chosen).losses.sum() / mask.sum(), theirs, [logits])


@pytest.fixture
def cpo_trainer(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    return CPOTrainer


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_equals_trls_from_logits_to_loss(cpo_trainer: type, label_smoothing: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(8, LENGTH, VOCAB_SIZE, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    input_ids = torch.randint(VOCAB_SIZE, (8, LENGTH), generator=generator)
    mask = torch.cat([make_side(name).completion_mask for name in SPANS])

    trainer = cpo_trainer.__new__(cpo_trainer)
    settings = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.0, "label_smoothing": label_smoothing}
    settings |= {"alpha": 0.0, "cpo_alpha": 0.0, "is_encoder_decoder": False, "aux_loss_enabled": False}
    settings |= {"pad_token_id": 0, "accelerator": make_accelerator()}
    for name, value in settings.items():
        setattr(trainer, name, value)
    batch = {}
    for name, rows in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        batch[f"{name}_input_ids"] = input_ids[rows]
        batch[f"{name}_attention_mask"] = torch.ones_like(input_ids[rows])
        batch[f"{name}_labels"] = input_ids[rows].masked_fill(~mask[rows], -100)
    theirs, _ = trainer.get_batch_loss_metrics(lambda ids, **_: SimpleNamespace(logits=logits), batch)

    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    per_token_logps = nn.functional.pad(logps, (1, 0))  # position t holds token t
    sides = [ResponseLogps(per_token_logps[rows], mask[rows]) for rows in (slice(0, 4), slice(4, 8))]
    ours = losses.simpo(*sides, beta=2.5, gamma_beta_ratio=0.4, label_smoothing=label_smoothing)  # 1.0 / 2.5
    assert_equal_to_trl(ours.losses.mean(), theirs, [logits])
