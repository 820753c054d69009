"""Limits that a server keeps over all its runs: one model at a time per GPU.

A limit is made when it is first needed; an operator may change it afterwards, for example to let two small models share a GPU.
A run that dies gives its slots back after a minute. A build with a server of its own (`flows/api.py`) holds none: nobody else
asks that server, and nothing there would free what a killed build had held.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.api import is_own_server
from pipeline.child import models_run_inside
from pipeline.dry_run.device import visible_gpus

_LEASE_S = 60
"""The shortest that Prefect allows."""


def gpu_limits(num_gpus: int) -> list[str]:
    """Return the names of the limits of the first GPUs that a process started from here would see; none without a GPU."""
    return [f"gpu {socket.gethostname()} {index}" for index in visible_gpus()[:num_gpus]]


@contextmanager
def held(names: Sequence[str]) -> Iterator[None]:
    """Wait for a slot of each limit, and hold them while inside."""
    if not names or is_own_server():
        yield
        return
    _make(names)
    # A server that does not answer for a while ends no run that computes: then the lease may run out, and be taken by another.
    with concurrency([*names], lease_duration=_LEASE_S, strict=True, raise_on_lease_renewal_failure=False):
        yield


def holding_gpus(num_gpus: int) -> AbstractContextManager[None]:
    """While inside, hold so many GPUs of this machine whenever a model runs: a stage with nothing to compute waits for none."""
    return models_run_inside(lambda: held(gpu_limits(num_gpus)))


def _make(names: Sequence[str]) -> None:
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                with suppress(ObjectAlreadyExists):  # another run was faster
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
