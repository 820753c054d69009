"""Trainings as Prefect flows: of one policy, and of a policy behind the build of its weights."""

import os
from pathlib import Path

from prefect import flow, task

from flows.build import build_weights
from flows.limits import holding_gpus
from flows.lineage_events import lineage_of
from flows.repeating import AGAIN
from flows.run_logs import progress_artifacts, run_logs
from pipeline.models.launch import Launch
from pipeline.recipe import Recipe, load_recipe
from pipeline.stages.train import load_training, pinned, train, weights_of
from train.config import TrainConfig, check_places
from weights_store.allowed import TRAIN_PYTHON, check_interpreter_place
from weights_store.errors import SettingsError, StageError
from weights_store.location import Location
from weights_store.names import name_of, split_name


@flow(name="train-policy")
def train_policy(
    config: TrainConfig | str,
    weights: str | None = None,
    launch: Launch = Launch(),  # noqa: B008  (frozen)
    python: str | None = None,
) -> str:
    """Train a policy on one version of its weights, in a folder named for that version; return the folder.

    Args:
        config: The training, or the path of its file, which is read when the flow runs.
        weights: `name@version` instead of the newest version of `data.weights`.
        launch: Processes and machines of the training job.
        python: Interpreter of the training job; None for `TOKENWEIGHTS_TRAIN_PYTHON`, or else this one.

    Raises:
        InputError: A place or an interpreter is outside of what the operator allows.
    """
    with run_logs():
        job = pinned(load_training(config), weights)
        check_places(job)  # its folder too, which is beside that of the config
        return str(train_model(job, launch, _interpreter(python)))


@flow(name="build-and-train")
def build_and_train(
    recipe: Recipe | str,
    config: TrainConfig | str,
    despite_warnings: bool = False,
    launch: Launch = Launch(),  # noqa: B008  (frozen)
    python: str | None = None,
) -> str:
    """Build the weights of a recipe, and train on them if the doctor warns of nothing; return the policy's folder.

    Args:
        recipe: The build, or the path of its file.
        config: The training, or the path of its file. It reads the weights that the recipe builds.
        despite_warnings: Train also if the doctor warns.
        launch: Processes and machines of the training job.
        python: Interpreter of the training job; None for `contrast.python` of the recipe.

    Raises:
        SettingsError: The training reads other weights than the recipe builds, or one version of them.
        StageError: The doctor warns; the weights are published.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    config, python = load_training(config), _interpreter(python or recipe.contrast.python)
    if problem := why_not_behind(config, recipe):
        raise SettingsError(problem)
    result = build_weights(recipe)
    weights = f"{result.published.name}@{result.published.weights.version}"
    warnings = [f"{found.name}: {found}" for found in result.diagnoses if found.severity == "warning"]
    if warnings and not despite_warnings:
        raise StageError(
            f"{weights} was published and not trained on, because the doctor warns. {' '.join(warnings)} Change the recipe, or "
            f"run again with despite_warnings; the page is {result.report}"
        )
    return train_policy(config, weights, launch, python)


@task(name="train", task_run_name="train {job.output.folder}", **AGAIN)
def train_model(job: TrainConfig, launch: Launch, python: str | None) -> Path:
    """Run the training job; one that was killed continues from its last checkpoint."""
    weights = weights_of(job)
    with (
        holding_gpus(launch.num_processes),
        progress_artifacts(["train"], job.data.weights),
        lineage_of("train", name_of(weights.table), [weights, job.model.path]) as outputs,
    ):
        folder = train(job, launch, python)
        outputs.append(str(folder))
        return folder


def _interpreter(python: str | None) -> str | None:
    if python is not None:
        check_interpreter_place("python", python)
    return python or os.environ.get(TRAIN_PYTHON)


def why_not_behind(config: TrainConfig, recipe: Recipe) -> str | None:
    """Return why a training cannot be what comes behind the build of a recipe; None if it can."""
    name, version = split_name(config.data.weights)
    built = recipe.weights.name, Location(recipe.store.uri).absolute_uri
    read = name, Location(config.data.store).absolute_uri
    if built != read:
        return (
            f"the recipe builds {built[0]} in {built[1]}, and the training reads {read[0]} in {read[1]}; make data.weights and "
            "data.store those of the recipe"
        )
    if version is not None:
        return (
            f"the training is on {config.data.weights}, and a build may make another version; set data.weights={name!r}, or "
            "train without a build"
        )
    return None
