"""Oracle weights of the demo's comparison. `tests/flows/test_build.py` trains its three policies."""

import numpy as np

from pipeline.toy.compare import with_oracle_weights
from pipeline.toy.world import Rewards
from train.data.stored_pairs import Pair, StoredResponse


def test_oracle_weights_are_tis_dpos_formula_of_the_true_rewards():
    """exp(1) for a good token and exp(-0.5) for a bad one, whose reward -1 is clamped; the reciprocals on the rejected side."""
    ones = np.ones(3, np.float32)
    ids = np.array([5, 6, 7], np.int32)
    pair = Pair("0" * 32, np.array([1], np.int32), StoredResponse(ids, ones, -ones), StoredResponse(ids, ones, -ones))
    table = np.zeros((1, 8))
    table[0, 5], table[0, 7] = 1.0, -1.0
    (found,) = with_oracle_weights([pair], Rewards(table))
    np.testing.assert_allclose(found.chosen.token_weights, np.exp([1, 0, -0.5]), rtol=1e-6)
    np.testing.assert_allclose(found.rejected.token_weights, np.exp([-1, 0, 0.5]), rtol=1e-6)
    assert (found.chosen.ref_logps == -1).all()
