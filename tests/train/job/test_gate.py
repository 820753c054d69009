import copy
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from train.config import GateSection
from train.data.dataset import Pair
from train.job.gate import Agreement, check_step_0, compare, tolerance_of
from train.job.job import run_job
from train.job.prepare import JobInputs, open_inputs, open_pairs
from train.job.trainer import PairTrainer
from train.job.training import pass_gate
from train.model.policy import load_policy, load_reference
from weights_store.errors import MismatchError
from weights_store.fingerprint import fingerprint_chat_template, fingerprint_model, fingerprint_tokenizer

PARITY = {"num_pairs": 40, "num_tokens": 500, "mean": 1e-5, "p99": 3e-5, "max": 1e-4, "dtype": "float32"}


@pytest.fixture
def exact_store(write_weights, rows, model_folder) -> str:
    """The reference was scored in float32, and its parity check says so."""
    reference = {"model_fingerprint": fingerprint_model(model_folder), "dtype": "float32", "model": "the/model"}
    return write_weights(rows, parity=PARITY, reference=reference)


@pytest.fixture
def other_model(model_folder, tmp_path) -> Path:
    """The same architecture and tokenizer, slightly other weights: as after a few steps of training."""
    folder = tmp_path / "other-model"
    shutil.copytree(model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def refusal(config, folder: Path) -> str:
    with pytest.raises(MismatchError) as caught:
        run_job(config)
    assert not (folder / "config.json").exists()
    return str(caught.value)


def test_the_right_model_passes_and_the_log_says_by_how_much(make_config, exact_store, caplog) -> None:
    run_job(make_config(optim={"max_steps": 1}))
    line = next(line for line in caplog.messages if line.startswith("step-0 gate"))
    # 12 bits of mantissa are stored: log-probs of about -5 are off by up to 6e-4
    assert line.startswith("step-0 gate: 0.000")
    assert "(at most 0.001)" in line


def test_another_model_is_refused_with_both_fingerprints(make_config, exact_store, other_model, model_folder) -> None:
    config = make_config(model={"path": str(other_model)})
    said = refusal(config, Path(config.output.folder))
    assert "step-0 gate: the model's log-probs differ from the stored ones of the reference by " in said
    assert f"({fingerprint_model(other_model)[:12]}) is another model than the reference" in said
    assert (
        f"({fingerprint_model(model_folder)[:12]}, the/model): train the model that the dataset was scored with" in said
    )


def test_another_dtype_is_refused_and_named(make_config, exact_store) -> None:
    config = make_config(model={"dtype": "bfloat16"})
    said = refusal(config, Path(config.output.folder))
    assert (
        "in float32 they agree, so the dtype is the cause: the reference was scored in float32, this run computes"
        in said
    )
    assert "bfloat16. Set model.dtype='float32', or build with `--set score.dtype=bfloat16`" in said


def test_a_split_model_in_another_dtype_is_refused_without_a_run_in_float32(make_config) -> None:
    config, asked = make_config(model={"dtype": "bfloat16"}), []

    def measure(dtype):
        asked.append(dtype)
        return [(torch.tensor([-1.0]), torch.tensor([-2.0]))]

    with pytest.raises(
        MismatchError, match=r"cannot be run in float32 to see whether bfloat16 is the cause. If model.dtype="
    ):
        check_step_0(measure, config, {}, "f" * 64, is_split=True)
    assert asked == ["bfloat16"]


def test_another_chat_template_is_refused_and_named(make_config, write_weights, rows, model_folder, tmp_path) -> None:
    template = fingerprint_chat_template(model_folder)
    recorded = {"fingerprint": fingerprint_tokenizer(model_folder), "vocab_size": 128, "chat_template": template}
    write_weights(rows, tokenizer=recorded)
    other = tmp_path / "other-template"
    shutil.copytree(model_folder, other)
    (other / "chat_template.jinja").write_text("another")
    config = make_config(model={"path": str(other)})
    said = refusal(config, Path(config.output.folder))
    assert f"was rendered with chat template {template[:12]}, the model in {other} has " in said
    (other / "chat_template.jinja").unlink()
    assert f"the model in {other} has none: it would learn another format" in refusal(
        config, Path(config.output.folder)
    )


def test_another_vocabulary_of_the_tokenizer_is_refused_and_named(make_config, model_folder, tmp_path) -> None:
    other = tmp_path / "other-tokenizer"
    shutil.copytree(model_folder, other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"W7"'))
    config = make_config(model={"path": str(other)})
    assert "its ids would mean other text" in refusal(config, Path(config.output.folder))


def test_stored_numbers_that_are_wrong_are_told_from_a_wrong_model(
    make_config, write_weights, rows, model_folder
) -> None:
    rows = copy.deepcopy(rows)
    for row in rows:
        row["rejected_ref_logps"] = row["rejected_ref_logps"][::-1]
    write_weights(rows, parity=PARITY, reference={"model_fingerprint": fingerprint_model(model_folder)})
    config = make_config()
    said = refusal(config, Path(config.output.folder))
    assert (
        "the model's files are those of the reference, so the stored numbers or the ones of this machine are wrong"
        in said
    )


def test_one_wrong_token_per_response_is_enough(make_config, write_weights, rows) -> None:
    """An end of text that was scored in another place would hide in a mean over long responses."""
    rows = copy.deepcopy(rows)
    for row in rows:
        row["chosen_ref_logps"][-1] -= 0.2
    write_weights(rows, parity=PARITY)
    config = make_config()
    assert "step-0 gate" in refusal(config, Path(config.output.folder))


def test_the_gate_can_be_widened_and_left_out(make_config, exact_store, other_model) -> None:
    for gate in ({"pairs": 0}, {"tolerance_nats": 5.0}):
        config = make_config(model={"path": str(other_model)}, optim={"max_steps": 1}, gate=gate)
        assert run_job(config, overwrite=True).steps == 1


def open_trainer(config, tmp_path, reference_folder: Path) -> tuple[PairTrainer, JobInputs, Sequence[Pair]]:
    """Return a trainer whose frozen reference is of another folder than its policy."""
    inputs = open_inputs(config)
    pairs = open_pairs(inputs)
    policy = load_policy(inputs.model_folder, config.model)
    reference = load_reference(reference_folder, config.model, policy)
    return PairTrainer(policy, pairs.trained, config, checkpoints=tmp_path, reference=reference), inputs, pairs.sample


def test_the_frozen_reference_model_is_looked_at_too(
    make_config, exact_store, model_folder, other_model, tmp_path, caplog
) -> None:
    config = make_config(loss={"kl": "exact"})
    pass_gate(*open_trainer(config, tmp_path, model_folder))
    assert any(line.startswith("step-0 gate: the frozen reference model is 0.000") for line in caplog.messages)
    with pytest.raises(
        MismatchError,
        match=r"step-0 gate: the frozen reference model's log-probs differ .* \(expected at most 0.001\).*; the policy's "
        "agree, so the way in which the reference is computed in float32 is the cause",
    ):
        pass_gate(*open_trainer(config, tmp_path, other_model))


def test_the_gate_runs_the_model_in_the_mode_that_trains(make_config, exact_store, model_folder, tmp_path) -> None:
    """With gradient checkpointing, layers are in training mode: what they do in that mode only is seen by the gate."""
    config = make_config(model={"gradient_checkpointing": True}, optim={"max_steps": 1})
    inputs = open_inputs(config)
    pairs = open_pairs(inputs)
    policy = load_policy(model_folder, config.model)
    trainer = PairTrainer(policy, pairs.trained, config, checkpoints=tmp_path)
    modes = []
    policy.model.model.layers[0].register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    pass_gate(trainer, inputs, pairs.sample)
    at_the_gate, modes[:] = set(modes), []
    trainer.train()
    assert at_the_gate == set(modes) == {True}


def test_losses_without_a_reference_need_no_gate(make_config, exact_store, other_model) -> None:
    loss = {"name": "simpo", "beta": 2.0}
    assert run_job(make_config(model={"path": str(other_model)}, loss=loss, optim={"max_steps": 1})).steps == 1


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"parity": {"mean": 0.015}}, 0.045),  # three times what the scorer itself is off
        ({"parity": {"mean": 1e-6}}, 1e-3),
        ({"reference": {"dtype": "float16"}}, 1e-2),
        ({"reference": {"dtype": "bfloat16"}}, 4e-2),
        ({}, 4e-2),
    ],
)
def test_the_tolerance_is_learnt_from_the_scorer(metadata, expected) -> None:
    assert tolerance_of(GateSection(), metadata) == pytest.approx(expected)
    assert tolerance_of(GateSection(tolerance_nats=0.5), metadata) == 0.5


def test_agreement_by_hand() -> None:
    found = compare(
        [(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])), (torch.tensor([-3.0]), torch.tensor([-2.0]))]
    )
    assert found == Agreement(num_tokens=3, mean=0.5, max=1.0)  # (0.5 + 0 + 1) / 3
    assert found.within(0.5)
    assert not found.within(0.49)
    assert not Agreement(3, 0.01, 0.51).within(0.01)  # 50 times 0.01 for a single token
    assert not Agreement(3, math.nan, math.nan).within(1.0)
