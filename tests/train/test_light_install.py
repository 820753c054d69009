"""The `train` extra alone is enough to train: no vLLM, no Prefect, no datasets."""

import subprocess

import pytest

HEAVY = ("datasets", "prefect", "vllm", "ray", "trl")


@pytest.mark.slow
def test_the_train_extra_is_enough_for_a_dry_run(light_install, store, model_folder, tmp_path):
    python = light_install("train")
    script = (
        "import sys; from importlib.util import find_spec; print([name for name in sys.argv[1:] if find_spec(name)])"
    )
    done = subprocess.run([str(python), "-P", "-c", script, *HEAVY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n"
    command = [str(python), "-P", "-m", "tokenweights", "train", "--dry-run", "--store", store, "--weights", "toy/tis"]
    command += ["--model", str(model_folder), "--output", str(tmp_path / "out"), "--set", "loss.name=dpo"]
    command += ["--set", "loss.beta=0.1", "--set", "optim.learning_rate=1e-3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pairs" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()
