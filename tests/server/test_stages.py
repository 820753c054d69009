"""A run is killed, cancelled or loses a child in each stage, on a real server. The tests fill one store, in order."""

import os
import signal
import time

import pytest

from tests.server.stages import ENDED_BEFORE, wait_for_stage
from tests.server.worlds import check_store

_BOTH = [(stage, how) for stage in ENDED_BEFORE for how in ("killed", "cancelled", "trainer killed")]
DISTURBED = [
    (stage, how)
    for stage, how in _BOTH
    if how == "killed" or stage == "contrast" or (stage, how) == ("attribute", "cancelled")
]
AFTER_S = {
    "prepare": 1.0,
    "score": 1.5,
    "contrast": 6.0,
    "attribute": 8.0,
    "anchors": 1.5,
    "publish": 0.05,
    "report": 0.1,
}
"""In the middle of the stage's work on an idle machine. Before or after it a kill must do no harm either."""
CANCELLED_WITHIN_S = 10
"""From the request until the last process is gone."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("disturbed") / "store"


@pytest.fixture(scope="module")
def deployment(stack, large_world, large_tables, store):
    return stack.deploy("disturbed", large_world, store)


@pytest.mark.parametrize(("stage", "how"), DISTURBED)
def test_a_run_that_is_disturbed_ends_with_a_state_that_says_so_and_leaves_no_process(stack, deployment, stage, how):
    run = stack.start(deployment, f"{how.replace(' ', '-')}-in-{stage}")
    wait_for_stage(run, stage)
    time.sleep(AFTER_S[stage])
    if how == "killed":
        os.kill(run.flow_process(), signal.SIGKILL)
        run.wait_gone()
        assert run.wait()["type"] == "CRASHED"
    elif how == "cancelled":
        run.cancel()
        run.wait_gone(CANCELLED_WITHIN_S)
        assert run.wait()["type"] == "CANCELLED"
    else:
        os.kill(run.process("tokenweights train"), signal.SIGKILL)
        state = run.wait()
        assert (state["type"], state["message"].count("\n")) == ("FAILED", 0)
        assert "was killed by signal 9 (out of memory?); what it had done stays" in state["message"]
        run.wait_gone()


def test_the_next_run_goes_on_and_has_every_row_once(stack, deployment, store, large_tables):
    stack.start(deployment, "goes-on").completed()
    check_store(store, large_tables)
