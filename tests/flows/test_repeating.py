"""Only what may pass by itself is repeated, and a failed run's first line says what failed and what to do."""

import httpx
import httpx2
import pytest
from prefect import flow, task

from flows.repeating import AGAIN, may_pass
from weights_store.errors import ConflictError, DamageError, EngineError, InputError, KilledError, SettingsError


def _answer(package, status):
    request = package.Request("GET", "https://hub")
    return package.HTTPStatusError("no", request=request, response=package.Response(status, request=request))


def _caused_by(cause):
    error = InputError("the dataset could not be loaded from the hub")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "repeated"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (_caused_by(httpx2.ConnectError("no route")), True),  # the hub's client
        (_caused_by(httpx.ReadTimeout("slow")), True),
        (_caused_by(_answer(httpx2, 503)), True),
        (_caused_by(_answer(httpx2, 429)), True),
        (_caused_by(_answer(httpx2, 404)), False),
        (ConflictError("another build won"), True),
        (KilledError("training was killed by signal 9"), True),
        (EngineError("gave up after four starts"), False),  # has been started again already
        (InputError("no such file"), False),
        (SettingsError("unknown key"), False),
        (DamageError("a flipped byte"), False),
        (FileNotFoundError("gone"), False),
        (ValueError("a bug"), False),
    ],
)
def test_what_is_repeated(error, repeated):
    assert may_pass(error) is repeated


@pytest.mark.parametrize(
    ("error", "num_calls"), [(InputError("dataset.source x.jsonl does not exist; give a file"), 1), (TimeoutError, 4)]
)
def test_prefect_repeats_what_may_pass_and_shows_the_rest_at_once(prefect_server, error, num_calls):
    calls = []

    @task(**{**AGAIN, "retry_delay_seconds": 0})
    def stage():
        calls.append(1)
        raise error

    state = flow(lambda: stage(), name="failing")(return_state=True)
    assert len(calls) == num_calls
    if num_calls == 1:
        first_line = state.message.splitlines()[0]
        assert first_line.endswith(f"InputError: {error}")
