import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokenweights
from train.job.job import run_job
from train.job.output import OutputFolder
from train.job.progress import ProgressLines
from weights_store.errors import InputError, MismatchError, NotFoundError, SettingsError
from weights_store.fingerprint import fingerprint_tokenizer
from weights_store.messages import progress_of


def main(flags: list[str]) -> int:
    """Return the exit code of `tokenweights train`."""
    return tokenweights.main(["train", *flags])


REPO = Path(__file__).parents[3]


def flags_of(settings: dict, **more: object) -> list[str]:
    """The settings as --set flags."""
    values = {f"{section}.{key}": value for section, part in settings.items() for key, value in part.items()} | more
    return [flag for key, value in values.items() for flag in ("--set", f"{key}={value}")]


def history_of(folder: Path) -> list[dict]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return [{k: v for k, v in log.items() if k != "data_wait_s"} for log in metrics["history"] if "loss" in log]


@pytest.fixture
def undisturbed(make_config, tmp_path) -> list[dict]:
    folder = tmp_path / "undisturbed"
    run_job(make_config(output={"folder": str(folder)}))
    return history_of(folder)


def test_the_saved_model_loads_and_is_the_trained_one(make_config, model_folder) -> None:
    config = make_config()
    result = run_job(config)
    assert result.steps == 5
    assert result.after["rewards/margins"] > result.before["rewards/margins"]
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.dtype == torch.bfloat16  # as in the source's config
    source = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert AutoTokenizer.from_pretrained(result.folder)("né w5")["input_ids"] == [3, 9]
    assert fingerprint_tokenizer(result.folder) == fingerprint_tokenizer(model_folder)
    for path in model_folder.iterdir():
        if path.suffix != ".safetensors":
            assert (result.folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (result.folder / "checkpoints").exists()
    modes = {path.stat().st_mode for path in result.folder.iterdir()}
    assert len(modes) == 1  # the weights can be read by whoever can read the config
    assert not [path.name for path in result.folder.iterdir() if path.name.startswith(".")]


def test_the_float32_model_saved_measures_as_recorded(make_config, model_folder, tmp_path, rows) -> None:
    source = tmp_path / "float32-model"
    shutil.copytree(model_folder, source)
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).save_pretrained(source)
    result = run_job(make_config(model={"path": str(source)}))
    trained = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        logps = trained(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        total += logps[len(row["prompt_ids"]) - 1 :].sum().item()
    assert total / len(rows) == pytest.approx(result.after["logps/chosen"], rel=1e-4)


def test_lineage_leads_back_to_the_dataset(make_config, store) -> None:
    folder = run_job(make_config()).folder
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["parents"] == [{"table": "weights/toy/tis", "version": 0, "fingerprint": f"{40:064d}"}]
    assert lineage["identity"]["weights"]["name"] == "toy/tis@0"
    assert lineage["config"]["loss"] == {"name": "tis_dpo", "beta": 0.1, "kl": "off"}
    assert lineage["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # some builds name CUDA in one
    record = json.loads((folder / "train.json").read_text())
    assert record["config"] == lineage["config"]


def test_a_finished_folder_is_not_trained_again(make_config, caplog) -> None:
    first = run_job(make_config())
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    # micro-batches and logging are no part of what a model is
    second = run_job(make_config(optim={"tokens_per_batch": 64}, output={"log_every_steps": 3}))
    assert second.was_trained_before
    assert (second.steps, second.before, second.after) == (first.steps, first.before, first.after)
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    assert f"already trained: {first.folder}" in caplog.text


def test_another_job_in_the_folder_is_refused_field_by_field(make_config, write_weights, rows) -> None:
    folder = run_job(make_config()).folder
    write_weights(rows[:20])
    other = make_config(loss={"beta": 0.2})
    with pytest.raises(SettingsError) as caught:
        run_job(other)
    assert "loss.beta: 0.1 -> 0.2; weights.fingerprint: 0000" in str(caught.value)
    assert 'weights.name: "toy/tis@0" -> "toy/tis@1"; choose another folder, or give --overwrite' in str(caught.value)
    (folder / "model-00009-of-00009.safetensors").write_text("left over")
    result = run_job(other, overwrite=True)
    assert not result.was_trained_before
    assert not (folder / "model-00009-of-00009.safetensors").exists()


def test_a_folder_that_is_not_ours_is_refused_even_with_overwrite(make_config, model_folder) -> None:
    with pytest.raises(InputError, match=r"is not empty and has no train\.json"):
        run_job(make_config(output={"folder": str(model_folder)}), overwrite=True)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(settings, undisturbed, monkeypatch, capsys) -> None:
    ordinary = ProgressLines.on_step_end

    def stop_at_step_3(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        return ordinary(self, args, state, control, **kwargs)

    folder = Path(settings["output"]["folder"])
    monkeypatch.setattr(ProgressLines, "on_step_end", stop_at_step_3)
    assert main(flags_of(settings)) == 130
    assert "stopping after this step" in (said := capsys.readouterr().err)
    assert "stopped; the same command continues from the last checkpoint" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert not (folder / "config.json").exists()
    monkeypatch.undo()
    assert main(flags_of(settings)) == 0
    assert "resuming from checkpoint-3" in capsys.readouterr().err
    assert history_of(folder) == undisturbed


def test_a_killed_run_goes_on_as_if_nothing_had_happened(settings, undisturbed) -> None:
    folder = Path(settings["output"]["folder"])
    command = [sys.executable, "-c", _KILLED, *flags_of(settings, **{"output.save_every_steps": 2})]
    killed = subprocess.run(command, cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert OutputFolder(folder).last_checkpoint() == folder / "checkpoints" / "checkpoint-2"
    assert main(flags_of(settings, **{"output.save_every_steps": 2})) == 0
    assert history_of(folder) == undisturbed


# Dies while it writes its second checkpoint: the model is there, optimizer and state are not.
_KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from transformers import Trainer
ordinary = Trainer._save_optimizer_and_scheduler
def kill_at_step_4(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    ordinary(self, folder)
Trainer._save_optimizer_and_scheduler = kill_at_step_4
from train.run import main
main(sys.argv[1:])
"""


def test_a_second_training_in_the_same_folder_is_refused_and_disturbs_nothing(
    settings, undisturbed, monkeypatch, capsys
) -> None:
    folder, ordinary, refused = Path(settings["output"]["folder"]), ProgressLines.on_step_end, []

    def start_a_second(self, args, state, control, **kwargs):
        if not refused:
            refused.append(True)
            more = [[], ["--overwrite"], ["--set", "output.resume=false"]]
            refused[:] = [main([*flags_of(settings, **{"output.save_every_steps": 2}), *flags]) for flags in more]
        return ordinary(self, args, state, control, **kwargs)

    monkeypatch.setattr(ProgressLines, "on_step_end", start_a_second)
    assert main(flags_of(settings, **{"output.save_every_steps": 2})) == 0
    assert refused == [1, 1, 1]
    said = capsys.readouterr().err
    assert said.count(f"error: output.folder='{folder}' is in use: process {os.getpid()} on ") == 3
    assert "is training there; wait until it is done, or choose another folder" in said
    assert history_of(folder) == undisturbed
    assert not [path.name for path in folder.glob(".*")]


def test_a_job_that_another_process_has_finished_meanwhile_is_not_trained_again(make_config) -> None:
    config = make_config(optim={"max_steps": 1})
    folder = run_job(config).folder
    identity = json.loads((folder / "lineage.json").read_text())["identity"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with (
        pytest.raises(InputError, match="another process has just finished this job there; run the same command again"),
        OutputFolder(folder).claimed(identity, {}, overwrite=False, resume=True),
    ):
        pass
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert not (folder / ".lock").exists()


def test_resume_false_starts_again(settings, make_config, undisturbed, monkeypatch, caplog) -> None:
    monkeypatch.setattr("train.job.training.save_policy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(flags_of(settings, **{"output.save_every_steps": 2})) == 130
    monkeypatch.undo()
    caplog.clear()
    run_job(make_config(output={"resume": False}))
    assert "resuming" not in caplog.text
    assert history_of(Path(settings["output"]["folder"])) == undisturbed


@pytest.mark.parametrize("save_every_steps", [None, 5])  # 5: the last step has a checkpoint, nothing is left to train
def test_a_kill_between_files_leaves_no_model_that_loads(
    make_config, monkeypatch, settings, undisturbed, save_every_steps
) -> None:
    folder = Path(settings["output"]["folder"])
    settings["output"]["save_every_steps"] = save_every_steps
    ordinary = Path.replace

    def die_at_tokenizer(self, target):
        if self.parent.name == ".staging" and self.name == "tokenizer.json":
            raise KeyboardInterrupt
        return ordinary(self, target)

    monkeypatch.setattr(Path, "replace", die_at_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run_job(make_config())
    assert (folder / "model.safetensors").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.undo()
    assert not run_job(make_config()).was_trained_before
    assert history_of(folder) == undisturbed
    AutoModelForCausalLM.from_pretrained(folder)


def test_checkpoints_are_kept_on_request(make_config) -> None:
    result = run_job(make_config(output={"save_every_steps": 2, "keep_checkpoints": True}))
    assert (result.folder / "checkpoints" / "checkpoint-5" / "optimizer.pt").is_file()


def test_another_tokenizer_is_refused(make_config, model_folder, tmp_path) -> None:
    other = tmp_path / "other-model"
    shutil.copytree(model_folder, other)
    (other / "chat_template.jinja").write_text("another")
    with pytest.raises(
        MismatchError, match=r"toy/tis@0 was tokenised with tokenizer .* has .*: its ids would mean other"
    ):
        run_job(make_config(model={"path": str(other)}))


def test_another_vocabulary_is_refused(make_config, write_weights, rows, model_folder) -> None:
    recorded = {"fingerprint": fingerprint_tokenizer(model_folder), "vocab_size": 192, "eos_token_id": 2}
    write_weights(rows, tokenizer=recorded)
    with pytest.raises(MismatchError, match=r"scored with a vocabulary of 192 ids, the model in .* has 128"):
        run_job(make_config())
    write_weights(rows, tokenizer=None)
    with pytest.raises(MismatchError, match="toy/tis@2 does not record its tokenizer"):
        run_job(make_config())


def test_constant_weights_are_refused_for_tis_dpo_only(make_config, write_weights, rows) -> None:
    write_weights(rows, statistics={"constant_weights": True})
    with pytest.raises(MismatchError, match="needs token weights that differ"):
        run_job(make_config())
    assert not Path(make_config().output.folder).exists()
    assert run_job(make_config(loss={"name": "dpo"}, optim={"max_steps": 1})).steps == 1


def test_models_that_cannot_be_had_are_one_clear_error(make_config, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    for path, match in {
        str(tmp_path / "empty"): "has no config.json: not a model folder",
        str(tmp_path / "nowhere"): "model.path .* does not exist; give a model folder or a hub id",
        "nobody/no-such-model": r"is not a local folder, and it could not be downloaded from the hub \(revision main\)",
    }.items():
        with pytest.raises(InputError, match=match):
            run_job(make_config(model={"path": path}))


def test_a_model_that_lacks_weights_is_refused(make_config, model_folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "half-model"
    shutil.copytree(model_folder, other)
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights; they would be random: model\.layers\.1\.mlp\.up_proj"):
        run_job(make_config(model={"path": str(other)}))


def test_errors_are_one_line_and_exit_1(settings, capsys) -> None:
    settings["data"]["weights"] = "toy/other"
    assert main(flags_of(settings)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no weight dataset 'toy/other'")
    assert said.count("\n") == 1
    with pytest.raises(NotFoundError):
        main([*flags_of(settings), "--debug"])


def test_wrong_usage_exits_2_and_help_0(capsys) -> None:
    assert main(["--no-such-flag"]) == 2
    assert main(["--help"]) == 0
    assert "--store URI" in capsys.readouterr().out


def test_progress_is_plain_lines_with_the_values_logged(make_config, caplog) -> None:
    result = run_job(make_config())
    shown = [progress for record in caplog.records if (progress := progress_of(record))]
    lines = [record.getMessage() for record in caplog.records if progress_of(record) is None]
    assert lines[0] == "training tis_dpo on toy/tis@0 (40 pairs): 5 steps of 8 pairs"
    assert lines[1].startswith("step-0 gate: 0.000")
    assert lines[2].startswith("before: loss 0.6931  rewards/accuracies ")
    logged = history_of(result.folder)
    assert lines[3].startswith(f"step 1/5  loss {logged[0]['loss']:.4g}  rewards/accuracies ")
    assert lines[7].endswith(" pairs/s")
    assert lines[-1] == f"wrote {result.folder}"
    assert len(lines) == 10
    assert [(progress.name, progress.done, progress.total, progress.unit) for progress in shown] == [
        ("train", 8 * step, 40, "pairs") for step in (1, 2, 3, 4, 5)
    ]


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys, train.run, train.config; train.run.main(['--help']); sys.exit('torch' in sys.modules)"
    started_s = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False, capture_output=True).returncode == 0
    assert time.monotonic() - started_s < 5  # about 0.3 s on an idle core


def test_training_imports_nothing_of_the_pipeline() -> None:
    code = """
import sys
import train.model.collate, train.model.policy, train.data.dataset, train.data.sampler, train.loss.losses, train.loss.metrics
import train.job.output, train.job.progress, train.job.stopping, train.job.trainer, train.run
sys.exit(" ".join({"pipeline", "flows", "vllm", "prefect"} & {name.partition(".")[0] for name in sys.modules}) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
