"""Writers of one table that can be killed at any moment, started from a fork server, and what the table must hold then.

Everything that a child imports is imported here, once, by the fork server.
"""

import random
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import pandas  # noqa: F401 - pyarrow imports it on its first conversion, which would cost every child 0.2 s
import pyarrow as pa
from deltalake import transaction  # noqa: F401 - as pandas

from tests.torture.losses import Loss, loss_of
from weights_store import WeightStore
from weights_store.errors import ConflictError
from weights_store.schemas import LOGPS
from weights_store.tables.compaction import optimize
from weights_store.tables.table import Table

TABLE = "logps/toy/x"
NUM_STEPS = 24
NUM_KEYS = 60


def _rows(keys: list[str], value: float) -> pa.Table:
    columns = [keys, [[-value] * 200] * len(keys), [[-value]] * len(keys), *[[None] * len(keys)] * 4]
    return pa.table(columns, schema=LOGPS)


def _values(table: Table, version: int | None) -> list[tuple[str, tuple[float, ...]]]:
    """Return key and values of every row; those of an unharmed row are all the same."""
    rows = table.scan(version).select("pair_id", "chosen_logps", "rejected_logps").collect().rows()
    return [(key, (-chosen[0], -chosen[-1], -rejected[0])) for key, chosen, rejected in rows]


# --- one writer with a plan ------------------------------------------------------------------------------------------------


def _plan(step: int) -> tuple[str, list[str]]:
    """Return what one step does: `replace` by four rows at every eighth, else append two of the last step's and three new."""
    if step % 8 == 7:
        return "replace", [f"p{step}-{index}" for index in range(4)]
    last = [f"p{step - 1}-{index}" for index in range(2)] if step else []
    return "append", [*last, *(f"p{step}-{index}" for index in range(3))]


def _contents() -> list[dict[str, float]]:
    """Return what the table holds after each step: key -> value, worked out by a dict."""
    held: dict[str, float] = {}
    found = []
    for step in range(NUM_STEPS):
        kind, keys = _plan(step)
        new = dict.fromkeys(keys, float(step))
        held = new if kind == "replace" else {**new, **held}
        found.append(held)
    return found


def work_off(root: str, started: Connection) -> None:
    """Work off the plan from where the table stands; every fifth step optimizes first."""
    table = WeightStore(root).table(TABLE)
    started.send("started")
    done = table.metadata()["step"] if table.exists() else -1
    for step in range(done + 1, NUM_STEPS):
        kind, keys = _plan(step)
        if step % 5 == 4:
            optimize(table)
        write = table.replace if kind == "replace" else table.append
        write(_rows(keys, float(step)), {"fingerprint": "f", "step": step})


def loss_of_plan(root: Path, since: int, is_over: bool) -> tuple[Loss, int]:
    """Return what is wrong with the versions from `since` on, of a plan that may be over, and the number of versions."""
    table, contents = WeightStore(root).table(TABLE), _contents()
    newest = table.version()
    num_versions = 0 if newest is None else newest + 1
    loss = Loss()
    for version in range(since, num_versions):
        expected = contents[table.metadata(version)["step"]]
        loss += loss_of(_values(table, version), {key: (value,) * 3 for key, value in expected.items()})
    if is_over:
        expected = contents[-1]
        loss += loss_of(_values(table, None), {key: (value,) * 3 for key, value in expected.items()})
    return loss, num_versions


# --- many writers of the same rows ---------------------------------------------------------------------------------------


def append_all(root: str, started: Connection, number: int) -> None:
    """Append all rows in an order of one's own, a few at a time, with one's number as their value."""
    table, draw = WeightStore(root).table(TABLE), random.Random(number)
    keys = [f"{index:02d}" for index in range(NUM_KEYS)]
    draw.shuffle(keys)
    started.send("started")
    while keys:
        size = draw.randint(1, 6)
        some, keys = keys[:size], keys[size:]
        try:
            table.append(_rows(some, float(number)), {"fingerprint": "f"})
            if draw.random() < 0.2:
                table.open_delta().create_checkpoint()  # which Delta does after every 100 commits
        except ConflictError:  # the others are faster
            keys += some
            time.sleep(draw.random() / 50)


def loss_of_appends(root: Path) -> Loss:
    """Return what is wrong with the table after at least one writer was through: each key once, with the values of one."""
    found = _values(WeightStore(root).table(TABLE), None)
    expected: Mapping[str, tuple[float, ...]] = {key: (values[0],) * 3 for key, values in found}
    return loss_of(found, dict.fromkeys((f"{index:02d}" for index in range(NUM_KEYS)), ()) | expected)
