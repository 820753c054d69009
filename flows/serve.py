"""Serve recipes as Prefect deployments with their schedules, until stopped.

A schedule needs a running server. If `PREFECT_API_URL` is set, that server is used. Otherwise Prefect's own server runs on
loopback until we stop. It uses Prefect's usual database, which keeps the history of runs.
"""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows.api import check_server, running_server
from pipeline.recipe import Recipe
from weights_store.errors import SettingsError, StageError
from weights_store.guard import guard

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

_DEFAULT_PORT = 4200


def serve_recipes(recipes: Mapping[str, Recipe]) -> None:
    """Serve one deployment of `build-weights` for each recipe; return when interrupted.

    Args:
        recipes: The key is the path of the recipe's file. Each recipe needs a `[schedule]`.

    Raises:
        SettingsError: A recipe has no schedule, or two have the same file name.
        StageError: The server did not start, or the one that `PREFECT_API_URL` names cannot be used.
    """
    names = [Path(path).stem for path in recipes]
    if len(set(names)) < len(names):
        raise SettingsError(
            f"two recipes have the same file name, and the deployment is named for it: {', '.join(recipes)}; rename one"
        )
    for path, recipe in recipes.items():
        if recipe.schedule.cron is None and recipe.schedule.interval_s is None:
            raise SettingsError(
                f"{path} has no schedule; add [schedule] with cron or interval_s, or --set schedule.interval_s=3600"
            )
    with _api():
        from prefect import serve

        serve(*[_deployment(name, recipe) for name, recipe in zip(names, recipes.values(), strict=True)])


def _deployment(name: str, recipe: Recipe) -> "RunnerDeployment":
    """Return the deployment of one recipe, with the flow's parameters and the schedule."""
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron, Interval
    from prefect.types.entrypoint import EntrypointType

    from flows.build import build_weights

    schedule = recipe.schedule
    when = (
        Cron(schedule.cron, timezone=schedule.timezone)
        if schedule.cron
        else Interval(float(schedule.interval_s or 0), timezone=schedule.timezone)
    )
    deployment = build_weights.to_deployment(
        name=name,
        parameters={"recipe": recipe.model_dump(mode="json"), "expect_same": False},
        schedules=[when],
        concurrency_limit=1,  # a second build of the same recipe would only wait for the first
        tags=["tokenweights"],
        entrypoint_type=EntrypointType.MODULE_PATH,  # works from any folder
        description=f"Builds {recipe.weights.name} from {recipe.dataset.source}.",
    )
    assert isinstance(deployment, RunnerDeployment), "a coroutine only where an event loop runs"
    deployment.entrypoint = "tokenweights_flows.build_weights"
    return deployment


@contextmanager
def _api() -> Iterator[None]:
    """Start a server unless `PREFECT_API_URL` names one, and stop it at the end."""
    if os.environ.get("PREFECT_API_URL"):
        check_server()
        yield
        return
    guard().mark_environment()  # the server and the runs end with this process
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    environment = {**quiet, **os.environ, "PREFECT_UI_API_URL": url}
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    log = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser() / "tokenweights-serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with running_server(command, url, log, environment):
        os.environ["PREFECT_API_URL"] = url  # before Prefect is imported here; runs inherit it
        print(f"Prefect server: http://127.0.0.1:{port} (log: {log})", flush=True)
        yield


def _free_port() -> int:
    """Return Prefect's usual port if it is free, otherwise another free port."""
    for port in (_DEFAULT_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StageError("no free port on 127.0.0.1 for the Prefect server")
