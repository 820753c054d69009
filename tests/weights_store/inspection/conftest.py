"""Stores of made-up pairs whose weights follow from their log-ratios, for surveys and planted findings."""

import numpy as np
import pyarrow as pa
import pytest

from weights_store import WeightStore
from weights_store.schemas import LOGPS, SIDES, WEIGHTS

EOS = 2
TIS = {"estimator": "tis", "k": 1.0, "mu": 1.0, "lower": -1.5, "upper": 1.5}


class MadeUp:
    """60 pairs of 4 to 40 response tokens, the last one EOS, other ids from 10; log-ratios (nats) fit the labels weakly."""

    def __init__(self, num_pairs=60, seed=0):
        rng = np.random.default_rng(seed)
        self.pair_ids = [f"{index:032x}" for index in range(num_pairs)]
        self.lengths = {side: rng.integers(4, 41, num_pairs) for side in SIDES}
        self.ids, self.logratios = {}, {}
        for side, shift in zip(SIDES, (0.1, -0.1), strict=True):
            self.ids[side] = [np.append(rng.integers(10, 200, n - 1), EOS) for n in self.lengths[side]]
            self.logratios[side] = [rng.normal(shift, 0.3, n).astype(np.float32) for n in self.lengths[side]]

    def weights(self, side):
        """Weights as `tis` makes them, with a clamp of ±1.5."""
        sign = 1 if side == "chosen" else -1
        return [np.exp(sign * np.clip(each, -1.5, 1.5)) for each in self.logratios[side]]


@pytest.fixture
def made_up():
    return MadeUp()


@pytest.fixture
def write_made_up(tmp_path):
    """Return a function that writes weights, and log-probs unless `logratios` is None, and returns the store."""

    def write(made, *, weights=None, logratios=None, settings=None, num_parts=1, num_prompts=1, **metadata):
        store = WeightStore(tmp_path / "store")
        weights = weights or {side: made.weights(side) for side in SIDES}
        settings = TIS if settings is None else settings
        metadata = {"fingerprint": "w", "identity": {"settings": {"weights": settings}}, "parents": [], **metadata}
        for number in range(1, num_prompts + 1) if logratios else ():
            for model, sign in (("positive", 0.5), ("negative", -0.5)):
                role = f"{model}{'' if number == 1 else number}_logps"
                halves = {side: [sign * number * each - 1 for each in logratios[side]] for side in SIDES}
                columns = {f"{side}_logps": halves[side] for side in SIDES}
                parent = _append(store.table(f"logps/toy/{role.removesuffix('_logps')}"), LOGPS, made, columns, 1)
                metadata["parents"].append({"role": role, **parent.as_parent()})
        columns = {f"{side}_ids": made.ids[side] for side in SIDES}
        columns |= {f"{side}_token_weights": weights[side] for side in SIDES}
        columns |= {f"{side}_ref_logps": [np.full(n, -1.0) for n in made.lengths[side]] for side in SIDES}
        columns |= {"prompt_ids": [[1]] * len(made.pair_ids), "pair_weight": [1.0] * len(made.pair_ids)}
        columns["split"] = ["train"] * len(made.pair_ids)
        _append(store.table("weights/toy/weights"), WEIGHTS, made, columns, num_parts, metadata)
        return store

    return write


def _append(table, schema, made, columns, num_parts, metadata=None):
    """Write every `num_parts`-th pair per version, so that key ranges of the shards overlap."""
    for part in range(num_parts):
        rows = {"pair_id": made.pair_ids[part::num_parts]}
        rows |= {
            name: [np.asarray(value).tolist() for value in values[part::num_parts]] for name, values in columns.items()
        }
        full = {field.name: rows.get(field.name, [None] * len(rows["pair_id"])) for field in schema}
        reference = table.append(pa.table(full, schema), metadata or {"fingerprint": f"{table.path} {part}"})
    return reference
