"""How `tokenweights build` begins and ends: servers that do not answer or start, signals, and what is left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.torture import orphans

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(toy_pairs, tmp_path, toy_model):
    """A recipe file whose scorer takes a minute for each call."""
    return orphans.write_recipe(tmp_path, toy_model, toy_pairs[:8])


@pytest.fixture
def build(recipe, tmp_path):
    """Return a function that starts a build and waits until it scores. What is left of it is killed at the end."""
    started = []

    def start():
        made_up = json.dumps({"log": str(tmp_path), "call_s": 60})
        arguments = ["build", str(recipe), "--store", str(tmp_path / "store")]
        process = orphans.start(arguments, tmp_path.name, tmp_path, MADE_UP=made_up)
        started.append(process)
        _wait_until((tmp_path / "scored").exists, process, tmp_path / "log")
        assert len(orphans.marked(tmp_path.name)) >= 4  # the build, its watcher, its scorer, Prefect's server
        return process

    yield start
    orphans.kill_marked(tmp_path.name)
    for process in started:
        process.wait(20)


@pytest.mark.parametrize("command", ["build", "serve"])
def test_a_server_that_does_not_answer_is_one_line(recipe, tmp_path, command):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{taken.getsockname()[1]}/api"
        arguments = [command, str(recipe), "--store", str(tmp_path / "store"), "--set", "schedule.interval_s=60"]
        done = _run(arguments, PREFECT_HOME=str(tmp_path), PREFECT_API_URL=f"http://somebody:secret@{place}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the Prefect server at http://{place} cannot be used: ")
    assert "unset PREFECT_API_URL" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_a_server_that_cannot_start_is_one_line(recipe, tmp_path):
    home = tmp_path / "prefect"
    home.mkdir()
    (home / "prefect.db").write_text("no database at all, which no second attempt would change")
    arguments = ["build", str(recipe), "--store", str(tmp_path / "store")]
    done = _run(arguments, PREFECT_HOME=str(home))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the Prefect server could not start: it ended with code 3 (")
    assert "file is not a database" in done.stderr
    assert f"it keeps its database in {home}: set PREFECT_HOME to a folder that can be written" in done.stderr
    assert done.stderr.count("\n") == 1


def _run(arguments, **environment):
    without = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return subprocess.run(
        [sys.executable, "-m", "tokenweights", *arguments],
        cwd=REPO,
        env={**without, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGTERM alone", "SIGKILL alone"])
def test_nothing_is_left_of_a_killed_build(build, tmp_path, kind):
    """To the one process alone, as `kill`, containers and the kernel that wants memory do it."""
    process = build()
    orphans.KILLS[kind](process.pid)
    code = process.wait(60)
    _wait_until(lambda: not orphans.count_left(tmp_path.name, tmp_path / "tmp"), None, tmp_path / "log", timeout_s=10)
    text = (tmp_path / "log").read_text(errors="replace")
    assert "Traceback" not in text
    if "SIGTERM" in kind:
        assert code == 130
        assert "interrupted; what was committed stays, run again to go on" in text


@pytest.mark.slow
def test_a_server_that_dies_ends_the_build_with_one_line(build, tmp_path):
    process = build()
    (server,) = (pid for pid in orphans.marked(tmp_path.name) if "create_app" in orphans.command_line(pid))
    before = (tmp_path / "log").read_text(errors="replace")
    os.kill(server, signal.SIGKILL)
    assert process.wait(30) == 1
    assert not orphans.count_left(tmp_path.name, tmp_path / "tmp")
    said = (tmp_path / "log").read_text(errors="replace").removeprefix(before)
    assert said == "error: the Prefect server ended with code -9; what was committed stays, run again\n"


def _wait_until(is_so, process, log, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert process is None or process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


_LOGGING_RUN = """
from prefect import flow, get_run_logger
from flows.api import server_of_run
with server_of_run():
    flow(lambda: get_run_logger().info("done"), name="logging")()
"""


@pytest.mark.slow
def test_a_server_stops_only_when_it_has_the_logs(tmp_path):
    """Otherwise Prefect tries for a minute to reach a server that is gone, and prints an error for each log."""
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(
        [sys.executable, "-c", _LOGGING_RUN], cwd=REPO, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Error logging to API" not in done.stderr
