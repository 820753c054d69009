"""Which failed tasks are repeated: those that met what may pass by itself, never a wrong setting or a damaged file.

Stages that run a model restart their process themselves (`pipeline/workers/supervise.py`), and libraries that talk to object
stores ask again themselves.
"""

from typing import TYPE_CHECKING, Any

from weights_store.errors import ConflictError, KilledError, causes

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

_BUSY = (408, 425, 429, 500, 502, 503, 504)
"""HTTP status codes of a hub that may answer later."""


def may_pass(error: BaseException) -> bool:
    """Return whether the same call may succeed later: the network or a hub failed, another writer won, a process was killed."""
    return any(isinstance(cause, ConflictError | KilledError) or _is_of_network(cause) for cause in causes(error))


def repeats(task: "Task[..., Any]", task_run: "TaskRun", state: "State[Any]") -> bool:  # noqa: ARG001  (Prefect's signature)
    """Return whether Prefect shall run a failed task again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and may_pass(error)


def _is_of_network(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # By name: Prefect's client and the hub's come with two packages of the same kind, httpx and httpx2.
    is_transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return is_transport or getattr(getattr(error, "response", None), "status_code", None) in _BUSY


AGAIN: dict[str, Any] = {"retries": 3, "retry_delay_seconds": [10, 60, 300], "retry_condition_fn": repeats}
"""Options of a task that is worth repeating."""
