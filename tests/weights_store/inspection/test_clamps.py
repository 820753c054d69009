import numpy as np
import pytest

from weights_store.inspection.clamps import clamped

EDGES = np.array([-2, -0.5, -0.49, 0, 1.49, 1.5, 3], np.float32)
CLAMP = {"lower": -0.5, "upper": 1.5}
TIS = {"estimator": "tis", "k": 1.0, "mu": 1.0, **CLAMP}


def ends(settings, side="chosen", logratios=EDGES, weights=None, **statistics):
    metadata = {"identity": {"settings": {"weights": settings}}, "statistics": statistics}
    found = clamped(metadata, side, np.ones(len(EDGES), np.float32) if weights is None else weights, logratios)
    return None if found is None else found.tolist()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_tis_clamps_the_log_ratio_on_both_sides(side):
    assert ends(TIS, side) == [-1, -1, 0, 0, 0, 1, 1]


def test_reversed_clamps_minus_the_log_ratio():
    assert ends({**TIS, "estimator": "reversed"}) == [1, 0, 0, 0, -1, -1, -1]


def test_scores_are_scaled_first():
    # Twice the log-ratio: -4 -1 -0.98 0 2.98 3 6; a tenth of it: -0.2 .. 0.3.
    assert ends({**TIS, "scale": 2.0}) == [-1, -1, -1, 0, 1, 1, 1]
    assert ends({**TIS, "spread": 0.3}, spread={"tis": {"std": 3.0, "scale": 0.1}}) == [0] * 7
    assert ends({**TIS, "scale": "calibrated"}, held_out={"tis": {"scale": 0.1}}) == [0] * 7


@pytest.mark.parametrize(
    ("estimator", "side", "expected"),
    [
        ("threshold_and_scale", "chosen", [-1, -1, 0, 0, 0, 1, 1]),
        ("threshold_and_scale", "rejected", [1, 0, 0, 0, -1, -1, -1]),  # z is minus the log-ratio there
        ("threshold", "chosen", [-1, -1, -1, -1, 0, 1, 1]),  # weights are at least 0
        ("origin", "rejected", [0, 0, 0, -1, -1, -1, -1]),
    ],
)
def test_the_release_clamps_in_the_direction_of_the_side(estimator, side, expected):
    assert ends({"estimator": estimator, **CLAMP}, side) == expected


def test_the_weight_tells_where_scores_are_not_stored():
    head = {"estimator": "head", "k": 2.0, "mu": 0.5, "lower": -1.0, "upper": 1.0}
    low, high = 2 * np.exp(-0.5), 2 * np.exp(0.5)
    weights = np.array([low, low * (1 + 2**-13), low * 1.01, 2, high * 0.99, high * (1 - 2**-13), high], np.float32)
    assert ends(head, "chosen", None, weights) == [-1, -1, 0, 0, 0, 1, 1]
    assert ends(head, "rejected", None, weights) == [1, 1, 0, 0, 0, -1, -1]
    assert ends({**head, "transforms": ["mean_one"]}, "chosen", None, weights) is None


def test_without_a_clamp_or_log_ratios_nothing_is_known():
    assert ends({"estimator": "rank_based", "min_weight": 0.7, "max_weight": 1.3}) is None
    assert ends(TIS, logratios=None) is None
    assert ends({}) is ends({"estimator": "head"}) is ends({"estimator": "tis"}) is None
