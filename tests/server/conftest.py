"""PostgreSQL, Prefect's server and a worker: one of each for the tests of this folder. Those on Ray need none of them."""

import os

import pytest

from tests.pipeline.conftest import logged, make_strangers, model  # noqa: F401 - fixtures of the tests on Ray
from tests.server.postgres import Postgres, programs
from tests.server.stack import Stack, environment
from tests.server.worlds import values, write_world

# The server, the worker, a run and its child share few cores; spinning threads would take them from each other.
os.environ.update(OMP_NUM_THREADS="1", POLARS_MAX_THREADS="1")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL here (Debian: apt-get install postgresql)")
    running = Postgres(folder, environment(tmp_path_factory.mktemp("postgres")))
    yield running
    running.close()


@pytest.fixture(scope="session")
def stack(postgres, tmp_path_factory):
    running = Stack(postgres, tmp_path_factory.mktemp("server"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory, toy_model, toy_pairs):
    """A recipe of which only scoring takes time, a second for each call of the engine if the run says so."""
    return write_world(tmp_path_factory.mktemp("small"), toy_model, toy_pairs[:24], is_small=True)


@pytest.fixture(scope="session")
def small_tables(stack, small_world, tmp_path_factory):
    """What the small recipe makes if nobody disturbs it."""
    return _undisturbed(stack, small_world, tmp_path_factory.mktemp("undisturbed") / "small")


@pytest.fixture(scope="session")
def large_world(tmp_path_factory, toy_model, toy_pairs):
    """A recipe that needs every stage."""
    return write_world(tmp_path_factory.mktemp("large"), toy_model, toy_pairs[:24])


@pytest.fixture(scope="session")
def large_tables(stack, large_world, tmp_path_factory):
    """What the large recipe makes if nobody disturbs it."""
    return _undisturbed(stack, large_world, tmp_path_factory.mktemp("undisturbed") / "large")


def _undisturbed(stack, recipe, store):
    stack.start(stack.deploy(f"undisturbed-{store.name}", recipe, store), f"undisturbed-{store.name}").completed()
    return values(store)
