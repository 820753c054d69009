"""A writer is killed at any moment, again and again: readers see whole versions only, and nothing is lost or doubled.

A child works off a plan of appends, replaces and optimizes, and is killed after some milliseconds; the next child finds in the
table how far the last one came. What each version must hold is worked out by a dict.
"""

import multiprocessing
import random
import signal

import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.schemas import LOGPS
from weights_store.tables.compaction import optimize

NUM_KILLS = 60
NUM_STEPS = 24


def plan(step):
    """What one step does: `replace` by four pairs at every eighth, else append two of the last step's pairs and three new."""
    if step % 8 == 7:
        return "replace", [f"p{step}-{index}" for index in range(4)]
    last = [f"p{step - 1}-{index}" for index in range(2)] if step else []
    return "append", [*last, *(f"p{step}-{index}" for index in range(3))]


def contents():
    """What the table holds after each step: `pair_id` -> value."""
    held, found = {}, []
    for step in range(NUM_STEPS):
        kind, pair_ids = plan(step)
        new = dict.fromkeys(pair_ids, float(step))
        held = new if kind == "replace" else {**new, **held}
        found.append(held)
    return found


def rows(pair_ids, value):
    columns = [pair_ids, [[-value] * 200] * len(pair_ids), [[-1.0]] * len(pair_ids), *[[None] * len(pair_ids)] * 4]
    return pa.table(columns, schema=LOGPS)


def work(root, started):
    """Work off the plan from where the table stands; every fifth step optimizes first."""
    table = WeightStore(root).table("logps/toy/x")
    started.send("started")
    done = table.metadata()["step"] if table.exists() else -1
    for step in range(done + 1, NUM_STEPS):
        kind, pair_ids = plan(step)
        if step % 5 == 4:
            optimize(table)
        write = table.replace if kind == "replace" else table.append
        write(rows(pair_ids, float(step)), {"fingerprint": "f", "step": step})


def check_versions(table, first):
    """Assert that each version from `first` on is exactly what its step left, and return the number of versions."""
    expected = contents()
    newest = table.version()
    for version in range(first, (-1 if newest is None else newest) + 1):
        found = table.scan(version).select("pair_id", "chosen_logps").collect().rows()
        assert {values[0] for _, values in found} == {values[-1] for _, values in found}
        held = expected[table.metadata(version)["step"]]
        assert len(found) == len(held)
        assert {pair_id: -values[0] for pair_id, values in found} == held
    return 0 if newest is None else newest + 1


@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    # pyarrow imports pandas on its first conversion: 0.15 s of the 0.3 s at most that a child has, and all of them under load.
    context.set_forkserver_preload(["weights_store.store", "deltalake.transaction", "pandas"])
    return context


def kill_soon(children, root, delay_s):
    """Run the plan in a child for `delay_s` after it has started; return whether it was killed before it was through."""
    receiver, sender = children.Pipe(duplex=False)
    child = children.Process(target=work, args=(root, sender))
    child.start()
    assert receiver.poll(60)
    child.join(delay_s)
    child.kill()  # SIGKILL; nothing where it has ended by itself
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.slow
def test_killed_writers_leave_whole_versions_and_the_plan_comes_to_its_end(tmp_path, children):
    rng = random.Random(0)
    num_kills = num_rounds = 0
    while num_kills < NUM_KILLS:
        root = tmp_path / str(num_rounds)
        table = WeightStore(root).table("logps/toy/x")
        num_versions = 0
        while kill_soon(children, root, rng.uniform(0.0, 0.3)):
            num_kills += 1
            assert num_kills < 5 * NUM_KILLS, "the plan does not come to its end"
            num_versions = check_versions(table, num_versions)
        num_rounds += 1
        check_versions(table, 0)
        assert table.metadata()["step"] == NUM_STEPS - 1
        found = table.scan().select("pair_id", "chosen_logps").collect().rows()
        assert {pair_id: -values[0] for pair_id, values in found} == contents()[-1]
        stray = set(table.location.files()) - {name for v in range(table.version() + 1) for name in table.shards(v)}
        print(f"round {num_rounds}: {num_kills} kills so far, {table.version() + 1} versions, {len(stray)} stray files")
        assert all(batch.num_rows for batch in table.batches())  # every shard of ours agrees with its commit
