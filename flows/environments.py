"""`tokenweights doctor-env`: what the interpreters of a build have, and which Prefect server its runs would use."""

from collections.abc import Iterator
from importlib.metadata import version

from flows.api import LEASES, ON_DISK, check_server, configured_url
from pipeline.interpreters import Fact, interpreters_of, look_at
from pipeline.recipe import Recipe
from weights_store.errors import StageError
from weights_store.messages import hide_credentials


def environment_rows(recipe: Recipe | None) -> list[dict[str, str]]:
    """Return one row for each thing that an interpreter has or lacks, those with a problem with what to do about it.

    Raises:
        InputError: The installed distribution does not say what is needed.
    """
    rows = []
    for interpreter in interpreters_of(recipe):
        facts = [Fact("path", interpreter.path), *look_at(interpreter)]
        if interpreter.python is None:
            facts += _of_prefect()
        name = ", ".join(interpreter.uses)
        rows += [{"interpreter": name, **vars(fact)} for fact in facts]
    return rows


def _of_prefect() -> Iterator[Fact]:
    """Yield the server that runs report to. Nothing is started."""
    from prefect.client.orchestration import get_client

    url = configured_url()
    if not url:
        yield Fact("Prefect server", "one of its own for each build", "for deployments: PREFECT_API_URL")
        return
    where = hide_credentials(url)
    try:
        check_server()
    except StageError as error:
        yield Fact("Prefect server", f"{where} does not answer", "", str(error))
        return
    with get_client(sync_client=True) as client:
        yield Fact("Prefect server", f"{where}, Prefect {client.api_version()}", f"as here: {version('prefect')}")
        settings = client.request("GET", "/admin/settings").json()
    leases = settings.get("server", {}).get("concurrency", {}).get("lease_storage", "")
    problem = f"{where}: start it with {LEASES}={ON_DISK}, or what runs hold when it restarts stays taken for ever"
    found = leases.rpartition(".")[2]
    yield Fact("holders of limits", found or "unknown", "not memory", problem if found == "memory" else "")
