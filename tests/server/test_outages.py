"""What is around a run goes away while it works: the server, its database, the worker; and runs that meet each other."""

import os
import signal
import time

from tests.server.stack import wait_until
from tests.server.worlds import check_store
from tests.torture import orphans
from weights_store import WeightStore

SLOW = '{"call_s": 1}'
"""Then scoring the small recipe takes twenty seconds or so."""


def _scoring(stack, recipe, store, name, **settings):
    """Start a run and return it as soon as it has committed log-probs."""
    run = stack.start(stack.deploy(name, recipe, store, **settings), name, MADE_UP=SLOW)
    wait_until(lambda: _num_scored(store), "commit")
    return run


def _num_scored(store):
    return sum(table.num_rows() for table in WeightStore(store).tables("logps")) if store.exists() else 0


def test_a_run_survives_a_restart_of_the_server(stack, small_world, small_tables, tmp_path):
    run = _scoring(stack, small_world, tmp_path / "store", "server-restarted", concurrency_limit=1)
    with stack.without("server"):
        time.sleep(5)
    run.completed()
    check_store(tmp_path / "store", small_tables)
    deployment = stack.call("deployments/name/refresh-weights/server-restarted")
    assert deployment["global_concurrency_limit"]["active_slots"] == 0  # or its next run would wait for ever


def test_a_run_survives_twenty_seconds_without_database(stack, postgres, small_world, small_tables, tmp_path):
    run = _scoring(stack, small_world, tmp_path / "store", "no-database")
    postgres.stop()
    try:
        time.sleep(20)
    finally:
        postgres.start()
    run.completed()
    check_store(tmp_path / "store", small_tables)


def test_a_run_goes_on_without_its_worker_and_a_new_worker_takes_the_next_one(
    stack, small_world, small_tables, tmp_path
):
    run = _scoring(stack, small_world, tmp_path / "store", "no-worker")
    with stack.without("worker"):
        run.completed()
        check_store(tmp_path / "store", small_tables)
        run.wait_gone()
    deployment = stack.call("deployments/name/refresh-weights/no-worker")["id"]
    stack.start(deployment, "new-worker").completed()
    check_store(tmp_path / "store", small_tables)


def test_nothing_goes_on_writing_when_worker_and_flow_are_killed_at_once(stack, small_world, small_tables, tmp_path):
    """As the kernel ends a container, whose processes it does not know by name."""
    run = _scoring(stack, small_world, tmp_path / "store", "all-killed")
    flow = run.flow_process()
    with stack.without("worker"):
        os.kill(flow, signal.SIGKILL)
        run.wait_gone()
        num_rows = _num_scored(tmp_path / "store")
        time.sleep(3)  # three calls of the engine
        assert _num_scored(tmp_path / "store") == num_rows
    deployment = stack.call("deployments/name/refresh-weights/all-killed")["id"]
    stack.start(deployment, "after-all-killed").completed()
    check_store(tmp_path / "store", small_tables)


def test_runs_of_the_same_and_of_overlapping_names_share_a_store(stack, small_world, small_tables, tmp_path):
    """Twice the same recipe at once, and once the same pairs under another name of the weights."""
    deployment = stack.deploy("together", small_world, tmp_path / "store")
    other = ("weights.name=toy/other",)
    runs = [stack.start(deployment, f"together-{index}", other if index == 2 else ()) for index in range(3)]
    for run in runs:
        run.completed()
    store = WeightStore(tmp_path / "store")
    ours, others = (store.scan(name).collect().sort("pair_id") for name in ("toy/small", "toy/other"))
    assert others.equals(ours)
    assert [store.table(f"weights/toy/{name}").version() for name in ("small", "other", "uniform")] == [0, 0, 0]
    check_store(tmp_path / "store", {**small_tables, "weights/toy/other": small_tables["weights/toy/small"]})


def test_a_schedule_that_fires_while_the_last_run_works_starts_nothing(stack, small_world, small_tables, tmp_path):
    schedule = {"schedule": {"interval": 5, "timezone": "UTC"}, "active": True}
    limit = {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "CANCEL_NEW"}}
    variables = {orphans.MARK: tmp_path.name, "MADE_UP": SLOW}
    deployment = stack.deploy("scheduled", small_world, tmp_path / "store", variables, schedules=[schedule], **limit)

    def runs(*types):
        wanted = {"deployments": {"id": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": types}}}}
        return stack.call("flow_runs/filter", wanted)

    most = 0

    def has_completed_and_cancelled():
        nonlocal most
        most = max(most, sum("guard.py" in orphans.command_line(pid) for pid in orphans.marked(tmp_path.name)))
        return runs("COMPLETED") and runs("CANCELLED")

    try:
        wait_until(has_completed_and_cancelled, "completed and cancelled run")
    finally:
        stack.call(f"deployments/{deployment}/pause_deployment", {})
    assert most == 1  # each run that builds has one watcher
    assert not runs("FAILED", "CRASHED")
    wait_until(lambda: not runs("RUNNING", "PENDING"), "end of the runs")
    check_store(tmp_path / "store", small_tables)
