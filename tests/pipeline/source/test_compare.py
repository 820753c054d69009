import pyarrow as pa
import pytest

from pipeline.source.compare import compared_ranges
from pipeline.source.external_sort import ExternalSort
from pipeline.source.intake import PAIRS
from weights_store import WeightStore
from weights_store.schemas import TOKENS

SCORES = {5: {"chosen_score": 2.5}}
SOURCE = [("f", 5), ("c", 0), ("a", 1), ("d", 2), ("b", 3), ("a", 4)]


@pytest.fixture
def tokens(tmp_path):
    """A version that has a from row 1, b from row 9, e from row 4, and f from row 5 without scores."""
    rows = [
        {
            "pair_id": pair_id,
            "prompt": "[]",
            **{name: [1] for name in ("prompt_ids", "chosen_ids", "rejected_ids")},
            "source_row": row,
            "split": "train",
        }
        for pair_id, row in (("a", 1), ("b", 9), ("e", 4), ("f", 5))
    ]
    table = WeightStore(tmp_path / "store").table("tokens/toy-1")
    table.append(pa.Table.from_pylist(rows, TOKENS), {"fingerprint": "0" * 64})
    return table


def _compare(tokens, version, max_bytes):
    rows, gone = [], []
    with ExternalSort(PAIRS, "pair_id", "source_row", max_bytes=max_bytes) as pairs:
        for pair_id, row in SOURCE:
            pairs.add(
                pa.Table.from_pylist(
                    [{"pair_id": pair_id, "source_row": row, "split": "train", "pair": "{}", **SCORES.get(row, {})}],
                    PAIRS,
                )
            )
        for part in compared_ranges(pairs, tokens, version):
            rows += part.rows.select("pair_id", "source_row", "standing").rows()
            gone += part.gone.to_list()
    return rows, gone


@pytest.mark.parametrize("max_bytes", [None, 60])
def test_every_pair_stands_as_its_first_row_does(tokens, max_bytes):
    rows, gone = _compare(tokens, 0, max_bytes)
    found = [
        ("a", 1, "stays"),
        ("a", 4, "duplicate"),
        ("b", 3, "moved"),
        ("c", 0, "new"),
        ("d", 2, "new"),
        ("f", 5, "moved"),
    ]
    assert rows == found
    assert gone == ["e"]


def test_without_a_version_every_pair_is_new(tokens):
    rows, gone = _compare(tokens, None, None)
    assert [standing for _, _, standing in rows] == ["new", "duplicate", "new", "new", "new", "new"]
    assert gone == []
