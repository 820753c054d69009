"""What `tokenweights status` says of runs that did not go as planned."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Failed, Running

from flows.serve import TAG
from flows.status import _stale, read_status
from weights_store import WeightStore
from weights_store.schemas import WEIGHTS


@flow(name="refresh-weights")
def _flow(recipe_file: str) -> None:
    """Stands for ours: no run of it is started here."""


@pytest.fixture
def deployment(prefect_server, monkeypatch):
    """A deployment of a recipe that is not there."""
    monkeypatch.setattr("flows.api.configured_url", PREFECT_API_URL.value)
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(_flow)
        parameters = {"recipe_file": "not/there.toml"}
        yield client.create_deployment(flow_id=flow_id, name="toy", tags=[TAG], parameters=parameters)


def _run(deployment, *states):
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment)
        for state in states:
            client.set_flow_run_state(run.id, state, force=True)


def test_a_run_that_was_left_out_does_not_hide_how_the_last_one_ended(deployment):
    _run(deployment, Running(), Failed(message="StageError: no pairs; give some\nmore"))
    _run(deployment, Cancelled(message="Deployment concurrency limit reached."))
    (found,) = read_status()
    assert (found.deployment, found.last.state) == ("refresh-weights/toy", "Failed")
    assert found.last.said == "StageError: no pairs; give some"
    assert (found.running, found.next, found.is_stale) == ([], None, None)
    assert "not/there.toml" in found.why
    _run(deployment, Running(), Cancelled(message="by somebody"))
    (found,) = read_status(check_stale=False)
    assert (found.last.state, found.last.said) == ("Cancelled", "by somebody")


def test_a_training_of_somebody_is_looked_at_only_where_the_operator_allows(tmp_path, monkeypatch):
    """Who reaches the API chooses the parameters of a deployment."""
    table = WeightStore(tmp_path / "store").table("weights/hh/head")
    table.append(WEIGHTS.empty_table(), {"fingerprint": "0"})
    config = {
        "data": {"store": str(tmp_path / "store"), "weights": "hh/head"},
        "model": {"path": "model"},
        "loss": {"name": "dpo", "beta": 0.1},
        "optim": {"learning_rate": 1e-4},
        "output": {"folder": str(tmp_path / "policy")},
    }
    assert _stale("train-policy/x", {"config": config}) == (True, "no training on hh/head@0 yet")
    monkeypatch.setenv("TOKENWEIGHTS_ALLOWED", "/data")
    stale, why = _stale("train-policy/x", {"config": config})
    assert stale is None
    assert why.startswith(f"data.store {tmp_path}/store is outside of what the operator allows: /data")
