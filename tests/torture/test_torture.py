"""The torture of `make torture`, in a small sample with always the same seed."""

import pytest

from tests.torture.damage_part import run_damages
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


@pytest.mark.slow
def test_a_damaged_file_is_found_or_has_no_effect_on_any_reader(tmp_path):
    result = run_damages(range(100), SEED, tmp_path / "sound", tmp_path, num_processes=1)
    print("\n".join(result.table))
    assert not result.failures, _told(result)


@pytest.mark.slow
def test_kills_at_random_moments_lose_double_and_mix_nothing(tmp_path, monkeypatch):
    # The fork server finds `tests` in the current folder, which flows keep off the path of every process they start.
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    amounts = {"one writer": 30, "three writers": 18, "stages": 8, "concurrent builds": 3}
    result = run_kills(amounts, SEED, tmp_path)
    print("\n".join(result.table))
    assert not result.failures, _told(result)
