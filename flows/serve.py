"""Serve recipes and training configs as Prefect deployments, until stopped.

A recipe becomes `refresh-weights/NAME`, which runs on its schedule, and `build-weights/NAME`, whose settings are a form in
Prefect's page. A training config becomes `train-policy/NAME`. If a recipe served beside it builds the weights that it reads,
`train-policy/NAME` starts by itself on each new version that the doctor finds sound, and `build-and-train/NAME` does both.

A schedule needs a running server. If Prefect's settings name one (`PREFECT_API_URL`, or the profile), that is used. Otherwise
Prefect's own server runs on loopback until we stop. It uses Prefect's usual database, which keeps the history of runs.
"""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.api import DEFAULT_PORT, LEASES, ON_DISK, check_server, configured_url, running_server
from flows.lineage_events import check_client
from pipeline.recipe import Recipe, load_recipe
from train.config import TrainConfig
from weights_store.errors import SettingsError, StageError
from weights_store.names import split_name
from weights_store.processes.guard import guard
from weights_store.settings import kind_of, load_toml, parse_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect import Flow
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

TAG = "tokenweights"
_SERVER = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", LEASES: ON_DISK}
"""Settings of our server."""


def serve(files: "Sequence[str]", overrides: "Sequence[str]" = (), store: str | None = None) -> None:
    """Serve the deployments of recipes and training configs; return when interrupted.

    Args:
        files: TOML files of both kinds. Each recipe needs a `[schedule]`.
        overrides: `section.key=value`, for each recipe.
        store: Instead of `store.uri` of the recipes and `data.store` of the trainings.

    Raises:
        InputError, SettingsError: A file cannot be read or is wrong, a recipe has no schedule, or two files have the same name.
        StageError: The server did not start, or the one that Prefect's settings name cannot be used.
    """
    recipes, trainings = _load(files, overrides, store)
    check_client()
    # Before a server starts: a store with a wrong URI is refused here.
    deployments = list(_deployments(recipes, trainings, {"overrides": [*overrides], "store": store}))
    with _api():
        from prefect import serve as serve_deployments

        serve_deployments(*deployments)


def _load(
    files: "Sequence[str]", overrides: "Sequence[str]", store: str | None
) -> tuple[dict[str, Recipe], dict[str, TrainConfig]]:
    """Return the recipes and the training configs by their file."""
    names = [Path(file).stem for file in files]
    if len(set(names)) < len(names):
        raise SettingsError(
            f"two files have the same name, and deployments are named for it: {', '.join(files)}; rename one"
        )
    recipes, trainings = {}, {}
    for file in files:
        settings = load_toml(file)
        if kind_of(settings).command == "train":
            if store is not None:
                settings["data"] = {**settings.get("data", {}), "store": store}
            trainings[file] = parse_settings(TrainConfig, settings, file)
            continue
        recipe = recipes[file] = load_recipe(file, overrides, store)
        if recipe.schedule.cron is None and recipe.schedule.interval_s is None:
            raise SettingsError(
                f"{file} has no schedule; add [schedule] with cron or interval_s, or --set schedule.interval_s=3600"
            )
    return recipes, trainings


def _deployments(
    recipes: Mapping[str, Recipe], trainings: Mapping[str, TrainConfig], options: Mapping[str, Any]
) -> "Iterator[RunnerDeployment]":
    from flows.build import build_weights, refresh_weights
    from flows.events import when_published
    from flows.training import build_and_train, train_policy, why_not_behind

    for file, recipe in recipes.items():
        what = f"Builds {recipe.weights.name} from {recipe.dataset.source}"
        yield _deployment(
            build_weights, file, f"{what}, with the settings that you give.", {"recipe": _as_json(recipe)}
        )
        yield _deployment(
            refresh_weights,
            file,
            f"{what}, as {file} says when it runs; does nothing when nothing is new.",
            {"recipe_file": file, **options},
            schedules=[_schedule(recipe)],
        )
    for file, config in trainings.items():
        name, _ = split_name(config.data.weights)
        what = f"Trains {config.model.path} on {name}"
        builders = [recipe for recipe in recipes.values() if why_not_behind(config, recipe) is None]
        yield _deployment(
            train_policy,
            file,
            f"{what}: by itself on each sound new version." if builders else f"{what}.",
            {"config": _as_json(config)},
            triggers=[when_published(config.data.store, name)] if builders else [],
        )
        for recipe in builders:
            parameters = {"recipe": _as_json(recipe), "config": _as_json(config)}
            yield _deployment(build_and_train, file, f"Builds {name} and trains on it.", parameters)


def _as_json(settings: Recipe | TrainConfig) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_unset=True)


def _schedule(recipe: Recipe) -> "Schedule":
    from prefect.schedules import Cron, Interval

    schedule = recipe.schedule
    if schedule.cron:
        return Cron(schedule.cron, timezone=schedule.timezone)
    return Interval(float(schedule.interval_s or 0), timezone=schedule.timezone)


def _deployment(
    flow: "Flow[..., Any]", file: str, description: str, parameters: dict[str, Any], **options: Any
) -> "RunnerDeployment":
    """Return a deployment named for a file, of which one run works at a time.

    Of a deployment with a schedule, a run that comes meanwhile is cancelled: the next one finds what it would have found. Runs
    of the others wait.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    when_busy = ConcurrencyLimitStrategy.CANCEL_NEW if "schedules" in options else ConcurrencyLimitStrategy.ENQUEUE
    deployment = flow.to_deployment(
        name=Path(file).stem,
        parameters=parameters,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=when_busy),
        tags=[TAG],
        entrypoint_type=EntrypointType.MODULE_PATH,  # works from any folder
        description=description,
        **options,
    )
    assert isinstance(deployment, RunnerDeployment), "a coroutine only where an event loop runs"
    deployment.entrypoint = f"tokenweights_flows.{flow.fn.__name__}"
    return deployment


@contextmanager
def _api() -> Iterator[None]:
    """Start a server unless Prefect's settings name one, and stop it at the end."""
    if configured_url():
        check_server()
        yield
        return
    from prefect.settings import PREFECT_API_URL, temporary_settings

    guard().mark_environment()  # the server and the runs end with this process
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {**_SERVER, **os.environ, "PREFECT_UI_API_URL": url}
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser() / "tokenweights-serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with running_server(command, url, log, environment), temporary_settings({PREFECT_API_URL: url}):
        os.environ["PREFECT_API_URL"] = url  # runs inherit it
        print(f"Prefect server: http://127.0.0.1:{port} (log: {log})", flush=True)
        yield


def _free_port() -> int:
    """Return Prefect's usual port if it is free, otherwise another free port."""
    for port in (DEFAULT_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StageError("no free port on 127.0.0.1 for the Prefect server")
