"""TRL's DPOTrainer on our weight datasets, against our own losses and TRL's own reference model."""

import dataclasses
import importlib
import sys
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from train.config import DataConfig
from train.data.dataset import Pair
from train.data.sampler import BlockShuffle
from train.loss.losses import dpo, tis_dpo
from train.loss.terms import ResponseLogps
from train.trl_adapter import HOOKS, StoredPairCollator, WeightedDPOTrainer, check_hooks
from weights_store.errors import MismatchError, MissingExtraError, SettingsError

BETA = 0.3


@pytest.fixture
def shifted_store(write_weights, rows) -> str:
    """A store whose reference is not the model, so that losses are not all log 2."""
    shifted = [
        row
        | {
            f"{side}_ref_logps": [
                x - 0.2 * ((7 * t + len(row["prompt_ids"])) % 5) for t, x in enumerate(row[f"{side}_ref_logps"])
            ]
            for side in ("chosen", "rejected")
        }
        for row in rows
    ]
    return write_weights(shifted)


@pytest.fixture
def make_trainer(model_folder, shifted_store, tmp_path):
    """Return a function that makes a trainer; keywords are TRL's settings, `loss`, `data` and `eval_data` ours."""

    def make(loss="tis_dpo", data=None, eval_data=None, ref_model=None, **settings) -> WeightedDPOTrainer:
        settings = {
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "beta": BETA,
            "seed": 3,
            "max_steps": 2,
        } | settings
        data = DataConfig(store=shifted_store, weights="toy/tis", **(data or {}))
        eval_data = eval_data and DataConfig(store=shifted_store, weights="toy/tis", **eval_data)
        args = DPOConfig(output_dir=str(tmp_path / "out"), **settings)
        return WeightedDPOTrainer(str(model_folder), args, data, loss=loss, eval_data=eval_data, ref_model=ref_model)

    return make


def side_of(model: torch.nn.Module, pairs: list[Pair], side: str) -> ResponseLogps:
    """Log-probs of one side, every sequence alone and through the whole log-softmax, padded to `[B, T]`."""
    responses = [getattr(pair, side) for pair in pairs]
    width = max(len(response.ids) for response in responses)

    def padded(values) -> torch.Tensor:
        values = values if isinstance(values, torch.Tensor) else torch.tensor(values)
        return torch.cat([values, values.new_zeros(width - len(values))])

    logps = []
    for pair, response in zip(pairs, responses, strict=True):
        ids = torch.tensor([[*pair.prompt_ids, *response.ids]])
        table = model(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
        logps.append(padded(table.gather(-1, torch.tensor(response.ids, dtype=torch.int64)[:, None]).squeeze(-1)))
    return ResponseLogps(
        torch.stack(logps),
        torch.stack([padded(torch.ones(len(response.ids), dtype=torch.bool)) for response in responses]),
        torch.stack([padded(response.ref_logps) for response in responses]),
        torch.stack([padded(response.token_weights) for response in responses]),
    )


@pytest.mark.parametrize(("loss", "ours"), [("tis_dpo", tis_dpo), ("dpo", dpo)])
def test_loss_and_gradients_equal_ours(make_trainer, model_folder, loss, ours) -> None:
    trainer = make_trainer(loss)
    trainer.model.train()  # the config asks for dropout: it must be off
    pairs = [trainer.train_dataset[row] for row in (5, 0, 11, 17)]
    got = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    got.backward()

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = ours(side_of(model, pairs, "chosen"), side_of(model, pairs, "rejected"), beta=BETA).losses
    assert expected.std() > 0.01  # else a wrong pairing of the rows could hide
    expected.mean().backward()

    assert got.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    for ours_, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours_.grad, rtol=1e-4, atol=1e-6)


def test_steps_of_several_batches_train_as_a_loop_over_the_pairs_does(make_trainer, model_folder) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    trainer = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, logging_steps=1, **settings
    )
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = list(BlockShuffle(trainer.train_dataset.group_sizes, seed=3).rows(range(12)))
    expected = []
    for first in (0, 4, 8):
        pairs = [trainer.train_dataset[row] for row in rows[first : first + 4]]
        loss = tis_dpo(side_of(model, pairs, "chosen"), side_of(model, pairs, "rejected"), beta=BETA).losses.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
        expected.append(loss.item())
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_batches_carry_stored_ids_weights_and_weighted_reference_sums(make_trainer, rows) -> None:
    trainer = make_trainer()
    pair = trainer.train_dataset[2]
    batch = StoredPairCollator(with_token_weights=True)([pair, trainer.train_dataset[3]])
    row = rows[2]
    length = len(row["prompt_ids"]) + len(row["chosen_ids"])
    assert batch["input_ids"][0, :length].tolist() == row["prompt_ids"] + row["chosen_ids"]
    assert batch["token_weights"][0, : len(row["prompt_ids"])].tolist() == [0.0] * len(row["prompt_ids"])
    stored = batch["token_weights"][0, len(row["prompt_ids"]) : length].tolist()
    assert stored == pytest.approx(row["chosen_token_weights"], rel=2e-4)
    weighted = sum(w * r for w, r in zip(pair.rejected.token_weights, pair.rejected.ref_logps, strict=True))
    assert batch["ref_rejected_logps"][0].item() == pytest.approx(weighted, rel=1e-5)


def test_training_takes_the_pairs_in_the_order_of_our_trainer_without_a_reference_model(
    make_trainer, monkeypatch
) -> None:
    trainer = make_trainer(num_train_epochs=2, max_steps=-1, data={"max_pairs": 10})
    seen: list[str] = []
    collate = StoredPairCollator.__call__

    def remember(self, pairs):
        seen.extend(pair.pair_id for pair in pairs)
        return collate(self, pairs)

    monkeypatch.setattr(StoredPairCollator, "__call__", remember)
    trainer.train()
    assert trainer.ref_model is None
    order = BlockShuffle(trainer.train_dataset.group_sizes, seed=3)
    assert seen == [trainer.train_dataset[row].pair_id for row in order.rows(range(20))]
    assert seen[:10] != seen[10:]


def test_a_held_out_split_is_evaluated_with_the_same_loss(make_trainer, model_folder) -> None:
    trainer = make_trainer(data={"split": "train"}, eval_data={"split": "test"}, per_device_eval_batch_size=10)
    metrics = trainer.evaluate()
    pairs = [trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))]
    assert len(pairs) == 10
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        expected = tis_dpo(side_of(model, pairs, "chosen"), side_of(model, pairs, "rejected"), beta=BETA).losses
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_a_dataset_given_to_evaluate_is_the_one_that_is_evaluated_or_refused(make_trainer) -> None:
    trainer = make_trainer(data={"split": "train"}, eval_data={"split": "test"}, per_device_eval_batch_size=10)
    of_test, of_train = trainer.evaluate()["eval_loss"], trainer.evaluate(trainer.train_dataset)["eval_loss"]
    with torch.no_grad():
        trainer.model.eval()
        pairs = [trainer.train_dataset[row] for row in range(len(trainer.train_dataset))]
        batches = [pairs[first : first + 10] for first in range(0, len(pairs), 10)]
        losses = [trainer.compute_loss(trainer.model, trainer.data_collator(batch)).item() for batch in batches]
    assert len(pairs) % 10 == 0  # so that the mean of the batches is the mean of the pairs
    assert of_train == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert abs(of_train - of_test) > 1e-3
    with pytest.raises(SettingsError, match=r"takes stored pairs, .* got Dataset; name them with eval_data=DataConfig"):
        trainer.evaluate(Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}))


def test_a_reference_model_that_would_do_nothing_is_refused(make_trainer, model_folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(SettingsError, match="so ref_model would do nothing; leave it out"):
        make_trainer(ref_model=model)


def test_swapped_data_negates_the_reward_margins(make_trainer) -> None:
    plain, swapped = (make_trainer(data={"swap": swap}) for swap in (False, True))
    margins = []
    for trainer in (plain, swapped):
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[4]]))
        margins.append(trainer._metrics["train"]["rewards/margins"][0])
    assert margins[0] == pytest.approx(-margins[1], rel=1e-5)
    assert abs(margins[0]) > 1e-3


@pytest.mark.parametrize(
    "setting",
    [
        {"loss_type": ["ipo"]},
        {"ld_alpha": 0.5},
        {"label_smoothing": 0.1},
        {"use_weighting": True},
        {"f_divergence_type": "forward_kl"},
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "sequential"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_weights_do_not_go_with_are_refused_by_name(make_trainer, setting) -> None:
    with pytest.raises(SettingsError, match=f"need {next(iter(setting))}="):
        make_trainer(**setting)


def test_a_share_of_likelihood_is_refused_because_trl_would_take_it_of_weighted_log_probs(make_trainer) -> None:
    with pytest.raises(
        SettingsError, match=r"got \['sigmoid', 'sft'\]; for likelihood .* `tokenweights train` and loss.nll"
    ):
        make_trainer(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])


def test_losses_that_trl_does_not_have_are_refused_instead_of_trained_as_dpo(make_trainer) -> None:
    with pytest.raises(SettingsError, match="got 'ti_dpo'; TRL's loss has no triplet and no KL term"):
        make_trainer("ti_dpo")
    with pytest.raises(SettingsError, match="has the losses 'dpo' and 'tis_dpo', got 'ipo'; train with `tokenweights"):
        make_trainer("ipo")


def test_a_pair_over_max_length_is_refused_not_cut(make_trainer) -> None:
    trainer = make_trainer(max_length=8)
    pair = max((trainer.train_dataset[row] for row in range(40)), key=lambda pair: pair.num_tokens)
    with pytest.raises(MismatchError, match=f"{pair.pair_id} has {pair.num_tokens} tokens, max_length=8"):
        trainer.data_collator([pair])


def test_a_pair_weight_that_trl_would_not_see_is_refused(make_trainer) -> None:
    trainer = make_trainer()
    pair = dataclasses.replace(trainer.train_dataset[6], pair_weight=0.5)
    with pytest.raises(MismatchError, match=f"{pair.pair_id} has pair_weight 0.5"):
        trainer.data_collator([pair])


def test_recorded_pair_weights_are_refused_before_the_first_step(make_trainer, write_weights, rows) -> None:
    numbers = {"num_pairs": len(rows), "min_pair_weight": 0.25, "max_pair_weight": 1.0}
    write_weights([row | {"pair_weight": 0.25 if n == 7 else 1.0} for n, row in enumerate(rows)], statistics=numbers)
    with pytest.raises(
        MismatchError, match=r"toy/tis@1 has pair weights from 0.25 to 1, but .* use_pair_weights=False"
    ):
        make_trainer()
    trainer = make_trainer(data={"use_pair_weights": False})
    assert {trainer.train_dataset[row].pair_weight for row in range(len(rows))} == {1.0}


def test_constant_weights_are_refused_for_tis_dpo_and_taken_for_dpo(make_trainer, write_weights, rows) -> None:
    sides = ("chosen", "rejected")
    write_weights([row | {f"{side}_token_weights": [1.0] * len(row[f"{side}_ids"]) for side in sides} for row in rows])
    with pytest.raises(MismatchError, match="all weights of toy/tis@1 are equal"):
        make_trainer("tis_dpo")
    trainer = make_trainer("dpo")
    assert trainer.data_collator([trainer.train_dataset[0]])["token_weights"].unique().tolist() == [0.0, 1.0]


def test_the_installed_trl_has_every_hook() -> None:
    # If this fails after an upgrade of TRL, its message names the hook and the version.
    assert check_hooks(DPOTrainer) is None
    assert HOOKS.keys() == {name for name in vars(WeightedDPOTrainer) if callable(getattr(DPOTrainer, name, None))} - {
        "__init__"
    }


def hook(name) -> str:
    return rf"replaces DPOTrainer\.{name}\({', '.join(HOOKS[name])}\) of TRL 1\.16, but TRL {version('trl')}"


@pytest.mark.parametrize("name", [name for name in HOOKS if name != "compute_loss"])  # transformers has that too
def test_a_hook_that_is_gone_is_named_with_the_version_of_trl(make_trainer, monkeypatch, name) -> None:
    (owner, *_) = [kind for kind in DPOTrainer.__mro__ if name in vars(kind)]
    monkeypatch.delattr(owner, name)
    with pytest.raises(MismatchError, match=f"{hook(name)} has none; pip"):
        make_trainer()


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_with_other_parameters_is_named_with_both(make_trainer, monkeypatch, name) -> None:
    monkeypatch.setattr(DPOTrainer, name, lambda self, rows: rows)
    with pytest.raises(MismatchError, match=rf"{hook(name)} has {name}\(rows\); pip"):
        make_trainer()


def test_a_trl_that_computes_log_probs_elsewhere_is_refused_not_trained_without_weights(
    make_trainer, monkeypatch
) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda self, model, inputs, *rest: torch.tensor(0.0))
    with pytest.raises(MismatchError, match=r"from its fused lm_head 0 times for one loss, where TRL 1\.16 does once"):
        trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]]))


def test_without_trl_the_message_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "train.trl_adapter")
    with pytest.raises(MissingExtraError, match=r"pip install 'tokenweights\[trl\]'"):
        importlib.import_module("train.trl_adapter")
