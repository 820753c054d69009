"""A Prefect server on PostgreSQL and a worker, as an operator runs them, and runs of our flows on them.

Everything here talks to the server by its REST API, and servers, workers and flows run in the interpreter `FLOWS_PYTHON`
(default: this one), so that the same tests run under another version of Prefect.
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.server.postgres import Postgres, free_port
from tests.torture import orphans
from weights_store.processes.guard import guard, marked_environment

REPO = Path(__file__).resolve().parents[2]
FLOWS_PYTHON = os.environ.get("FLOWS_PYTHON", sys.executable)
POOL = "tokenweights"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
_OURS = ("PREFECT", "TOKENWEIGHTS", "PYTHON")
"""Variables of the process of the tests that what it starts must not get."""


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = 300, every_s: float = 0.1) -> Any:
    """Return what `is_so` returns as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        if found := is_so():
            return found
        assert time.monotonic() < deadline, f"after {timeout_s} s: no {what}"
        time.sleep(every_s)


class Stack:
    """The server and the worker. Both, and all that they start, end with the process of the tests."""

    def __init__(self, postgres: Postgres | None, folder: Path, with_worker: bool = True) -> None:
        """Start both in `folder`. Without a PostgreSQL the server uses its usual SQLite."""
        self.folder, self._port = folder, free_port()
        self.url = f"http://127.0.0.1:{self._port}/api"
        self.environment = environment(folder) | {"PREFECT_API_URL": self.url}
        self._of_server = {
            "PREFECT_UI_ENABLED": "0",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        if postgres is not None:
            self._of_server["PREFECT_API_DATABASE_CONNECTION_URL"] = postgres.url
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start_server()
        if with_worker:
            self.start_worker()
            wait_until(lambda: self._exists(f"work_pools/{POOL}"), "work pool")

    def start_server(self) -> None:
        """Start the server, and return when it answers."""
        arguments = ["server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        self._start("server", arguments, self._of_server)
        wait_until(lambda: self._exists("health"), "answer of the server")

    def start_worker(self) -> None:
        """Start a worker that looks for runs every second, and waits for a database that is away as runs do."""
        arguments = ["worker", "start", "--pool", POOL, "--type", "process", "--name", "worker"]
        self._start(
            "worker", arguments, {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500"}
        )

    def _start(self, name: str, arguments: list[str], more: Mapping[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [FLOWS_PYTHON, "-P", "-m", "prefect", *arguments],
                cwd=self.folder,
                env=self.environment | more,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextmanager
    def without(self, name: Literal["server", "worker"]) -> Iterator[None]:
        """Kill the server or the worker, and start it again at the end."""
        self._end(name)
        try:
            yield
        finally:
            self.start_server() if name == "server" else self.start_worker()

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        """End both, at once: a worker would wait for its runs."""
        for name in list(self._processes):
            self._end(name)

    def log(self, name: str) -> str:
        """Return what the server or the worker has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # --- the API -----------------------------------------------------------------------------------------------------------

    def call(self, path: str, body: object = None, method: str | None = None) -> Any:
        """Call the API: GET without a body, or else POST. Returns the answer's JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}", data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            error.add_note(error.read().decode(errors="replace")[:2000])
            raise
        return json.loads(text) if text else None

    def _exists(self, path: str) -> bool:
        try:
            self.call(path)
        except OSError:
            return False
        return True

    def deploy(
        self, name: str, recipe: Path, store: Path, variables: Mapping[str, str] | None = None, **settings: Any
    ) -> str:
        """Deploy `refresh-weights` for a recipe, as prefect.yaml does, and return the deployment's id.

        `variables` are set in the environment of its runs, and `settings` in the deployment.
        """
        document = yaml.safe_load((REPO / "prefect.yaml").read_text())
        entry = next(entry for entry in document["deployments"] if entry["entrypoint"].endswith(".refresh_weights"))
        declared = entry["work_pool"]["job_variables"]
        job = {**declared, "working_dir": str(self.folder), "env": {**declared["env"], **(variables or {})}}
        deployment = {
            "name": name,
            "flow_id": self.call("flows/", {"name": "refresh-weights"})["id"],
            "entrypoint": entry["entrypoint"],
            "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(self.folder)}}],
            "work_pool_name": POOL,
            "job_variables": job,
            "parameters": {"recipe_file": str(recipe), "overrides": [], "store": str(store)},
            **settings,
        }
        return str(self.call("deployments/", deployment)["id"])

    def start(self, deployment: str, name: str, overrides: tuple[str, ...] = (), **variables: str) -> "Run":
        """Start a run with a mark and a temporary folder of its own in its environment, and other variables."""
        run = Run(self, f"{name}-{os.getpid()}", self.folder / "runs" / name)
        run.tmp.mkdir(parents=True)
        deployed = self.call(f"deployments/{deployment}")
        settings = {**deployed["job_variables"]["env"], orphans.MARK: run.mark, "TMPDIR": str(run.tmp), **variables}
        body: dict[str, object] = {"state": {"type": "SCHEDULED"}, "name": name, "job_variables": {"env": settings}}
        if overrides:
            body["parameters"] = {**deployed["parameters"], "overrides": list(overrides)}
        run.id = self.call(f"deployments/{deployment}/create_flow_run", body)["id"]
        return run


@dataclass
class Run:
    """A run of a deployment."""

    stack: Stack
    mark: str
    tmp: Path
    id: str = field(default="")

    def state(self) -> dict[str, Any]:
        """Return the newest state."""
        return dict(self.stack.call(f"flow_runs/{self.id}")["state"])

    def wait(self, *types: str, timeout_s: float = 300) -> dict[str, Any]:
        """Wait for a state, by default any final one, and return it."""

        def reached() -> dict[str, Any] | None:
            state = self.state()
            return state if state["type"] in (types or FINAL) else None

        try:
            return dict(wait_until(reached, f"state {types or FINAL}", timeout_s))
        except AssertionError as error:
            error.add_note(f"{self.state()}\n{self.logs()}\n{self.stack.log('worker')[-3000:]}")
            raise

    def completed(self) -> None:
        """Wait until it has completed."""
        state = self.wait()
        assert state["type"] == "COMPLETED", f"{state}\n{self.logs()[-6000:]}"

    def logs(self) -> str:
        """Return the log of the run and of the flows that it runs, as the server has it."""
        children = self.stack.call("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [self.id]}}})
        ids = [self.id, *(child["id"] for child in children)]
        wanted = {"logs": {"flow_run_id": {"any_": ids}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.stack.call("logs/filter", wanted))

    def printed(self) -> str:
        """Return what the worker has printed of it. No other run may run."""
        return self.stack.log("worker").partition(f"submitting flow run '{self.id}'")[2]

    def processes(self) -> dict[int, str]:
        """Return the command lines of its processes that run."""
        return {pid: orphans.command_line(pid) for pid in orphans.marked(self.mark)}

    def flow_process(self) -> int:
        """Return the process that runs the flow: the one that no other one of the run has started."""
        pids = orphans.marked(self.mark)
        (top,) = [pid for pid in pids if _parent(pid) not in pids]
        return top

    def pids(self, part: str) -> list[int]:
        """Return its processes whose command lines have a part."""
        return [pid for pid, command in self.processes().items() if part in command]

    def process(self, part: str) -> int:
        """Return its only process whose command line has a part, as soon as there is one."""
        (pid,) = wait_until(lambda: self.pids(part), f"process {part}")
        return pid

    def wait_gone(self, timeout_s: float = 30) -> float:
        """Wait until no process and no temporary file of it is left; return the seconds. The default is for a busy machine."""
        started = time.monotonic()
        while left := self.left():
            assert time.monotonic() < started + timeout_s, f"after {timeout_s} s there is still {left}"
            time.sleep(0.05)
        return time.monotonic() - started

    def cancel(self) -> None:
        """Ask the server to cancel it, as the button does."""
        self.stack.call(f"flow_runs/{self.id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def left(self) -> orphans.Left:
        """Return processes and temporary files that are left of it."""
        return orphans.count_left(self.mark, self.tmp)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def environment(folder: Path) -> dict[str, str]:
    """Return an environment without settings of our own, for processes that end when this one does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **quiet, **marked_environment(guard().folder), "PREFECT_HOME": str(folder / "prefect")}
