"""How `tokenweights build` begins and ends: a server that is not there, Ctrl-C and SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline import made_up_scorer

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(make_recipe, toy_pairs, write_jsonl, tmp_path, toy_model):
    """A recipe file whose scorer takes a minute for each call."""
    write_jsonl(tmp_path / "pairs.jsonl", toy_pairs[:8])
    scorer = tmp_path / "python"
    scorer.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{made_up_scorer.__file__}" "$@"\n')
    scorer.chmod(0o755)
    settings = {
        "dataset": {"name": "toy", "source": str(tmp_path / "pairs.jsonl")},
        "model": {"path": str(toy_model)},
        "contrast": {"method": "prompt"},
        "score": {"python": str(scorer)},
        "weights": {"name": "toy/tis"},
        "store": {"uri": str(tmp_path / "store")},
    }
    lines = []
    for section, values in settings.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    return tmp_path / "recipe.toml"


def _environment(tmp_path, **settings):
    without = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return {**without, "PREFECT_HOME": str(tmp_path / "prefect"), "TMPDIR": str(tmp_path / "tmp"), **settings}


@pytest.mark.parametrize("command", ["build", "serve"])
def test_a_server_that_does_not_answer_is_one_line(recipe, tmp_path, command):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{taken.getsockname()[1]}/api"
        environment = _environment(tmp_path, PREFECT_API_URL=f"http://somebody:secret@{place}")
        arguments = [command, str(recipe), "--set", "schedule.interval_s=60"]
        done = subprocess.run(
            [sys.executable, "-m", "tokenweights", *arguments],
            cwd=REPO,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the Prefect server at http://{place} cannot be used: ")
    assert "unset PREFECT_API_URL" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["alone", "group"])
def test_sigterm_ends_a_build_with_its_children_and_its_server(recipe, tmp_path, send):
    """As `kill` and containers send it, to the one process, or as `timeout` does, to its group."""
    log = tmp_path / "build.log"
    (tmp_path / "tmp").mkdir()
    environment = _environment(tmp_path, MADE_UP=json.dumps({"log": str(tmp_path), "call_s": 60}))
    with log.open("wb") as stream:
        build = subprocess.Popen(
            [sys.executable, "-m", "tokenweights", "build", str(recipe)],
            cwd=REPO,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        _wait_until(lambda: (tmp_path / "scored").exists(), build, log)
        assert len(_group(build.pid)) >= 3  # the build, its scorer, Prefect's server
        send(build.pid, signal.SIGTERM)
        assert build.wait(60) == 130
        _wait_until(lambda: not _group(build.pid), None, log)
    finally:
        for pid in _group(build.pid):
            os.kill(pid, signal.SIGKILL)
        build.wait()
    text = log.read_text(errors="replace")
    assert "interrupted; what was committed stays, run again to go on" in text
    assert "Traceback" not in text
    assert [
        path.name for path in (tmp_path / "tmp").iterdir() if path.name.startswith(("tokenweights-", "score-"))
    ] == []


def _wait_until(is_so, process, log, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert process is None or process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


def _group(pgid):
    """Return the processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(group) == pgid and state != "Z":
            found.append(int(stat.parent.name))
    return found
