"""Stage train: a policy on one pinned version of a weight dataset, by the training job as a child process.

The job itself is `tokenweights train` (`train/`). Here is how it is started; the trainings of a contrastive pair start it too.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.child import check_extra, run_child, running_model
from pipeline.models.launch import Launch
from train.config import TrainConfig, check_places
from weights_store import TableVersion, WeightStore
from weights_store.messages import logger
from weights_store.names import name_of, split_name
from weights_store.settings import load_toml, parse_settings

_log = logger(__name__)


def load_training(config: TrainConfig | Mapping[str, Any] | str) -> TrainConfig:
    """Return a training config that somebody gives: checked, by section and key, or as the path of its file.

    Raises:
        InputError: There is no such file, or the config names a place that the operator does not allow.
        SettingsError: A key is unknown, missing or wrong.
    """
    if not isinstance(config, TrainConfig):
        settings, where = (load_toml(config), config) if isinstance(config, str) else (config, "config")
        config = parse_settings(TrainConfig, settings, where)
    check_places(config)
    return config


def pinned(config: TrainConfig, weights: str | None = None) -> TrainConfig:
    """Return the config with the version of its weights, and with an output folder of its own for that version.

    `runs/a` becomes `runs/a@3` for version 3, so that trainings on two versions never share a folder. A second training on the
    same version finds it finished.

    Args:
        config: The training.
        weights: What is trained on instead of `data.weights`: `name` or `name@version`.

    Raises:
        NotFoundError: No such store, dataset or version.
        SettingsError: The name is malformed.
    """
    reference = weights_of(config, weights)
    at_version = f"@{reference.version}"
    data = config.data.model_copy(update={"weights": name_of(reference.table) + at_version})
    folder = config.output.folder.rstrip("/")
    output = config.output.model_copy(update={"folder": folder.removesuffix(at_version) + at_version})
    return config.model_copy(update={"data": data, "output": output})


def weights_of(config: TrainConfig, weights: str | None = None) -> TableVersion:
    """Return the version of the weight dataset that a training reads, the newest if it names none.

    Raises:
        NotFoundError: No such store, dataset or version.
        SettingsError: The name is malformed.
    """
    return WeightStore(config.data.store).resolve(*split_name(weights or config.data.weights))


def train(config: TrainConfig, launch: Launch, python: str | None = None) -> Path:
    """Run a training job to its end and return its output folder; a finished job does nothing.

    Args:
        config: The job.
        launch: Its processes and machines.
        python: The interpreter of the job; None for this one.

    Raises:
        KilledError: A signal ended it; another call continues from its last checkpoint.
        MissingExtraError: torch is not installed here, and no other interpreter is named.
        StageError: It failed; carries its message.
    """
    check_extra("torch", python)
    sections = config.model_dump(exclude_none=True).items()
    options = set_options({f"{section}.{key}": value for section, keys in sections for key, value in keys.items()})
    run_training(options, config.output.folder, launch, python)
    return Path(config.output.folder)


def run_training(options: Sequence[str], folder: str | Path, launch: Launch, python: str | None) -> None:
    """Run `tokenweights train` with options that name all it needs; say how to start it on further machines, and wait for them.

    Raises:
        KilledError, StageError: See `train`.
    """
    arguments = ["train", *options]
    for machine in range(1, launch.num_machines):
        command = shlex.join(["python", *launch.launcher(machine), "-m", "tokenweights", *arguments])
        _log.info(
            f"waiting for machine {machine + 1} of {launch.num_machines}; start there, in {Path.cwd()}: {command}"
        )
    with running_model():
        run_child("tokenweights", arguments, f"training {folder}", python, launcher=launch.launcher())


def set_options(settings: Mapping[str, object]) -> list[str]:
    """Return `--set` options for `tokenweights train`, by key (`section.name`)."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
