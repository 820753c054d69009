"""SIGKILL at random moments of the stages that write: prepare, score, publish. `tests/weights_store` does it to the store."""

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

from weights_store import WeightStore
from weights_store.checks.verify import verify

MIN_KILLS = 50


def _recipes(root, model_folder, write_jsonl, language):
    """A dataset of 40 pairs; then one of 50, of which 3 of the first are gone; then another clamp over the same pairs."""
    pairs = language.sample_pairs(50, seed=4)
    recipes = []
    for name, rows, upper in (("first", pairs[:40], 1.5), ("second", pairs[3:], 1.5), ("second", pairs[3:], 0.2)):
        path = root / f"{name}.jsonl"
        write_jsonl(path, [*rows, b"no json"])
        recipes.append(
            {
                "dataset": {"name": "toy", "source": str(path)},
                "model": {"path": str(model_folder)},
                "weights": {"name": "toy/tis-dpo", "upper": upper},
            }
        )
    return recipes


def _rows(uri):
    """Every table's newest rows, sorted by key, whichever versions they took."""
    store = WeightStore(uri)
    tables = [table for kind in ("tokens", "logps", "weights", "quarantine") for table in store.tables(kind)]
    return {table.path: table.scan().collect().sort(table.key).to_dicts() for table in tables}


@pytest.mark.slow
def test_builds_killed_at_random_moments_end_with_the_rows_of_an_undisturbed_one(
    tmp_path, toy_model, write_jsonl, language, monkeypatch
):
    recipes = _recipes(tmp_path, toy_model, write_jsonl, language)
    # The fork server finds `tests` in the current folder, which flows keep off the path of every process they start.
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    context = multiprocessing.get_context("forkserver")
    # pyarrow imports pandas on its first conversion, which would cost every child 0.2 s.
    context.set_forkserver_preload(["tests.pipeline.crashing_build", "pandas"])

    def start(uri):
        from tests.pipeline.crashing_build import build

        settings = [{**recipe, "store": {"uri": str(uri)}} for recipe in recipes]
        process = context.Process(target=build, args=(settings, str(toy_model)))
        process.start()
        return process

    def run(uri):
        process = start(uri)
        process.join(120)
        assert process.exitcode == 0

    run(tmp_path / "warm-up")
    started = time.monotonic()
    run(tmp_path / "undisturbed")
    whole_s = time.monotonic() - started
    expected = _rows(tmp_path / "undisturbed")
    assert len(expected["weights/toy/tis-dpo"]) == 47

    draw, num_kills, trial = random.Random(0), 0, 0
    while num_kills < MIN_KILLS:
        uri = tmp_path / f"killed-{trial}"
        trial += 1
        assert trial < 3 * MIN_KILLS, "the builds are over before they can be killed"
        for _ in range(4):
            process = start(uri)
            time.sleep(draw.uniform(0.02, whole_s))
            process.kill()  # SIGKILL; nothing where it has ended by itself
            process.join(60)
            num_kills += process.exitcode == -signal.SIGKILL
            _assert_versions_are_readable(uri, draw)
        run(uri)
        assert _rows(uri) == expected
        assert list(verify(WeightStore(uri), rows=True)) == []


def _assert_versions_are_readable(uri, draw):
    """The newest version of every table and one older one hold whole rows, each key once."""
    if not Path(uri).exists():
        return
    store = WeightStore(uri)
    tables = [table for kind in ("tokens", "logps", "weights", "quarantine") for table in store.tables(kind)]
    for table in tables:
        newest = table.version()
        for version in () if newest is None else {newest, draw.randint(0, newest)}:
            keys = table.scan(version).select(table.key).collect()
            assert keys.n_unique() == keys.height == sum(record.num_rows for record in table.records(version))
