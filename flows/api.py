"""The Prefect server that a run reports to: one that runs elsewhere, or the one that Prefect starts with the run."""

import re
from contextlib import suppress

from weights_store.errors import StageError
from weights_store.messages import first_line

_ANSWER_S = 10


def check_server() -> None:
    """Check that the server of Prefect's settings answers, as the client of the flow would ask it.

    Without one in the settings (`PREFECT_API_URL`, or the profile) a run has a server of its own, and nothing is checked.

    Raises:
        StageError: It does not answer, refuses us, or is of another version.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        return
    try:
        with get_client(sync_client=True, httpx_settings={"timeout": _ANSWER_S}) as client:
            problem = client.api_healthcheck()
            if problem is not None:
                raise problem
    except Exception as error:
        where, reason = re.sub("//[^/@]*@", "//", url), first_line(error.__cause__ or error)
        raise StageError(
            f"the Prefect server at {where} cannot be used: {reason}; start it (`prefect server start`), or "
            "unset PREFECT_API_URL: then a build has a server of its own"
        ) from error


def stop_own_server() -> None:
    """Stop the server that Prefect has started with this process, for a caller that exits without unwinding the stack."""
    from prefect.server.api.server import SubprocessASGIServer

    with suppress(OSError):
        SubprocessASGIServer().stop()  # the instance that Prefect's client starts; does nothing if it was not needed
