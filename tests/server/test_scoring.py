"""The scorer of a run on a real server: it is killed, and it ends when the run is cancelled."""

import os
import signal
from pathlib import Path

from tests.server.test_stages import CANCELLED_WITHIN_S
from tests.server.worlds import check_store
from weights_store.processes.guard import RUN


def test_a_killed_scorer_is_started_again(stack, small_world, small_tables, tmp_path):
    deployment = stack.deploy("scorer-killed", small_world, tmp_path / "store")
    run = stack.start(deployment, "scorer-killed", MADE_UP='{"call_s": 0.5}')
    os.kill(run.process("pipeline.workers.process"), signal.SIGKILL)
    run.completed()
    assert "was killed by signal 9" in run.logs()
    check_store(tmp_path / "store", small_tables)


def test_cancelling_ends_a_scorer_in_the_middle_of_a_call_and_everything_marked(
    stack, small_world, tmp_path, record_property
):
    """A mark is what `guard.py` finds processes by, also those that libraries start, if the flow's is killed."""
    deployment = stack.deploy("scorer-cancelled", small_world, tmp_path / "store")
    run = stack.start(deployment, "scorer-cancelled", MADE_UP='{"call_s": 60}')
    run.process("pipeline.workers.process")
    (folder,) = run.tmp.glob("tokenweights-*")
    unmarked = [command for pid, command in run.processes().items() if str(folder) not in _mark(pid)]
    assert sum("guard.py" in command for command in unmarked) == 1  # the watcher itself
    assert len(unmarked) == 2, unmarked  # and the flow's process, which Prefect has started
    run.cancel()
    record_property("seconds until gone", run.wait_gone(CANCELLED_WITHIN_S))
    assert run.wait()["type"] == "CANCELLED"


def _mark(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return next((variable for variable in variables if variable.startswith(f"{RUN}=")), "")
