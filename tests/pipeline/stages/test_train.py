"""How a training job is pinned to a version and started."""

import json

import pyarrow as pa
import pytest

from pipeline.models.launch import Launch
from pipeline.stages import train as stage
from pipeline.stages.train import pinned, train
from train.config import TrainConfig
from train.run import build_parser, load_config
from weights_store import WeightStore
from weights_store.errors import NotFoundError
from weights_store.schemas import WEIGHTS

SECTIONS = {
    "model": {"path": 'models/a "quoted" name'},
    "loss": {"name": "tis_dpo", "beta": 0.3},
    "optim": {"learning_rate": 2e-4, "max_steps": 3},
    "lora": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture
def config(tmp_path):
    """A training on a dataset of three versions."""
    table = WeightStore(tmp_path / "store").table("weights/hh/head")
    for version in range(3):
        row = dict.fromkeys(WEIGHTS.names) | {"pair_id": f"{version:032x}", "split": "train"}
        lists = {name: [] for name in WEIGHTS.names if pa.types.is_list(WEIGHTS.field(name).type)}
        table.append(pa.Table.from_pylist([row | lists | {"pair_weight": 1.0}], WEIGHTS), {"fingerprint": str(version)})
    data = {"store": str(tmp_path / "store"), "weights": "hh/head"}
    output = {"folder": str(tmp_path / "runs/policy")}
    return TrainConfig.model_validate({"data": data, "output": output, **SECTIONS})


@pytest.mark.parametrize(("weights", "version"), [(None, 2), ("hh/head", 2), ("hh/head@0", 0)])
def test_a_training_has_a_version_and_a_folder_for_it(config, tmp_path, weights, version):
    job = pinned(config, weights)
    assert job.data.weights == f"hh/head@{version}"
    assert job.output.folder == f"{tmp_path}/runs/policy@{version}"
    assert pinned(job, job.data.weights) == job  # pinning a pinned one changes nothing


def test_a_version_that_is_not_there_is_refused(config):
    with pytest.raises(NotFoundError, match="hh/head"):
        pinned(config, "hh/head@7")


def test_the_job_gets_every_setting_as_it_is(config, monkeypatch):
    """What the child would parse from its command line is the config that was given."""
    commands = []
    monkeypatch.setattr(stage, "run_child", lambda *call, **options: commands.append((call, options)))
    folder = train(config, Launch(num_processes=2), python="/opt/train/bin/python")
    ((module, arguments, what, python), options) = commands[0]
    assert (module, python, options) == (
        "tokenweights",
        "/opt/train/bin/python",
        {"launcher": Launch(num_processes=2).launcher()},
    )
    assert what == f"training {config.output.folder}"
    assert str(folder) == config.output.folder
    assert arguments[0] == "train"
    parsed = load_config(build_parser().parse_args(arguments[1:]))
    assert parsed == config
    assert json.loads(json.dumps(parsed.lora.target_modules)) == ["q_proj", "v_proj"]
