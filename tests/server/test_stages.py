"""A run is killed, cancelled or loses a child in each stage, on a real server. The tests fill one store, in order."""

import os
import signal
import time

import pytest

from tests.server.stack import wait_until
from tests.server.stages import ENDED_BEFORE, wait_for_stage
from tests.server.worlds import check_store

_BOTH = [(stage, how) for stage in ENDED_BEFORE for how in ("killed", "cancelled", "trainer killed")]
DISTURBED = [
    (stage, how)
    for stage, how in _BOTH
    if how == "killed" or stage == "contrast" or (stage, how) == ("attribute", "cancelled")
]
CHILD = {
    "score": "pipeline.workers.process",
    "contrast": "tokenweights train",
    "attribute": "pipeline.workers.process",
    "anchors": "pipeline.workers.process",
}
"""The process that does the work of a stage, as its command line names it."""
AFTER_S = {"prepare": 1.0, "publish": 0.05, "report": 0.1}
"""After the begin of the stage: in the middle of the work. Before or after it a kill must do no harm either."""
CANCELLED_WITHIN_S = 10
"""From the request until the last process is gone."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("disturbed") / "store"


@pytest.fixture(scope="module")
def deployment(stack, large_world, large_tables, store):
    return stack.deploy("disturbed", large_world, store)


@pytest.mark.parametrize(("stage", "how"), DISTURBED)
def test_a_run_that_is_disturbed_ends_with_a_state_that_says_so_and_leaves_no_process(
    stack, deployment, stage, how, record_property
):
    run = stack.start(deployment, f"{how.replace(' ', '-')}-in-{stage}")
    wait_for_stage(run, stage)
    child = run.process(CHILD[stage]) if stage in CHILD else 0
    time.sleep(AFTER_S.get(stage, 0.5))
    if how == "killed":
        os.kill(run.flow_process(), signal.SIGKILL)
        run.wait_gone()
        assert run.wait()["type"] == "CRASHED"
    elif how == "cancelled":
        run.cancel()
        record_property("seconds until gone", run.wait_gone(CANCELLED_WITHIN_S))
        assert run.wait()["type"] == "CANCELLED"
    else:
        os.kill(child, signal.SIGKILL)
        again = wait_until(lambda: set(run.pids(CHILD[stage])) - {child}, "second trainer")
        assert len(again) == 1
        assert "was killed by signal 9 (out of memory?); what it had done stays" in run.logs()
        run.cancel()
        run.wait_gone(CANCELLED_WITHIN_S)


def test_the_next_run_goes_on_and_has_every_row_once(stack, deployment, store, large_tables):
    stack.start(deployment, "goes-on").completed()
    check_store(store, large_tables)
