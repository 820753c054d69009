import random
from itertools import pairwise

import pyarrow as pa
import pytest

from pipeline.source.external_sort import ExternalSort
from weights_store.processes.guard import guard

SCHEMA = pa.schema([("pair_id", pa.string()), ("source_row", pa.int64())])


def _filled(max_bytes, num_rows=5000, seed=0):
    """A sort over `num_rows` rows with about three rows to a pair_id, added 70 at a time."""
    draw = random.Random(seed)
    rows = [(f"{draw.randrange(num_rows // 3):06x}", index) for index in range(num_rows)]
    sort = ExternalSort(SCHEMA, "pair_id", "source_row", max_bytes=max_bytes)
    for start in range(0, num_rows, 70):
        ids, numbers = zip(*rows[start : start + 70], strict=True)
        sort.add(pa.table({"pair_id": list(ids), "source_row": list(numbers)}, SCHEMA))
    return sort, sorted(rows)


@pytest.mark.parametrize("max_bytes", [1 << 30, 20_000, 3_000])
def test_everything_comes_back_sorted_whether_it_fits_or_not(max_bytes):
    sort, expected = _filled(max_bytes)
    with sort:
        for _ in range(2):  # it may be read again
            back = pa.concat_tables([rows for _, rows in sort.ranges()])
            assert list(zip(*back.to_pydict().values(), strict=True)) == expected


@pytest.mark.parametrize(("max_bytes", "range_bytes"), [(3_000, None), (20_000, 3_000), (1 << 30, 3_000)])
def test_ranges_cover_all_keys_and_never_part_equal_ones(max_bytes, range_bytes):
    sort, expected = _filled(max_bytes)
    with sort:
        pieces = list(sort.ranges(range_bytes))
    assert [tuple(row.values()) for _, rows in pieces for row in rows.to_pylist()] == expected
    assert len(pieces) > 5
    assert (pieces[0][0].low, pieces[-1][0].high) == (None, None)
    for (left, rows), (right, _) in pairwise(pieces):
        assert left.high == right.low
        assert all((left.low or "") <= key < left.high for key in rows["pair_id"].to_pylist())
        assert rows.nbytes < 4 * 3_000


@pytest.fixture
def temporary(monkeypatch):
    """Return a function that makes a folder the one for temporary files of this process."""

    def use(folder):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        monkeypatch.setattr("weights_store.processes.guard._guards", {})

    yield use
    guard().close()


def test_temporary_files_are_gone_afterwards(tmp_path, temporary):
    temporary(tmp_path)
    sort, _ = _filled(3_000)
    with sort:
        assert any(tmp_path.rglob("*.arrow"))
    assert list(tmp_path.rglob("*")) == [guard().folder]
    guard().close()
    assert not any(tmp_path.iterdir())


def test_nothing_added_gives_one_empty_range():
    with ExternalSort(SCHEMA, "pair_id") as sort:
        assert [rows.num_rows for _, rows in sort.ranges()] == [0]


def test_a_full_temporary_folder_is_named_with_what_to_do(disk, temporary):
    folder, _ = disk
    (folder / "filler").write_bytes(bytes((1 << 20) - (64 << 10)))
    temporary(folder)
    rows = pa.table({"key": [f"{index:09d}" for index in range(20_000)]})
    text = f"^cannot write temporary files to {folder}, 0 MiB are free there: .*No space left.*; make room, or set TMPDIR to"
    with pytest.raises(OSError, match=text), ExternalSort(rows.schema, "key", max_bytes=1000) as sort:
        sort.add(rows)
    assert set(folder.rglob("*")) == {folder / "filler", guard().folder}
