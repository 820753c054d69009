"""What a training flow may be given: places that the operator allows, and nothing else."""

import os
import sys

import pyarrow as pa
import pytest

from flows import training
from flows.training import train_policy
from pipeline.models.launch import Launch
from train.config import TrainConfig
from weights_store import WeightStore
from weights_store.errors import InputError
from weights_store.schemas import WEIGHTS


@pytest.fixture
def config(tmp_path):
    """A training on a dataset of one version."""
    row = dict.fromkeys(WEIGHTS.names) | {"pair_id": "0" * 32, "split": "train", "pair_weight": 1.0}
    lists = {name: [] for name in WEIGHTS.names if pa.types.is_list(WEIGHTS.field(name).type)}
    table = WeightStore(tmp_path / "store").table("weights/hh/head")
    table.append(pa.Table.from_pylist([row | lists], WEIGHTS), {"fingerprint": "0"})
    sections = {
        "data": {"store": str(tmp_path / "store"), "weights": "hh/head"},
        "model": {"path": str(tmp_path / "model")},
        "loss": {"name": "dpo", "beta": 0.1},
        "optim": {"learning_rate": 1e-4},
        "output": {"folder": str(tmp_path / "runs/policy")},
    }
    return TrainConfig.model_validate(sections)


@pytest.fixture
def trained(monkeypatch):
    """The trainings that the flow would start, without Prefect's task around them."""
    jobs = []
    monkeypatch.setattr(training, "train_model", lambda job, launch, python: jobs.append((job, launch, python)))
    return jobs


def test_a_training_goes_nowhere_but_where_the_operator_allows(config, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", str(tmp_path))
    train_policy.fn(config, python=sys.executable)
    ((job, launch, python),) = trained
    assert (job.output.folder, launch, python) == (f"{tmp_path}/runs/policy@0", Launch(), sys.executable)
    with pytest.raises(InputError, match="python /bin/sh is none of the interpreters that the operator allows"):
        train_policy.fn(config, python="/bin/sh")
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", os.pathsep.join(f"{tmp_path}/{name}" for name in ("store", "model")))
    with pytest.raises(InputError, match="output.folder .* is outside of what the operator allows"):
        train_policy.fn(config)
    assert len(trained) == 1


def test_the_folder_of_a_version_must_be_allowed_too(config, trained, tmp_path, monkeypatch):
    """It lies beside the folder of the config, and may be a link."""
    allowed = [f"{tmp_path}/{name}" for name in ("store", "model", "runs/policy")]
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", os.pathsep.join(allowed))
    with pytest.raises(InputError, match="output.folder .*/runs/policy@0 is outside"):
        train_policy.fn(config)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/policy@0").symlink_to("/var/tmp")
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", str(tmp_path))
    with pytest.raises(InputError, match=r"output\.folder .*/runs/policy@0 \(/var/tmp\) is outside"):
        train_policy.fn(config)
    assert trained == []
