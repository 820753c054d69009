import threading

import pytest

from weights_store.processes.spread import in_threads


def test_results_come_in_the_order_of_the_items_whichever_ends_first(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    second_is_done = threading.Event()

    def work(item):
        if item == 0:
            assert second_is_done.wait(10)
        second_is_done.set()
        return item * item

    assert list(in_threads(work, range(5))) == [0, 1, 4, 9, 16]


def test_items_are_taken_only_as_they_are_needed(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    taken = []
    results = in_threads(str, (taken.append(item) or item for item in range(9)))
    assert (next(results), taken) == ("0", [0, 1, 2])
    results.close()


def test_the_error_of_an_item_is_raised_and_later_items_are_left(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    done = []

    def work(item):
        if item == 1:
            raise OSError("the disk is full")
        done.append(item)

    with pytest.raises(OSError, match="the disk is full"):
        list(in_threads(work, range(9)))
    assert done == [0]
