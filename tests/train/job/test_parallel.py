"""Two processes on CPUs, with gloo over loopback, against one: the same steps, whoever computes them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.torture import orphans
from train.data.dataset import OrderedPairs, PairDataset, open_weights
from train.data.sampler import BlockShuffle
from train.job.arguments import build_batches
from train.job.job import run_job
from train.job.output import OutputFolder
from train.model.collate import PairCollator
from train.model.token_budget import cut_by_tokens

REPO = Path(__file__).parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# On CPUs `accelerate launch --cpu` starts a single process; this is how it starts two.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
Settings = dict[str, dict[str, Any]]


@pytest.fixture
def settings_of_41(settings: Settings, write_weights, rows) -> Settings:
    """41 pairs in steps of 8, so that the last step has one pair and seven fillers; few tokens at a time."""
    write_weights([*rows, {**rows[5], "pair_id": "pair-0040"}])
    settings["optim"]["tokens_per_batch"] = 40
    return settings


def launch(launcher: Sequence[str], *command: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes, without a GPU even where there is one."""
    whole = [sys.executable, *launcher, *command]
    return subprocess.run(whole, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=180, check=False)


def environment(**more: str) -> dict[str, str]:
    """The environment of a launcher on this machine's CPUs."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, "PYTHONPATH": str(REPO), **more}


def write_config(settings: Settings, folder: Path, **changes: dict[str, Any]) -> str:
    """Write a config that trains into `folder`, and return where it is."""
    merged = {name: {**settings.get(name, {}), **changes.get(name, {})} for name in {**settings, **changes}}
    merged["output"]["folder"] = str(folder)
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in part.items()) for name, part in merged.items()
    ]
    path = folder.with_suffix(".toml")
    path.write_text("\n".join(lines))
    return str(path)


def history_of(folder: Path) -> list[float]:
    """All numbers of all steps, one after the other."""
    logs = [log for log in json.loads((folder / "metrics.json").read_text())["history"] if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5, 6]
    return [value for log in logs for name, value in sorted(log.items()) if not name.endswith("_s")]


def assert_same_model(folder: Path, expected: Path) -> None:
    """AdamW divides by the size of a gradient, so rounding shows in the few weights whose gradient is next to nothing."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert tensors[name].dtype == tensor.dtype == torch.bfloat16
        rounding = torch.isclose(tensors[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)
        assert rounding.float().mean() > 0.999, name
        torch.testing.assert_close(tensors[name].float(), tensor.float(), rtol=2**-6, atol=2e-4)


def test_two_processes_with_whole_models_train_as_one_does(settings_of_41, make_config, tmp_path) -> None:
    config = make_config()
    pairs = PairDataset(open_weights(config.data), config.data, vocab_size=128)
    num_batches = []
    for rank in (0, 1):
        steps = build_batches(config, len(pairs), rank=rank, world_size=2)
        ordered = OrderedPairs(pairs, BlockShuffle(pairs.group_sizes, seed=0), steps.num_positions)
        step_pairs = [[ordered[position] for position in positions] for positions in steps]
        sizes = PairCollator().num_tokens
        num_batches.append([len(cut_by_tokens(part, [sizes(pair) for pair in part], 40)) for part in step_pairs])
        assert [pair.is_filler for pair in step_pairs[-1]] == [rank == 1]
    assert num_batches[0] != num_batches[1]  # so one of them has to cut finer than its budget asks

    one = run_job(config)
    done = launch(ACCELERATE, "-m", "tokenweights", "train", write_config(settings_of_41, tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("wrote ") == done.stderr.count("step 6/6") == 1  # the other process says nothing
    assert history_of(tmp_path / "two") == pytest.approx(history_of(one.folder), rel=1e-5, abs=1e-5)
    assert_same_model(tmp_path / "two", one.folder)
    for when in ("before", "after"):
        recorded = json.loads((tmp_path / "two" / "metrics.json").read_text())[when]
        assert recorded == pytest.approx(getattr(one, when), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_two_processes_make_the_token_weights_that_one_does(
    settings_of_41, make_config, write_weights, rows, tmp_path
) -> None:
    weights = {"estimator": "ti", "ti_lambda": 0.7, "sigma_divisor": 4.0, "span": "response"}
    recipe = {"weights": weights, "attribute": {"target": "max_logit"}}
    write_weights([*rows, {**rows[5], "pair_id": "pair-0040"}], recipe=recipe)
    loss = {"name": "ti_dpo", "beta": 0.1, "triplet_gamma": 0, "importance": "online", "refresh_steps": 2}
    one = run_job(make_config(loss=loss))
    done = launch(ACCELERATE, "-m", "tokenweights", "train", write_config(settings_of_41, tmp_path / "two", loss=loss))
    assert done.returncode == 0, done.stderr[-3000:]
    assert history_of(tmp_path / "two") == pytest.approx(history_of(one.folder), rel=1e-4, abs=1e-5)
    assert_same_model(tmp_path / "two", one.folder)


def test_two_processes_with_halves_go_on_after_a_kill_and_train_as_one_does(
    settings_of_41, make_config, tmp_path
) -> None:
    one = run_job(make_config())
    config = write_config(
        settings_of_41, tmp_path / "two", output={"save_every_steps": 2}, parallel={"strategy": "fsdp2"}
    )
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
    killed = launch(TORCHRUN, str(script), str(tmp_path), config)
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-6000:]
    for rank in (0, 1):
        halves = json.loads((tmp_path / f"halves-{rank}.json").read_text())
        assert halves["kinds"] == ["DTensor"]
        assert halves["mine"] == halves["all"] // 2
    checkpoints = sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]  # the latter incomplete

    resumed = launch(TORCHRUN, "-m", "tokenweights", "train", config)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming from checkpoint-2" in resumed.stderr
    # Steps 1 and 2 are of the killed run, the others of the resumed one; one undisturbed process made what is expected.
    assert history_of(tmp_path / "two") == pytest.approx(history_of(one.folder), rel=1e-6, abs=1e-6)
    assert_same_model(tmp_path / "two", one.folder)


# Notes how the model was cut up; both processes die while they write their second checkpoint.
_KILLED = """
import json, os, signal, sys
from pathlib import Path

from transformers import Trainer

import tokenweights
from train.job.trainer import PairTrainer

folder, config = sys.argv[1:]
step_ordinarily, save_ordinarily = PairTrainer.training_step, Trainer._save_optimizer_and_scheduler

def note_halves(self, model, inputs, num_items_in_batch=None):
    parameters = list(model.parameters())
    noted = {
        "kinds": sorted({type(parameter).__name__ for parameter in parameters}),
        "mine": sum(parameter.to_local().numel() for parameter in parameters),
        "all": sum(parameter.numel() for parameter in parameters),
    }
    (Path(folder) / f"halves-{os.environ['RANK']}.json").write_text(json.dumps(noted))
    PairTrainer.training_step = step_ordinarily
    return step_ordinarily(self, model, inputs, num_items_in_batch)

def die_at_step_4(self, checkpoint):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save_ordinarily(self, checkpoint)

PairTrainer.training_step = note_halves
Trainer._save_optimizer_and_scheduler = die_at_step_4
tokenweights.main(["train", config])
"""


def test_only_the_first_process_loads_weights_and_log_probs_are_not_rounded(
    settings_of_41, make_config, tmp_path
) -> None:
    """With adapters of rank 1, of which the second process has no part, in bfloat16."""
    changes = {"model": {"dtype": "bfloat16"}, "lora": {"rank": 1}, "optim": {"max_steps": 2}}
    one = run_job(make_config(**changes))
    split = {"output": {"save_every_steps": 1}, "parallel": {"strategy": "fsdp2"}}
    script = tmp_path / "script.py"
    script.write_text(_NOTED)
    done = launch(
        TORCHRUN, str(script), str(tmp_path), write_config(settings_of_41, tmp_path / "two", **changes, **split)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # To save the model, the first process loads its files once more, and reads which dtypes they have.
    loaded = [(tmp_path / f"devices-{rank}").read_text().split() for rank in (0, 1)]
    assert loaded == [["None", "None", "meta"], ["meta"]]
    first, expected = (
        next(log for log in json.loads((folder / "metrics.json").read_text())["history"] if "loss" in log)
        for folder in (tmp_path / "two", one.folder)
    )
    assert first["loss"] == pytest.approx(expected["loss"], abs=1e-6)  # log-probs rounded to bfloat16 were off by 8e-4
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["before"] == pytest.approx(
        one.before, rel=1e-6, abs=1e-6
    )


# Notes on which device each process loads models; None is the CPU.
_NOTED = """
import os, sys
from pathlib import Path

import tokenweights
import train.model.checkpoint
import train.model.policy

folder, config = sys.argv[1:]
load_ordinarily = train.model.checkpoint.load_checkpoint

def load(path, **options):
    with (Path(folder) / f"devices-{os.environ['RANK']}").open("a") as file:
        print(options.get("device_map"), file=file)
    return load_ordinarily(path, **options)

train.model.policy.load_checkpoint = train.model.checkpoint.load_checkpoint = load
sys.exit(tokenweights.main(["train", config]))
"""


def test_a_step_that_two_processes_cannot_share_ends_both_with_one_error(settings_of_41, tmp_path) -> None:
    config = write_config(settings_of_41, tmp_path / "out", optim={"pairs_per_step": 7})
    done = launch(TORCHRUN, "-m", "tokenweights", "train", config)
    assert done.returncode == 1
    said = "error: optim.pairs_per_step=7 cannot be shared equally by 2 processes; make it a multiple of 2"
    assert done.stderr.count(said) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_modules_in_the_current_folder_are_never_imported(settings_of_41, tmp_path, launcher) -> None:
    """Neither by the processes of the launcher nor by those that read the data (`data.num_workers`)."""
    folder = tmp_path / "project"
    (folder / "datasets").mkdir(parents=True)
    for name in ("train", "pipeline", "flows", "weights_store", "tokenizers", "datasets/__init__"):
        (folder / f"{name}.py").write_text(f"raise RuntimeError('{name} of the current folder was imported')\n")
    config = write_config(settings_of_41, tmp_path / "out", data={"num_workers": 1}, optim={"max_steps": 2})
    done = launch(launcher, "-m", "tokenweights", "train", config, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "lineage.json").is_file()


@pytest.mark.slow
def test_ranks_and_what_they_started_end_with_a_killed_torchrun(settings_of_41, tmp_path) -> None:
    epochs = {"num_epochs": 1000}
    config = write_config(settings_of_41, tmp_path / "out", data={"num_workers": 1}, optim=epochs)
    command = [*TORCHRUN, "-m", "tokenweights", "train", config]
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(
            [sys.executable, *command], env=environment(**{orphans.MARK: tmp_path.name}), stdout=log, stderr=log
        )
    try:
        _wait_until(lambda: "step 3/" in (tmp_path / "log").read_text())
        assert len(orphans.marked(tmp_path.name)) >= 7  # torchrun, and twice a rank, its watcher and its loader
        agent.kill()
        agent.wait(20)
        _wait_until(lambda: not orphans.marked(tmp_path.name), timeout_s=10)
        with OutputFolder(tmp_path / "out").claimed({}, {}, overwrite=True, resume=False):
            pass  # the folder is free again
    finally:
        agent.kill()
        orphans.kill_marked(tmp_path.name)


def _wait_until(is_so: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)
