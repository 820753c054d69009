"""The torture of `make torture`, in a small sample with always the same seed."""

import random

import pytest

from tests.torture.damage_part import run_damages
from tests.torture.damages import draw_damage, kind_of
from tests.torture.kill_part import run_kills
from tests.torture.losses import Loss, loss_of

SEED = 0


def _told(result):
    lines = [f"{case}: {text}" for case, text in result.failures]
    return "\n".join([*result.table, *lines, f"repeat one: python -m tests.torture --seed {SEED} --case <case>"])


def test_losses_by_hand():
    expected = {"a": 1, "b": 2, "c": 3}
    assert loss_of([("a", 1), ("b", 2), ("c", 3)], expected) == Loss()
    # b is lost, c is there twice, once with what another wrote, and nobody wrote d
    assert loss_of([("a", 1), ("c", 3), ("c", 2), ("d", 4)], expected) == Loss(lost=1, doubled=1, mixed=2)


FILES = {
    "models/m/contrast.json": b'{"version": 10}',
    "models/m/model.safetensors": bytes(range(64)),
    "reports/toy/tis@0.html": b"<html>",
    "weights/toy/tis/0-a-00000.parquet": bytes(range(64)),
    "weights/toy/tis/1-b-00000.parquet": bytes(range(1, 65)),
    "weights/toy/tis/_delta_log/00000000000000000000.json": b'{"add": {"path": "a", "stats": "{\\"numRecords\\": 3}"}}',
    "weights/toy/tis/_delta_log/00000000000000000001.json": b'{"add": {"path": "b"}}\n{"remove": {"path": "a"}}',
    "weights/toy/tis/_delta_log/_last_checkpoint": b'{"version": 1}',
}


def test_damages_follow_from_the_seed_and_always_change_something():
    drawn = [[draw_damage(random.Random(f"0-{number}"), FILES) for number in range(300)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert all(FILES.get(path) != data for damage in drawn[0] for path, data in damage.change.items())
    newest = "weights/toy/tis/_delta_log/00000000000000000001.json"
    assert not any(newest in damage.change and damage.change[newest] is None for damage in drawn[0])  # an older store
    assert {damage.what.partition(": ")[0] for damage in drawn[0]} == {kind_of(path) for path in FILES}
    assert {damage.table for damage in drawn[0]} == {None, "weights/toy/tis"}


@pytest.mark.slow
def test_a_damaged_file_is_found_or_has_no_effect_on_any_reader(tmp_path):
    result = run_damages(range(40), SEED, tmp_path / "sound", tmp_path, num_processes=1)
    print("\n".join(result.table))
    assert not result.failures, _told(result)


@pytest.mark.slow
def test_kills_at_random_moments_lose_double_and_mix_nothing(tmp_path, monkeypatch):
    # The fork server finds `tests` in the current folder, which flows keep off the path of every process they start.
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    amounts = {"one writer": 12, "three writers": 5, "stages": 4, "concurrent builds": 1}
    result = run_kills(amounts, SEED, tmp_path)
    print("\n".join(result.table))
    assert not result.failures, _told(result)
