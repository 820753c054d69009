"""Training on what was pulled, and pushing what was trained."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

import tokenweights
from train.hub.policy import policy_files
from train.job.job import run_job
from weights_store.errors import InputError
from weights_store.fingerprint import fingerprint


def losses(folder: Path) -> list[dict]:
    """Everything that was measured at each step, and before the first one."""
    metrics = json.loads((folder / "metrics.json").read_text())
    steps = [{k: v for k, v in log.items() if k != "data_wait_s"} for log in metrics["history"] if "loss" in log]
    return [json.loads((folder / "lineage.json").read_text())["result"]["before"], *steps]


@pytest.mark.usefixtures("small_groups")
def test_push_pull_train_gives_the_same_losses_to_the_last_bit(hub, write_weights, rows, make_config, tmp_path):
    identity = {"settings": {"weights": {"estimator": "tis"}, "contrast": {}}}
    store = write_weights(rows, fingerprint=fingerprint(identity), identity=identity, parents=[])
    assert tokenweights.main(["push", "toy/tis", "owner/toy", "--store", store]) == 0
    other = str(tmp_path / "other")
    assert tokenweights.main(["pull", "owner/toy", "--store", other]) == 0
    folders = [tmp_path / "trained-here", tmp_path / "trained-there"]
    for uri, folder in zip((store, other), folders, strict=True):
        run_job(make_config(data={"store": uri}, output={"folder": str(folder)}))
    here, there = map(losses, folders)
    assert len(here) == 1 + 5
    assert here == there


@pytest.fixture
def policy(make_config, tmp_path) -> Path:
    """A finished training, with paths of this machine in its records."""
    return run_job(make_config(optim={"max_steps": 1}, output={"keep_checkpoints": True}, lora={"rank": 1})).folder


def test_a_policy_is_pushed_with_its_card_and_without_paths_of_this_machine(hub, policy, tmp_path, capsys):
    (policy / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path / "sft")}))
    assert tokenweights.main(["push", str(policy), "owner/policy"]) == 0
    repository = hub.repository("owner/policy", "model")
    assert repository.is_private
    names = set(repository.files) - {".gitattributes"}
    assert {"README.md", "config.json", "lineage.json", "metrics.json", "model.safetensors"} <= names
    assert not any(name.startswith(("checkpoints", "train.json", ".")) for name in names)
    adapter = json.loads(repository.files["adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"].startswith("…/")
    assert json.loads(repository.files["config.json"]) == {**config, "_name_or_path": f"…/{tmp_path.name}/sft"}
    for name in names - {"lineage.json", "config.json", "adapter/adapter_config.json"}:
        assert repository.files[name] == (policy / name).read_bytes()
    assert not [name for name in names if str(tmp_path).encode() in repository.files[name]]
    recorded, pushed = json.loads((policy / "lineage.json").read_text()), json.loads(repository.files["lineage.json"])
    assert pushed["fingerprint"] == recorded["fingerprint"]
    assert pushed["files"] == {name: sha256(repository.files[name]).hexdigest() for name in names - {"lineage.json"}}
    assert pushed["result"] == recorded["result"]
    assert pushed["config"]["data"]["store"] == f"…/{tmp_path.name}/store"
    assert f"of {policy}" in capsys.readouterr().out
    repository.commit({**repository.files, "NOTES.md": b"read this"})
    (policy / "model.safetensors").rename(policy / "model-00001-of-00001.safetensors")
    (policy / "chat_template.jinja").unlink()  # a template of another policy would be used for this one
    assert tokenweights.main(["push", str(policy), "owner/policy"]) == 0
    assert not {"model.safetensors", "chat_template.jinja"} & set(repository.files)
    assert tokenweights.main(["push", str(policy), str(tmp_path / "copy")]) == 0
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == set(repository.files) - {".gitattributes", "NOTES.md"}
    repository.commit({**repository.files, "README.md": b"my own words"})
    assert tokenweights.main(["push", str(policy), "owner/policy"]) == 1
    assert "owner/policy has a README.md that `tokenweights push` did not write" in capsys.readouterr().err


def test_what_is_no_finished_policy_is_refused(policy, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tokenweights.main(["push", str(policy), "owner/policy", "--licence", "mit"]) == 1
    assert "--licence is for weight datasets" in capsys.readouterr().err
    policy.rename(tmp_path / "moved")
    (tmp_path / "toy").mkdir()
    (tmp_path / "moved").rename(tmp_path / "toy" / "tis")
    assert tokenweights.main(["push", "toy/tis", "owner/policy", "--store", store]) == 1
    assert f"toy/tis is a policy here and a weight dataset in {store}; write ./toy/tis" in capsys.readouterr().err
    weights = tmp_path / "toy/tis/model.safetensors"
    weights.rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"toy/tis has no \*.safetensors: a policy is pushed with all its weights"):
        policy_files(Path("toy/tis"))  # the adapter beside it is not the model that config.json promises
    (tmp_path / "away").rename(weights)
    weights.rename(weights.with_name("model-00001-of-00002.safetensors"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "toy/tis/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        InputError, match=r"toy/tis has no model-00002-of-00002.safetensors: a policy is pushed with all"
    ):
        policy_files(Path("toy/tis"))
    for path in [*tmp_path.glob("toy/tis/*.safetensors*"), *tmp_path.glob("toy/tis/adapter/*.safetensors")]:
        path.unlink()
    with pytest.raises(InputError, match=r"toy/tis has no \*.safetensors: a policy is pushed with all its weights"):
        policy_files(Path("toy/tis"))
    (tmp_path / "toy/tis/lineage.json").unlink()
    with pytest.raises(InputError, match="toy/tis has no lineage.json: the training in it is not finished"):
        policy_files(Path("toy/tis"))
