from hypothesis import given
from hypothesis import strategies as st

from pipeline.source.rows import batches


def test_batches_by_hand():
    cut = lambda *texts: list(batches(texts, 3, 4, len))  # noqa: E731
    assert cut() == []
    assert cut("a", "b", "c", "d") == [["a", "b", "c"], ["d"]]
    assert cut("aaaa", "b", "c") == [["aaaa", "b"], ["c"]]  # 4 are not more than 4
    assert cut("aaaaa", "b") == [["aaaaa"], ["b"]]


@given(st.lists(st.integers(0, 9)), st.integers(1, 5), st.integers(0, 20))
def test_batches_lose_nothing_and_are_closed_no_later_than_they_must(sizes, max_items, max_size):
    cut = list(batches(sizes, max_items, max_size, int))
    assert [size for batch in cut for size in batch] == sizes
    assert all(len(batch) <= max_items and sum(batch[:-1]) <= max_size for batch in cut)
    assert all(len(batch) == max_items or sum(batch) > max_size for batch in cut[:-1])
