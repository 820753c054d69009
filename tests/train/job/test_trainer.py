import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from train.config import ModelConfig
from train.data.dataset import sample_pairs
from train.job.arguments import build_batches
from train.job.trainer import PairTrainer
from train.model.policy import load_policy, switch_off_noise
from weights_store.errors import SettingsError

RATE_OF_NOTHING = 1e-30  # float32 weights do not move


@pytest.fixture
def shifted_store(write_weights, rows) -> str:
    """A store whose reference is not the model: log-ratios are 0.1, 0.2, 0.3, … by token."""
    rows = copy.deepcopy(rows)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_ref_logps"] = [x - 0.1 * (t + 1) for t, x in enumerate(row[f"{side}_ref_logps"])]
    return write_weights(rows)


def parameters_of(trainer: PairTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("loss", [{"name": "tis_dpo"}, {"name": "sft", "beta": None}])
def test_micro_batches_do_not_change_the_result(make_trainer, loss) -> None:
    results = []
    for tokens_per_batch in (10_000, 45, 1):  # all 8 pairs at once, two or three, one
        optim = {"pairs_per_step": 8, "tokens_per_batch": tokens_per_batch, "max_steps": 2, "warmup_share": 0}
        trainer = make_trainer(loss=loss, optim=optim)
        trainer.train()
        history = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        results.append((history, parameters_of(trainer)))
    for history, parameters in results[1:]:
        assert sum(history, ()) == pytest.approx(sum(results[0][0], ()), rel=1e-4)
        # AdamW divides by the gradient's size, so rounding shows where a gradient is next to nothing
        assert (parameters - results[0][1]).abs().mean() < 1e-6


def test_metrics_are_means_over_all_pairs_of_the_window(make_trainer, shifted_store, rows) -> None:
    optim = {"learning_rate": RATE_OF_NOTHING, "pairs_per_step": 8, "tokens_per_batch": 45}
    trainer = make_trainer(data={"store": shifted_store}, optim=optim, output={"log_every_steps": 2})
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert list(logs) == [1, 2, 4, 5]

    order = trainer.train_dataset.order
    window = [rows[row] for row in order.rows(range(16, 32))]  # steps 3 and 4

    def reward(row, side, weighted):
        weights = row[f"{side}_token_weights"] if weighted else [1.0] * len(row[f"{side}_ids"])
        return 0.1 * sum(w * 0.1 * (t + 1) for t, w in enumerate(weights))

    for name, weighted in (("rewards", False), ("weighted_rewards", True)):
        chosen = [reward(row, "chosen", weighted) for row in window]
        rejected = [reward(row, "rejected", weighted) for row in window]
        margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
        assert logs[4][f"{name}/chosen"] == pytest.approx(sum(chosen) / 16, abs=1e-3)
        assert logs[4][f"{name}/rejected"] == pytest.approx(sum(rejected) / 16, abs=1e-3)
        assert logs[4][f"{name}/margins"] == pytest.approx(sum(margins) / 16, abs=1e-3)
        # pairs of equal length have a margin of 0 up to rounding: either way is right
        ties = sum(abs(m) < 1e-3 for m in margins)
        sure = sum(m >= 1e-3 for m in margins)
        assert sure <= 16 * logs[4][f"{name}/accuracies"] + 1e-6 <= sure + ties + 2e-6
        if weighted:
            losses = [math.log1p(math.exp(-m)) for m in margins]
            assert logs[4]["loss"] == pytest.approx(sum(losses) / 16, abs=1e-3)
    expected = sum(sum(row["chosen_ref_logps"]) for row in window) / 16
    assert logs[4]["logps/chosen"] == pytest.approx(expected, abs=1e-3)
    assert logs[4]["epoch"] == pytest.approx(32 / 40)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [  # of 5 steps 2 warm up, from a half to the peak; then 3 steps, the first of them at the peak
        ("linear", [1 / 2, 1, 1, 2 / 3, 1 / 3]),
        ("constant", [1 / 2, 1, 1, 1, 1]),
        ("cosine", [1 / 2, 1, 1, 3 / 4, 1 / 4]),  # (1 + cos(pi/3)) / 2 and (1 + cos(2 pi/3)) / 2
    ],
)
def test_the_learning_rate_of_the_first_step_is_not_0(make_trainer, schedule, shares) -> None:
    optim = {"learning_rate": 1e-3, "warmup_share": 0.4, "schedule": schedule, "num_epochs": 1}
    trainer = make_trainer(optim=optim)
    trainer.train()
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == pytest.approx([1e-3 * share for share in shares], rel=1e-9)


def test_metric_names_are_those_of_trl_and_weighted_ones_apart(make_trainer) -> None:
    pairs = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    common = pairs | {"loss", "logps/chosen", "logps/rejected"}
    trainer = make_trainer()
    sample = sample_pairs(trainer.train_dataset.pairs, 4)
    assert set(trainer.measure(sample)) == common | {f"weighted_{name}" for name in pairs}
    assert set(make_trainer(loss={"name": "dpo"}).measure(sample)) == common
    assert set(make_trainer(loss={"name": "sft"}).measure(sample)) == common


def test_step_0_loss_is_log_2_when_the_reference_is_the_model(make_trainer) -> None:
    for name in ("dpo", "tis_dpo"):
        trainer = make_trainer(loss={"name": name})
        before = trainer.measure(sample_pairs(trainer.train_dataset.pairs, 40))
        assert before["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert before["rewards/margins"] == pytest.approx(0.0, abs=1e-3)


def test_step_0_loss_with_nll_adds_the_stored_log_probs_of_chosen(make_trainer, rows) -> None:
    trainer = make_trainer(loss={"name": "dpo", "nll_lambda": 0.5})
    before = trainer.measure(sample_pairs(trainer.train_dataset.pairs, 40))
    nll = -sum(sum(row["chosen_ref_logps"]) / len(row["chosen_ids"]) for row in rows) / len(rows)
    assert before["nll"] == pytest.approx(nll, rel=1e-4)
    assert before["loss"] == pytest.approx(math.log(2) + 0.5 * nll, rel=1e-4)


def test_sft_loss_is_the_mean_over_response_tokens(make_trainer, rows) -> None:
    trainer = make_trainer(loss={"name": "sft", "beta": None}, optim={"learning_rate": RATE_OF_NOTHING})
    trainer.train()
    num_tokens = sum(len(row["chosen_ids"]) for row in rows)
    nll = -sum(sum(row["chosen_ref_logps"]) for row in rows) / num_tokens
    assert trainer.measure(sample_pairs(trainer.train_dataset.pairs, 40))["loss"] == pytest.approx(nll, rel=1e-4)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    order = trainer.train_dataset.order
    step = [rows[row] for row in order.rows(range(8))]
    expected = -sum(sum(row["chosen_ref_logps"]) for row in step) / sum(len(row["chosen_ids"]) for row in step)
    assert logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert "rewards/rejected" not in logs[0]  # the rejected side is not even computed


def test_swap_negates_the_margins(make_trainer, shifted_store) -> None:
    values = []
    for swap in (False, True):
        trainer = make_trainer(data={"store": shifted_store, "swap": swap})
        values.append(trainer.measure(sample_pairs(trainer.train_dataset.pairs, 40)))
    for name in ("rewards/margins", "weighted_rewards/margins"):
        assert values[0][name] == pytest.approx(-values[1][name], abs=1e-6)
    assert values[0]["rewards/chosen"] == pytest.approx(values[1]["rewards/rejected"], abs=1e-6)


def test_training_raises_the_margin_and_reverse_training_lowers_it(make_trainer) -> None:
    for swap, sign in ((False, 1), (True, -1)):
        trainer = make_trainer(data={"swap": swap}, optim={"num_epochs": 2})
        plain = sample_pairs(make_trainer().train_dataset.pairs, 40)
        trainer.train()
        assert sign * trainer.measure(plain)["rewards/margins"] > 0.05


def test_every_pair_is_trained_on_once_per_epoch_and_max_steps_wins(make_trainer, make_config) -> None:
    assert make_trainer(optim={"num_epochs": 3, "pairs_per_step": 16}).batches.num_steps == 8  # 120 / 16 = 7.5
    trainer = make_trainer(optim={"num_epochs": 3, "max_steps": 7})
    trainer.train()
    assert trainer.state.global_step == 7  # 56 pairs: into the second epoch
    with pytest.raises(SettingsError, match="pairs_per_step=8 cannot be shared equally by 3 processes"):
        build_batches(make_config(), 40, world_size=3)


def test_dropout_is_off_in_training_mode(model_folder, rows) -> None:
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["chosen_ids"]])
    model = load_policy(model_folder, ModelConfig(path=str(model_folder), packing=False)).model
    assert model.config.attention_dropout == 0.1
    assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    untouched = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    assert not torch.equal(untouched(input_ids=ids).logits, model(input_ids=ids).logits)
    dropout = torch.nn.Sequential(torch.nn.Dropout(0.5))
    switch_off_noise(dropout)
    assert dropout[0].p == 0.0


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(SettingsError, match=r"the loss became nan by step 1; lower optim.learning_rate"):
        trainer.train()


def test_bfloat16_keeps_float32_parameters(make_trainer) -> None:
    trainer = make_trainer(model={"dtype": "bfloat16"}, optim={"max_steps": 1, "warmup_share": 0})
    sample = sample_pairs(trainer.train_dataset.pairs, 40)
    before = trainer.measure(sample)
    assert before["loss"] == pytest.approx(math.log(2), abs=0.02)  # the reference was scored in float32
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert trainer.measure(sample)["loss"] < before["loss"]


def test_a_pair_counts_as_much_as_its_weight_says(make_trainer, write_weights, rows) -> None:
    weights = [0.0 if i % 4 else 3.0 for i in range(len(rows))]  # ten of forty pairs
    store = write_weights([{**row, "pair_weight": weight} for row, weight in zip(rows, weights, strict=True)])
    trainer = make_trainer(data={"store": store}, loss={"name": "dpo"})
    # policy = reference: every pair's loss is log 2; 10 * 3 log 2 / 40
    assert trainer.measure(sample_pairs(trainer.train_dataset.pairs, 40))["loss"] == pytest.approx(
        0.75 * math.log(2), abs=1e-4
    )
