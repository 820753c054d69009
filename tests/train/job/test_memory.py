"""Micro-batches that do not fit into memory. No memory is used up: a forward pass says that it is."""

from types import SimpleNamespace

import pytest
import torch

from train.config import FIRST_TOKENS
from train.job.trainer import PairTrainer
from train.model.token_budget import MOST_TOKENS, TokenBudget, fitting_tokens
from weights_store.errors import SettingsError

OPTIM = {"pairs_per_step": 8, "max_steps": 2, "warmup_share": 0}


def limit_memory(trainer: PairTrainer, most_tokens: int, *, even_checkpointed: bool = False) -> list[int]:
    """Let a forward pass of more tokens fail, unless layers are computed again; return the tokens of those that did not."""
    ordinary, sizes = trainer.model.forward, []

    def forward(**batch):
        num_tokens = batch["input_ids"].numel()
        if num_tokens > most_tokens and (even_checkpointed or not trainer.model.is_gradient_checkpointing):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd a long story")
        sizes.append(num_tokens)
        return ordinary(**batch)

    trainer.model.forward = forward
    return sizes


def results(trainer: PairTrainer) -> tuple[list[float], torch.Tensor]:
    trainer.train()
    logs = [log[name] for log in trainer.state.log_history if "loss" in log for name in ("loss", "grad_norm")]
    return logs, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_what_does_not_fit_is_halved_and_the_step_begins_again(make_trainer, caplog) -> None:
    expected_logs, expected = results(make_trainer(optim={**OPTIM, "tokens_per_batch": 70}))
    # 140 tokens at a time: the first micro-batch of the longest pairs passes, a later one of more tokens fails
    trainer = make_trainer(optim={**OPTIM, "tokens_per_batch": 140})
    sizes = limit_memory(trainer, 110)
    logs, parameters = results(trainer)
    assert max(sizes) <= 110
    assert 35 <= trainer.budget.tokens < 140
    assert f"out of memory: micro-batches of up to {trainer.budget.tokens:,} tokens from here on" in caplog.text
    assert logs == pytest.approx(expected_logs, rel=1e-4)  # no gradient and no metric of a broken step is left
    assert (parameters - expected).abs().mean() < 1e-6


def test_gradients_before_the_failure_do_not_count_twice(make_trainer) -> None:
    expected_logs, _ = results(make_trainer(optim={**OPTIM, "tokens_per_batch": 60}))
    trainer = make_trainer(optim={**OPTIM, "tokens_per_batch": 60})
    ordinary, calls = trainer.model.forward, []

    def forward(**batch):
        calls.append(len(calls))
        if len(calls) == 3:  # the first two micro-batches have had their backward pass
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ordinary(**batch)

    trainer.model.forward = forward
    logs, _ = results(trainer)
    assert logs == pytest.approx(expected_logs, rel=1e-4)


def test_a_single_pair_that_does_not_fit_is_computed_with_checkpointing(make_trainer, caplog) -> None:
    expected_logs, expected = results(make_trainer(optim={**OPTIM, "tokens_per_batch": 1}))
    trainer = make_trainer(optim={**OPTIM, "tokens_per_batch": 1})
    sizes, runs = limit_memory(trainer, 5), []
    trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: runs.append(inputs[0].numel()))
    logs, parameters = results(trainer)
    assert trainer.model.is_gradient_checkpointing
    assert len(runs) == 2 * len(sizes) == 2 * 16  # every pair of two steps, again in the backward pass
    assert "does not fit into memory: computing layers again (gradient checkpointing)" in caplog.text
    assert logs == pytest.approx(expected_logs, rel=1e-6)
    assert (parameters - expected).abs().mean() < 1e-7


def test_a_pair_that_does_not_fit_at_all_says_what_to_do(make_trainer) -> None:
    trainer = make_trainer(optim={**OPTIM, "tokens_per_batch": 10_000})
    limit_memory(trainer, 20, even_checkpointed=True)
    with pytest.raises(SettingsError, match=r"^a pair of \d+ tokens does not fit .* train with \[lora\]") as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_one_long_pair_does_not_make_all_micro_batches_small(make_trainer, caplog) -> None:
    trainer = make_trainer(optim={**OPTIM, "tokens_per_batch": 64})
    pairs = [trainer.train_dataset.pairs[row] for row in range(8)]
    lengths = sorted(trainer.collator.num_tokens(pair) for pair in pairs)
    limit_memory(trainer, lengths[-1] - 1)  # too little for the longest pair alone
    trainer.budget.tokens = lengths[-1]
    step = trainer.cut_step(pairs, torch.device("cpu"))
    trainer.training_step(trainer.model, step)
    assert trainer.model.is_gradient_checkpointing
    assert trainer.budget.tokens == lengths[-1]
    assert "micro-batches of up to" not in caplog.text


@pytest.mark.parametrize("which", ["measure", "response_logps"])
def test_what_is_measured_before_the_first_step_is_cut_finer_too(make_trainer, which: str) -> None:
    def found(trainer: PairTrainer) -> object:
        sample = [trainer.train_dataset.pairs[row] for row in range(8)]
        if which == "measure":
            return trainer.measure(sample)["logps/chosen"]
        return sorted(torch.cat([policy for policy, _ in trainer.response_logps(sample, "float32")]).tolist())

    expected = found(make_trainer(optim={**OPTIM, "tokens_per_batch": 10_000}))
    trainer = make_trainer(optim={**OPTIM, "tokens_per_batch": 10_000})
    sizes = limit_memory(trainer, 60)
    assert found(trainer) == pytest.approx(expected, rel=1e-5)
    assert len(sizes) > 1
    assert 1 < trainer.budget.tokens <= 60


def test_with_several_processes_nobody_begins_again(make_trainer, monkeypatch) -> None:
    """The others would wait for its gradients for ever."""
    trainer = make_trainer(optim=OPTIM)
    limit_memory(trainer, 5)
    step = trainer.cut_step([trainer.train_dataset.pairs[0]], torch.device("cpu"))
    here = trainer.accelerator
    others = SimpleNamespace(num_processes=2, process_index=1, no_sync=here.no_sync, backward=here.backward)
    monkeypatch.setattr(trainer, "accelerator", others)
    with pytest.raises(SettingsError, match=r"memory of process 1: lower optim.tokens_per_batch \(now 128\)"):
        trainer.training_step(trainer.model, step)


def test_what_fits_is_reckoned_from_what_was_measured() -> None:
    # 1,000 tokens took 2 GB beside the 10 that stay; of 70 GB that are left 0.8 are planned for: 24 times as many
    assert fitting_tokens(1000, 10_000, 12_000, 80_000 - 10_000) == 24_000
    assert fitting_tokens(1000, 10_000, 12_000, 800_000) == MOST_TOKENS
    assert fitting_tokens(1000, 10_000, 12_000, 9_000) == 1


def test_on_a_gpu_the_second_step_is_measured_and_a_budget_that_was_given_is_kept(monkeypatch, caplog) -> None:
    """By made-up numbers of a card: 8 GiB after the backward pass, 16 at the peak, 56 of 80 not in use by anybody."""
    gib = 2**30
    card = {"memory_allocated": 8 * gib, "max_memory_allocated": 16 * gib, "memory_reserved": 16 * gib}
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (56 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    cuda = torch.device("cuda")
    # One of several processes does not measure: if it reached too high, all would end.
    budgets = [TokenBudget(None, cuda), TokenBudget(1000, cuda), TokenBudget(None, cuda, measures=False)]
    for _ in range(3):
        for budget in budgets:
            budget.begin_step()
            budget.end_step(4096)
    # 8 GiB for 4,096 tokens; 0.8 of 72 - 8 GiB hold 26,214
    assert [budget.tokens for budget in budgets] == [26_214, 1000, FIRST_TOKENS]
    assert caplog.text.count("micro-batches of up to") == 1
    on_cpu = TokenBudget(None, torch.device("cpu"))
    on_cpu.begin_step()
    on_cpu.end_step(4096)
    assert on_cpu.tokens == FIRST_TOKENS
