"""Connect to a Ray cluster, or start a local Ray on this machine; and what Ray's errors mean to a stage.

The local Ray binds to loopback, asks for a token, sends no usage statistics, and stops with this process.
"""

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import chdir, closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from weights_store.errors import (
    EngineError,
    MissingExtraError,
    OutOfMemoryError,
    SettingsError,
    StageError,
    TokenweightsError,
    causes,
)
from weights_store.processes.guard import Guard


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Connect to a cluster, or start a local Ray, for as long as this lasts; yields whether it is the local one.

    The address "local" is a local Ray; None is the cluster that Ray finds by itself, else a local Ray.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingsError: No cluster answers at the address, or it asks for a token that is not there.
        StageError: A cluster answers, but Ray cannot use it; or Ray cannot start here.
    """
    found = _find_cluster() if address in (None, "auto") else address
    is_local = found == "local" or (found is None and address is None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings: dict[str, object] = {"address": found, "log_to_driver": False, "logging_level": "error"}
    if is_local:
        settings |= {"address": "local", "include_dashboard": False}
        settings["object_store_memory"] = 128 << 20  # bytes; of larger pieces of work, what does not fit goes to disk
        # Read when Ray is imported. Without clusters it takes 127.0.0.1 for this machine, and binds its ports there only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if "ray" not in sys.modules:  # if it is, it has read this already, and asks for a token by itself
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    with closing(Guard("ray-", place="/tmp")) as guard:  # sockets need a short path
        if is_local:
            settings["_temp_dir"] = str(guard.folder)
        else:
            _check_answers(found)
        _init(settings, guard.folder)
        try:
            yield is_local
        finally:
            import ray

            ray.shutdown()


def _init(settings: dict[str, object], empty_folder: Path) -> None:
    """Start Ray in an empty folder: it puts the current one, with a user's own `train.py`, in front of `sys.path`."""
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Ray needs the package {error.name!r}, which is not installed; pip install 'tokenweights[ray]'"
        ) from error
    try:
        with chdir(empty_folder):
            ray.init(**settings)
    except Exception as error:
        if any("AuthenticationError" in str(cause) for cause in causes(error)):
            raise SettingsError(
                f"the Ray cluster at {settings['address']} asks for a token, and got none or another: set RAY_AUTH_MODE=token, "
                "and RAY_AUTH_TOKEN to the cluster's token (by default that of ~/.ray/auth_token on the machine of its head)"
            ) from error
        raise StageError(f"Ray at {settings['address']} cannot be used: {_last_line(error)}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False


def _check_answers(address: str | None) -> None:
    """Raise a `SettingsError` within seconds if no cluster answers; Ray itself would wait for minutes."""
    remedy = "set score.ray_address (verify: --ray), to 'local' for a Ray on this machine alone"
    if address is None:
        raise SettingsError(f"no Ray cluster has been started here and RAY_ADDRESS is not set; {remedy}")
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=10).close()
    except (OSError, ValueError) as error:
        raise SettingsError(f"no Ray cluster answers at {address}: {error}; {remedy}") from error


def _find_cluster() -> str | None:
    """Return the address that Ray would take by itself: the environment's, or the one that `ray start` left here."""
    in_environment = os.environ.get("RAY_ADDRESS", "")
    if in_environment not in ("", "auto"):
        return in_environment
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    left = Path(folder, "ray", "ray_current_cluster")
    return left.read_text().strip() if left.exists() else None


def as_ours(error: Exception, has_scored: bool) -> TokenweightsError:
    """Return what an error of Ray's means to the stage that scores.

    If no chunk came back before (`has_scored`), actors that die probably lack memory.
    """
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError) or "creation task" in str(error):
        return StageError(
            f"an actor or task on Ray failed: {_last_line(error)}; every machine needs tokenweights with what the stage needs, "
            "and the paths of the store and the model"
        )
    if isinstance(error, exceptions.RayActorError | exceptions.WorkerCrashedError | exceptions.OutOfMemoryError):
        text = f"an actor or its machine kept dying (out of memory?): {_last_line(error)}"
        return EngineError(text) if has_scored else OutOfMemoryError(text)
    return EngineError(f"Ray failed: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    """Return the line of a message that says what happened: the last one of the first traceback."""
    lines = str(error).partition("\n\nThe above exception")[0].strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
