"""Reach a Ray cluster, or start a Ray of our own on this machine; and what Ray's errors mean to a stage.

A Ray of our own listens on the loopback interface alone, asks for a token, reports nothing to anybody and goes with us.
"""

import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weights_store.errors import (
    EngineError,
    MissingExtraError,
    OutOfMemoryError,
    SettingsError,
    StageError,
    TokenweightsError,
)

_OBJECT_STORE_BYTES = 128 << 20
"""Of a Ray of our own: only small things go through it."""
_PATIENCE_S = 10


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Connect to a cluster, or start a Ray of our own, for as long as this lasts; yields whether it is our own.

    Args:
        address: Of a cluster; "local" for a Ray of our own; None for the cluster that Ray finds by itself, else one of our own.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingsError: No cluster answers at the address.
        StageError: One does, but Ray cannot use it; or Ray cannot start here.
    """
    found = _cluster_at_hand() if address in (None, "auto") else address
    is_ours = found == "local" or (found is None and address is None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    settings: dict[str, Any] = {"address": found, "log_to_driver": False, "logging_level": "error"}
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")) if is_ours else None  # sockets need a short path
    if is_ours:
        settings |= {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
        settings["object_store_memory"] = _OBJECT_STORE_BYTES
        # Read when Ray is imported. Without clusters it takes 127.0.0.1 for this machine, and binds its ports there only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
    try:
        ray = _init(settings)
        try:
            yield is_ours
        finally:
            ray.shutdown()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _init(settings: dict[str, Any]) -> Any:
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"score.executor 'ray' needs the package {error.name!r}, which is not installed; pip install 'tokenweights[ray]'"
        ) from error
    if settings["address"] != "local":
        _check_answers(settings["address"])
    try:
        ray.init(**settings)
    except Exception as error:
        raise StageError(f"Ray at {settings['address']} cannot be used: {_last_line(error)}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _check_answers(address: str | None) -> None:
    """Look whether anybody is there, within seconds: Ray's own patience is minutes.

    Raises:
        SettingsError: Nobody is.
    """
    remedy = "set score.ray_address, to 'local' for a Ray of this machine alone"
    if address is None:
        raise SettingsError(f"no Ray cluster has been started here and RAY_ADDRESS is not set; {remedy}")
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 6379), _PATIENCE_S).close()
    except (OSError, ValueError) as error:
        raise SettingsError(f"no Ray cluster answers at {address}: {error}; {remedy}") from error


def _cluster_at_hand() -> str | None:
    """Return the address that Ray would take by itself: the environment's, or what `ray start` has left on this machine."""
    in_environment = os.environ.get("RAY_ADDRESS", "")
    if in_environment not in ("", "auto"):
        return in_environment
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    left = Path(folder, "ray", "ray_current_cluster")
    return left.read_text().strip() if left.exists() else None


def as_ours(error: Exception, has_scored: bool) -> TokenweightsError:
    """Return what an error of Ray's means to the stage that scores.

    Args:
        error: One of Ray's.
        has_scored: Whether anything came back before; if not, actors that die most likely want memory.
    """
    from ray import exceptions

    if isinstance(error, exceptions.RayTaskError) or "creation task" in str(error):
        return StageError(
            f"an actor or task on Ray failed: {_last_line(error)}; every machine needs tokenweights and vLLM, and the paths of "
            "the store and the model"
        )
    if isinstance(error, exceptions.RayActorError | exceptions.WorkerCrashedError | exceptions.OutOfMemoryError):
        text = f"an actor or its machine kept dying (out of memory?): {_last_line(error)}"
        return EngineError(text) if has_scored else OutOfMemoryError(text)
    return EngineError(f"Ray failed: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    """Return the line of a message that says what happened: the last one of the first traceback."""
    lines = str(error).partition("\n\nThe above exception")[0].strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
