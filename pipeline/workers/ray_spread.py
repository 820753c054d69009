"""A `Spread` on Ray: each item is a task of its own, on any machine of the cluster.

Ray does a task again whose process or machine has died. The shards that it had written become orphans: only what a task
returns is ever committed, and a task returns once. `tokenweights vacuum` finds orphans.

Not here: how Ray is reached (`ray_cluster.py`), and stages that run a model, whose actors keep it (`on_ray.py`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from pipeline.workers.ray_cluster import as_ours, connected
from weights_store.errors import TokenweightsError
from weights_store.messages import collect_lines, logger
from weights_store.processes.spread import Spread

_log = logger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

TASK_BYTES = 1 << 30
"""Memory that Ray sets aside for a task, which takes one core; on smaller machines all that there is."""
_MAX_RETRIES = 8
"""Of one task, after its process or machine has died."""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "PYTHONSAFEPATH": "1"}


@contextmanager
def ray_spread(address: str | None) -> Iterator[Spread]:
    """Yield a `Spread` on a Ray cluster, or on a local Ray for as long as this lasts; see `ray_cluster.connected`.

    The spread raises the first error of ours that a task raises, and StageError if Ray fails.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingsError: No cluster answers at the address.
        StageError: A cluster answers, but Ray cannot use it; or Ray cannot start here.
    """
    with connected(address):
        yield spread_on_connected_ray


def spread_on_connected_ray(work: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterator[_Result]:
    """Yield the result of each item from the Ray that this process is connected to.

    At most two tasks for each core of the cluster are under way, so that memory is bounded by the cores, not by the items.

    Raises:
        TokenweightsError: A task raised it.
        StageError: Ray failed.
    """
    import ray
    from ray.exceptions import RayError

    there = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    memory = int(min(TASK_BYTES, there))  # a task that asks for more than a machine has would wait for ever
    do = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES, memory=memory, runtime_env={"env_vars": _ENVIRONMENT})(_do)
    said: set[str] = set()
    under_way: deque[Any] = deque()

    def first() -> _Result:
        result, lines = ray.get(under_way.popleft())
        for line in lines:
            if line not in said:  # every process says the same
                said.add(line)
                _log.info(line)
        if isinstance(result, TokenweightsError):
            raise result
        done: _Result = result
        return done

    try:
        shared = ray.put(work)  # once, not with every task
        for item in items:
            while len(under_way) >= 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
                yield first()
            under_way.append(do.remote(shared, item))
        while under_way:
            yield first()
    except RayError as error:
        raise as_ours(error, has_scored=True) from error
    finally:
        if ray.is_initialized():  # else they ended with it, and `cancel` would start or find another Ray
            for task in under_way:
                ray.cancel(task)


def _do(work: Callable[[_Item], _Result], item: _Item) -> tuple[_Result | TokenweightsError, list[str]]:
    """Run in a process of Ray. Our own errors come back as data: Ray would wrap them and add to their message."""
    logged = _logged()
    result: _Result | TokenweightsError
    try:
        result = work(item)
    except TokenweightsError as error:
        result = error
    lines, logged[:] = list(logged), []
    return result, lines


@cache
def _logged() -> list[str]:
    """Return the list that gets what this process of Ray logs; it has no terminal and no parent."""
    lines: list[str] = []
    collect_lines(lines)
    return lines
