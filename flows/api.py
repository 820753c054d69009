"""The Prefect server that a run reports to: one that runs elsewhere, or one that we start and stop with the run.

Prefect would start one by itself: on a port that somebody else may take first, again and again if it cannot start, and it
outlives a killed build. Ours is guarded (`weights_store/processes/guard.py`), and if it ends, the run ends with one line.
"""

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.child import leave
from weights_store.errors import StageError
from weights_store.messages import first_line
from weights_store.processes.guard import guard

_ANSWER_S, _START_S, _STOP_S = 10, 180, 5
DEFAULT_PORT = 4200
"""Prefect's own."""
LEASES, ON_DISK = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "prefect.server.concurrency.lease_storage.filesystem"
"""Where a server has who holds a limit. By default in memory: what is held when it ends then stays taken for ever."""
_ATTEMPTS = 3
_FIRST_USE = re.compile("database is locked|already exists|UNIQUE constraint")
"""Errors of servers that prepare the same new database at the same time; the second attempt finds it ready."""
_own_servers: list[str] = []
"""The address of the server that this process has started for its run."""
_ERROR = re.compile(r"^[\w.]*(?:Error|Exception)\b.*", re.MULTILINE)
_SERVE = """
import socket, sys
import uvicorn
from prefect.server.api.server import create_app
server = uvicorn.Server(uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on"))
server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
sys.exit(0 if server.started else 3)
"""
"""As Prefect starts its own, but with a socket of ours: nobody can take the port meanwhile."""


def _nothing() -> None:
    """Do nothing: the default of what is done meanwhile."""


def check_server() -> None:
    """Check that the server of Prefect's settings answers, as the client of the flow would ask it.

    Without one in the settings (`PREFECT_API_URL`, or the profile) a run has a server of its own, and nothing is checked.

    Raises:
        StageError: It does not answer, refuses us, or is of another version.
    """

    if url := configured_url():
        _check_answer(url, "unset PREFECT_API_URL: then a build has a server of its own")


@contextmanager
def server_to_ask() -> Iterator[None]:
    """Have the server of Prefect's settings inside, or else the one that `tokenweights serve` has started on this machine.

    Raises:
        StageError: It does not answer, refuses us, or is of another version.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = configured_url() or f"http://127.0.0.1:{DEFAULT_PORT}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        _check_answer(url, "set PREFECT_API_URL to one that runs")
        yield


def _check_answer(url: str, otherwise: str) -> None:
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_S}) as client:
            problem = client.api_healthcheck()
            if problem is not None:
                raise problem
    except Exception as error:
        where, reason = re.sub("//[^/@]*@", "//", url), first_line(error.__cause__ or error)
        raise StageError(
            f"the Prefect server at {where} cannot be used: {reason}; start it (`prefect server start`), or {otherwise}"
        ) from error


@contextmanager
def server_of_run(meanwhile: Callable[[], object] = _nothing) -> Iterator[bool]:
    """Have a server for the runs inside, and yield whether it is our own: one without UI and services.

    `meanwhile` is called while our own starts, which takes seconds, or before the runs of another one.

    Raises:
        StageError: Our own could not be started.
    """
    if configured_url():
        meanwhile()
        yield False
        return
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        quiet = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        environment = {**os.environ, **get_current_settings().to_environment_variables(exclude_unset=True), **quiet}
        command = [sys.executable, "-P", "-c", _SERVE, str(listening.fileno())]
        log = guard().folder / "prefect-server.log"
        with (
            running_server(command, url, log, environment, [listening.fileno()], meanwhile),
            temporary_settings({PREFECT_API_URL: url}),
        ):
            _own_servers.append(url)
            try:
                yield True
            finally:
                _own_servers.remove(url)
                _deliver()


def is_own_server() -> bool:
    """Return whether the runs of this process report to a server that ends with them."""
    return bool(_own_servers)


def _deliver() -> None:
    """Send the logs and events that wait: without a server, Prefect would try again for a minute before this process ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=_STOP_S)


@contextmanager
def running_server(
    command: Sequence[str],
    url: str,
    log: Path,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    meanwhile: Callable[[], object] = _nothing,
) -> Iterator[None]:
    """Run a server while inside. If it ends meanwhile, this process ends with one line.

    Args:
        command: Starts the server.
        url: Where its API answers.
        log: Its output.
        environment: All of its environment.
        pass_fds: Descriptors that it inherits.
        meanwhile: Is called while it starts.

    Raises:
        StageError: It ended before it answered, or did not answer in time.
    """
    server = _start(command, url, log, environment, pass_fds, meanwhile)
    stopping = threading.Event()

    def watch() -> None:
        code = server.wait()
        if not stopping.is_set():
            leave(
                1, f"error: the Prefect server {_ended(code, log)}; what was committed stays, run again", was_told=False
            )

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        stopping.set()
        _stop(server)


def _start(
    command: Sequence[str],
    url: str,
    log: Path,
    environment: Mapping[str, str],
    pass_fds: Sequence[int],
    meanwhile: Callable[[], object],
) -> "subprocess.Popen[bytes]":
    for attempt in range(1, _ATTEMPTS + 1):
        with log.open("wb") as stream:
            # Its own session: Ctrl-C must not reach it before the run, which still has to report.
            server = subprocess.Popen(
                command, env=environment, pass_fds=pass_fds, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            meanwhile()
        except BaseException:
            _stop(server)
            raise
        problem = _why_not(url, server, log)
        if problem is None:
            return server
        _stop(server)
        if attempt == _ATTEMPTS or not _FIRST_USE.search(problem):
            break
    home = environment.get("PREFECT_HOME", "~/.prefect")
    raise StageError(
        f"the Prefect server {problem}; it keeps its database in {home}: set PREFECT_HOME to a folder that can be written, or "
        "PREFECT_API_URL to a server that runs"
    )


def _why_not(url: str, server: "subprocess.Popen[bytes]", log: Path) -> str | None:
    """Wait until a server answers and return None, or what happened instead."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        code = server.poll()
        if code is not None:
            return f"could not start: it {_ended(code, log)}"
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=_ANSWER_S):
            return None
        time.sleep(0.1)
    return f"was not ready after {_START_S} s"


def _ended(code: int, log: Path) -> str:
    """Return how a server ended, with the last error in its log."""
    errors: list[str] = []
    with suppress(FileNotFoundError):  # this process is ending too
        errors = _ERROR.findall(log.read_text(encoding="utf-8", errors="replace"))
    return f"ended with code {code}" + (f" ({' '.join(errors[-1].split())})" if errors else "")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def configured_url() -> str | None:
    """Return the API of the server that Prefect's settings name: `PREFECT_API_URL`, or the profile."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url
