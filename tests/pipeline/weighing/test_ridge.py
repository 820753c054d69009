"""The regression against numbers by hand and a dense Newton's method that shares nothing with it."""

import math

import numpy as np
import pytest

from pipeline.weighing.ridge import Blocks, Design, fit_ridge


def _dense(num_rows, seed=0, num_columns=12, share=0.3):
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (num_rows, num_columns)) * (rng.random((num_rows, num_columns)) < share)
    x[0], x[1] = 0, 1  # a row without entries, and no column without any
    return x.astype(np.float64)


def _design(x, blocks=None):
    rows, columns = np.nonzero(x)
    return Design(np.bincount(rows, minlength=len(x)), columns, x[rows, columns].astype(np.float32), blocks)


def _blocks(z):
    """Sparse form of `[n, q, d]`."""
    columns, rows = np.nonzero(np.abs(z).sum(2).T)
    return Blocks(rows, np.bincount(columns), z[rows, columns].T.astype(np.float32))


def _newton(x, penalties, num_steps=60):
    theta = np.zeros(x.shape[1])
    for _ in range(num_steps):
        wrong = 1 / (1 + np.exp(x @ theta))
        hessian = (x.T * (wrong * (1 - wrong))) @ x + np.diag(penalties)
        theta = theta + np.linalg.solve(hessian, x.T @ wrong - penalties * theta)
    return theta


def test_one_feature_by_hand():
    # Four pairs with x = 1, of which one is not counted. Slope at theta = log 2: 3 sigmoid(-log 2) = 1 = penalty * log 2.
    design = _design(np.ones((4, 1)))
    fits = np.array([True, True, False, True])
    theta = fit_ridge(design, fits, np.array([1 / math.log(2)]), np.zeros(1), 1e-9)
    assert theta == pytest.approx([math.log(2)], rel=1e-8)


@pytest.mark.parametrize("start", [0.0, 3.0])
def test_the_solution_is_that_of_a_dense_newton_method_and_its_slope_is_zero(start):
    x, rng = _dense(80), np.random.default_rng(1)
    z = rng.normal(size=(80, 3, 2)) * (rng.random((80, 3, 1)) < 0.4)
    whole = np.concatenate([x, z.transpose(0, 2, 1).reshape(80, 6)], axis=1)  # d before q
    penalties = np.concatenate([np.full(12, 0.5), np.full(6, 4.0)])
    fits = rng.random(80) < 0.8
    design = _design(x, _blocks(z))
    assert design.num_features == 18
    theta = fit_ridge(design, fits, penalties, np.full(18, start), 1e-7)
    np.testing.assert_allclose(theta, _newton(whole[fits], penalties), atol=1e-5)
    slope = whole[fits].T @ (1 / (1 + np.exp(whole[fits] @ theta))) - penalties * theta
    assert np.abs(slope).max() < 1e-5


def test_products_are_those_of_the_dense_matrix():
    x = _dense(30, seed=2)
    design, rng = _design(x), np.random.default_rng(3)
    theta, r = rng.normal(size=12), rng.normal(size=30)
    np.testing.assert_allclose(design.dot(theta), x @ theta, atol=1e-12)
    np.testing.assert_allclose(design.transposed_dot(r), x.T @ r, atol=1e-12)
    np.testing.assert_allclose(design.transposed_dot(r, 2), (x**2).T @ r, atol=1e-12)


def test_labels_that_are_all_right_do_not_overflow():
    # Without a penalty theta would be infinite; with a tiny one it is large: n sigmoid(-1000 theta) * 1000 = 1e-9 theta.
    theta = fit_ridge(_design(np.full((5, 1), 1000.0)), np.ones(5, np.bool_), np.array([1e-9]), np.zeros(1))
    assert 0 < theta[0] < 1


def test_nothing_to_learn_gives_zeros():
    empty = Design(np.zeros(3, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert len(fit_ridge(empty, np.ones(3, np.bool_), np.zeros(0), np.zeros(0))) == 0
    balanced = _design(np.array([[1.0], [-1.0]]))
    assert fit_ridge(balanced, np.ones(2, np.bool_), np.ones(1), np.zeros(1)) == pytest.approx([0], abs=1e-12)
