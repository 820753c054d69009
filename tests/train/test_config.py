from pathlib import Path

import pytest

from train.config import TrainConfig
from train.run import build_parser, load_config
from weights_store.errors import InputError, SettingsError
from weights_store.settings import parse_settings

BASE = """
[data]
store = "s"
weights = "toy/tis@3"
[model]
path = "m"
[loss]
name = "tis_dpo"
beta = 0.1
[optim]
learning_rate = 1e-6
[output]
folder = "o"
"""


@pytest.fixture
def load(tmp_path: Path):
    """Return a function that loads BASE with flags."""
    (tmp_path / "job.toml").write_text(BASE)
    return lambda *flags: load_config(build_parser().parse_args([str(tmp_path / "job.toml"), *flags]))


def test_defaults_are_the_documented_ones(load) -> None:
    config = load()
    assert (config.data.swap, config.data.split, config.data.max_pairs) == (False, "", None)
    assert (config.model.revision, config.model.dtype) == (None, "float32")
    assert config.optim.model_dump() == {
        "learning_rate": 1e-6,
        "num_epochs": 1,
        "max_steps": None,
        "pairs_per_step": 16,
        "tokens_per_batch": None,
        "warmup_share": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "schedule": "linear",
        "seed": 0,
    }
    assert (config.output.save_every_steps, config.output.log_every_steps, config.output.resume) == (None, 10, True)


def test_flags_win_over_set_and_set_over_the_file(load) -> None:
    config = load("--store", "S", "--weights", "w@1", "--model", "M", "--output", "O", "--set", "loss.beta=0.5")
    assert (config.data.store, config.data.weights, config.model.path, config.output.folder) == ("S", "w@1", "M", "O")
    assert config.loss.beta == 0.5
    assert load("--set", "model.path=x", "--model", "M").model.path == "M"


def test_a_home_folder_is_expanded_before_it_is_checked_and_written_to(load, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("--output=~/runs/a").output.folder == str(tmp_path / "runs/a")
    assert load("--output=runs/~a/").output.folder == "runs/~a/"
    with pytest.raises(SettingsError, match="~nobody-here/x: there is no home folder of that name here"):
        load("--output=~nobody-here/x")


def test_flags_alone_are_enough() -> None:
    flags = ["--store", "s", "--weights", "w", "--model", "m", "--output", "o", "--set", "loss.name=sft"]
    config = load_config(build_parser().parse_args([*flags, "--set", "optim.learning_rate=1e-5"]))
    assert config.loss.beta is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.betta=1", "unknown key 'loss.betta'; did you mean 'loss.beta'?"),
        ("loss.name=orpo", "loss.name: Input should be 'dpo', 'ipo', 'tdpo1', 'tdpo2', 'tis_dpo', 'ti_dpo', 'treg'"),
        ("loss.beta=0", "loss.beta: Input should be greater than 0, got 0"),
        ("optim.learning_rate=0", "optim.learning_rate: Input should be greater than 0"),
        ("optim.warmup_share=1.0", "optim.warmup_share: Input should be less than 1"),
        ("model.dtype=float16", "model.dtype: Input should be 'float32' or 'bfloat16'"),
        ("eval.split=train", "data.split is empty, so that eval.split would be trained on"),
        ("eval.best=loss", "eval.best and eval.every_steps need something held out"),
        ("model.quantization=nf4", "model.quantization freezes the model's weights; add a [lora] section"),
    ],
)
def test_wrong_values_are_refused(load, change: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load("--set", change)
    assert message in str(caught.value)


def test_4_bit_weights_cannot_be_split(load) -> None:
    changes = ("--set", "parallel.strategy=fsdp2", "--set", "lora.merge=false", "--set", "model.quantization=nf4")
    with pytest.raises(
        SettingsError, match=r"4-bit weights cannot be split between processes. Set parallel.strategy='ddp'"
    ):
        load(*changes)
    assert load(*changes[2:]).parallel.strategy == "ddp"


@pytest.mark.parametrize("name", ["dpo", "tis_dpo"])
def test_beta_has_no_silent_default(settings, name: str) -> None:
    settings["loss"] = {"name": name}
    with pytest.raises(SettingsError, match="missing key 'loss.beta', for example 0.1; it has no default"):
        parse_settings(TrainConfig, settings, where="here")


def test_config_is_frozen(load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().loss.beta = 1.0


def test_a_missing_file_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"no settings file at nowhere.toml"):
        load_config(build_parser().parse_args(["nowhere.toml"]))
