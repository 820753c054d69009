"""What is held out, what is measured on it, and which checkpoint is saved."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tokenweights
from train.config import EvalSection, TrainConfig
from train.data.dataset import OrderedPairs
from train.data.selection import is_held_out
from train.job.job import run_job
from train.job.trainer import PairTrainer
from weights_store.errors import MissingExtraError, NotFoundError, SettingsError
from weights_store.settings import parse_settings


def main(flags: list[str]) -> int:
    """Return the exit code of `tokenweights train`."""
    return tokenweights.main(["train", *flags])


PROMPT_DIGITS = 12


@pytest.fixture
def hashed_rows(rows):
    """The pairs under ids as real ones have them: two pairs of every prompt, whose hash comes first."""
    return [{**row, "pair_id": f"{i // 2:012x}{i:020x}"} for i, row in enumerate(rows)]


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The ids of all pairs that a training step computes, in order."""
    ids: list[str] = []
    ordinary = PairTrainer.get_batch_samples

    def note(self, epoch_iterator, num_batches, device):
        def pass_on():
            for pairs in epoch_iterator:
                ids.extend(pair.pair_id for pair in pairs)
                yield pairs

        return ordinary(self, pass_on(), num_batches, device)

    monkeypatch.setattr(PairTrainer, "get_batch_samples", note)
    return ids


@pytest.fixture
def measured(monkeypatch) -> list[list[str]]:
    """The ids of every sample that is measured."""
    samples: list[list[str]] = []
    ordinary = PairTrainer.measure

    def note(self, sample):
        samples.append([pair.pair_id for pair in sample])
        return ordinary(self, sample)

    monkeypatch.setattr(PairTrainer, "measure", note)
    return samples


def logged(folder: Path, key: str) -> list[dict[str, float]]:
    return [log for log in json.loads((folder / "metrics.json").read_text())["history"] if key in log]


def oracle(folder: Path, rows: list[dict]) -> dict[str, float]:
    """Mean DPO metrics of a saved model over rows, beta 0.1, in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    margins = []
    for row in rows:
        rewards = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            rewards.append(0.1 * (logps[len(row["prompt_ids"]) - 1 :].sum().item() - sum(row[f"{side}_ref_logps"])))
        margins.append(rewards[0] - rewards[1])
    return {
        "eval_loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / len(rows),
        "eval_rewards/margins": sum(margins) / len(rows),
        "eval_rewards/accuracies": sum(margin > 0 for margin in margins) / len(rows),
    }


def test_a_share_of_the_prompts_is_measured_and_never_trained_on(
    make_config, write_weights, hashed_rows, seen, measured
) -> None:
    write_weights(hashed_rows)
    ids = {row["pair_id"] for row in hashed_rows}
    held_out = {pair_id for pair_id in ids if is_held_out(pair_id, 0.3)}
    assert 4 <= len(held_out) <= 20
    result = run_job(make_config(eval={"share": 0.3, "every_steps": 2}, optim={"num_epochs": 2}))
    assert set(seen) == ids - held_out
    assert len(seen) == 2 * len(ids - held_out)
    assert set(measured[0]) == ids - held_out  # before, over the training data
    evaluations = [sample for sample in measured if set(sample) != ids - held_out]
    assert all(sorted(sample) == sorted(held_out) for sample in evaluations)
    prompts = [{pair_id[:PROMPT_DIGITS] for pair_id in side} for side in (seen, held_out)]
    assert not prompts[0] & prompts[1]
    assert len(evaluations) == result.steps // 2 + 1  # the last one for the record


def test_what_is_logged_of_the_held_out_pairs_is_what_a_measure_by_hand_finds(
    make_config, write_weights, hashed_rows
) -> None:
    write_weights(hashed_rows)
    optim = {"warmup_share": 0.0, "max_steps": 2}
    config = make_config(
        loss={"name": "dpo"},
        optim=optim,
        eval={"share": 0.3, "every_steps": 1},
        output={"save_every_steps": 1, "keep_checkpoints": True},
    )
    result = run_job(config)
    logs = logged(result.folder, "eval_loss")
    assert [log["step"] for log in logs] == [1, 2]
    held_out = [row for row in hashed_rows if is_held_out(row["pair_id"], 0.3)]
    by_hand = oracle(
        result.folder / "checkpoints" / "checkpoint-2", held_out
    )  # float32, unlike the model that is saved
    assert {name: logs[1][name] for name in by_hand} == pytest.approx(by_hand, abs=2e-4)
    recorded = json.loads((result.folder / "metrics.json").read_text())["held_out"]
    assert {f"eval_{name}": value for name, value in recorded.items()} == pytest.approx(
        {name: value for name, value in logs[1].items() if name.startswith("eval_")}
    )


def test_another_split_is_measured_and_the_split_of_the_training_trained_on(make_config, rows, seen, measured) -> None:
    run_job(make_config(data={"split": "train"}, eval={"split": "test", "max_pairs": 7}))
    assert set(seen) == {row["pair_id"] for row in rows if row["split"] == "train"}
    assert len(measured) == 3  # before, after, held out
    assert len(measured[2]) == 7
    assert set(measured[2]) <= {row["pair_id"] for row in rows if row["split"] == "test"}


def test_the_best_checkpoint_is_saved_and_not_the_last(make_config, write_weights, rows, monkeypatch, caplog) -> None:
    """From the fifth step on every pair is the wrong way round."""
    copies = [
        {**row, "pair_id": f"{split}-{i:04d}", "split": split}
        for split in ("train", "test")
        for i, row in enumerate(rows)
    ]
    write_weights(copies)
    ordinary = OrderedPairs.__getitem__
    monkeypatch.setattr(
        OrderedPairs,
        "__getitem__",
        lambda self, position: ordinary(self, position).swapped() if position >= 32 else ordinary(self, position),
    )
    config = make_config(
        data={"split": "train"},
        optim={"max_steps": 8, "warmup_share": 0.0, "schedule": "constant"},
        eval={"split": "test", "every_steps": 1, "best": "loss"},
        output={"save_every_steps": 1},
    )
    result = run_job(config)
    logs = logged(result.folder, "eval_loss")
    losses = [log["eval_loss"] for log in logs]
    best = min(range(8), key=losses.__getitem__)
    assert best in (3, 4, 5)  # the optimizer's momentum carries it a little further
    assert losses[7] > losses[best] + 0.05
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["best_step"] == best + 1
    assert record["held_out"]["loss"] == pytest.approx(losses[best], abs=1e-6)
    said = caplog.text
    assert f"held out at step 8  loss {losses[7]:.4g}  " in said
    assert f"best by held-out loss: step {best + 1}\n" in said
    saved = oracle(result.folder, rows)  # of what was saved, rounded to bfloat16
    margins = [log["eval_rewards/margins"] for log in logs]
    assert abs(saved["eval_rewards/margins"] - margins[best]) < 0.1 * abs(margins[7] - margins[best])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval": {"share": 0.1, "split": "test"}},
            "eval.split and eval.share are two ways to hold pairs out; give one",
        ),
        ({"eval": {"every_steps": 5}}, "eval.best and eval.every_steps need something held out; set eval.share=0.05"),
        (
            {"eval": {"share": 0.1, "best": "loss"}},
            "eval.best needs eval.every_steps, to have something to choose from",
        ),
        ({"eval": {"share": 1.0}}, "eval.share: Input should be less than 1"),
        ({"eval": {"split": "test"}}, "data.split is empty, so that eval.split would be trained on; set data.split"),
        (
            {"eval": {"split": "test"}, "data": {"split": "test"}},
            "eval.split='test' is data.split too; hold out another",
        ),
        (
            {"eval": {"share": 0.1, "every_steps": 2, "best": "loss"}},
            "eval.best chooses among checkpoints; set output.save_every_steps",
        ),
        (
            {"eval": {"share": 0.1, "every_steps": 2, "best": "loss"}, "output": {"save_every_steps": 3}},
            "output.save_every_steps=3 must be a multiple of eval.every_steps=2, so that every checkpoint has been measured",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, changes, message) -> None:
    merged = {name: {**settings.get(name, {}), **changes.get(name, {})} for name in {**settings, **changes}}
    with pytest.raises(SettingsError, match=message):
        parse_settings(TrainConfig, merged, where="here")


def test_nothing_held_out_is_said_so(make_config) -> None:
    with pytest.raises(NotFoundError, match=r"toy/tis@0 has no pairs of split 'dev'"):
        run_job(make_config(data={"split": "train"}, eval={"split": "dev"}))
    with pytest.raises(NotFoundError, match=r"has no pairs of any split, held out \(share 1e-09\)"):
        run_job(make_config(eval={"share": 1e-9}))
    assert not Path(make_config().output.folder).exists()
    assert EvalSection().is_on is False


def test_a_tracker_that_nobody_knows_is_one_clear_error(settings, capsys, monkeypatch) -> None:
    settings["output"]["report_to"] = "tensorbord"
    flags = [f"{section}.{key}={value}" for section, part in settings.items() for key, value in part.items()]
    assert main([part for flag in flags for part in ("--set", flag)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: output.report_to='tensorbord' is not a tracker that transformers knows; expected none, "
    )
    assert "tensorboard" in said
    assert not Path(settings["output"]["folder"]).exists()


def test_a_tracker_that_is_not_installed_says_what_to_install(make_config, monkeypatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    with pytest.raises(MissingExtraError, match="output.report_to='wandb' needs a package that is not installed; pip"):
        run_job(make_config(output={"report_to": "wandb"}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_gets_the_metrics(make_config, monkeypatch, tmp_path) -> None:
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    result = run_job(make_config(output={"report_to": "tensorboard"}, optim={"max_steps": 2}))
    paths = list((tmp_path / "events").rglob("events.*"))
    assert len(paths) == 1
    events = event_file.EventFileLoader(str(paths[0])).Load()
    found = {
        (event.step, value.tag): value.tensor.float_val[0]
        for event in events
        for value in event.summary.value
        if value.tensor.float_val
    }
    losses = {log["step"]: log["loss"] for log in logged(result.folder, "loss")}
    assert {step: found[step, "train/loss"] for step in (1, 2)} == pytest.approx(losses)
    assert (2, "train/rewards/margins") in found
