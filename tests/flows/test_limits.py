"""One model at a time per GPU, over all runs of a server."""

import threading
from contextlib import contextmanager

import pytest
from prefect.client.orchestration import get_client

from flows import environments, limits
from flows.limits import gpu_limits, held
from pipeline.child import running_model

GPUS = "0, GPU-aa11\n1, GPU-bb22\n2, GPU-ab33\n"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Three GPUs, as the driver's program prints them."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{GPUS}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(limits.socket, "gethostname", lambda: "node7")


@pytest.mark.parametrize(
    ("visible", "num_gpus", "expected"),
    [
        (None, 2, ["0", "1"]),
        (None, 8, ["0", "1", "2"]),
        ("2,0", 1, ["2"]),
        ("GPU-bb,GPU-aa11", 2, ["1", "0"]),
        ("1,GPU-a,0", 3, ["1"]),  # two begin so: as CUDA, nothing from there on
        ("7,0", 2, []),
        ("", 1, []),
        (None, 0, []),
    ],
)
def test_a_process_holds_the_first_gpus_that_it_sees(driver, monkeypatch, visible, num_gpus, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_limits(num_gpus) == [f"gpu node7 {index}" for index in expected]


def test_a_driver_without_a_gpu_shows_none(driver, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\n")
    assert gpu_limits(1) == []


def test_a_gpu_is_held_while_a_model_runs_and_not_before(driver, monkeypatch):
    seen = []

    @contextmanager
    def held(names):
        seen.append(f"take {names}")
        yield
        seen.append(f"give {names}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(limits, "held", held)
    with limits.holding_gpus(1):  # a stage that finds nothing to compute leaves without
        pass
    with limits.holding_gpus(2):
        assert seen == []
        for _ in range(2):  # its process dies, and is started again
            with running_model():
                seen.append("run")
    with running_model():
        seen.append("outside")
    gpus = ["gpu node7 0", "gpu node7 1"]
    assert seen == 2 * [f"take {gpus}", "run", f"give {gpus}"] + ["outside"]


def test_a_second_run_waits_for_the_first(prefect_server):
    order, inside = [], threading.Event()

    def second():
        inside.wait(30)
        with held(["gpu test 0"]):
            order.append("second")

    waiting = threading.Thread(target=second)
    with held(["gpu test 0", "gpu test 1"]):  # both are made
        waiting.start()
        inside.set()
        waiting.join(2)
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"]


def test_a_limit_that_an_operator_has_changed_stays(prefect_server):
    with held(["gpu test 2"]):
        pass
    with get_client(sync_client=True) as client:
        found = client.read_global_concurrency_limit_by_name("gpu test 2")
        assert (found.limit, found.active_slots) == (1, 0)
        client.upsert_global_concurrency_limit_by_name("gpu test 2", 2)
    with held(["gpu test 2"]), held(["gpu test 2"]):  # two small models on one card
        pass


def test_doctor_env_warns_of_a_server_that_forgets_who_holds_a_limit(prefect_server):
    """As it does by default."""
    server, limits_kept = environments._of_prefect()
    assert server.problem == ""
    assert limits_kept.found == "memory"
    assert "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=" in limits_kept.problem
