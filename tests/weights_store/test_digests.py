"""A large file is read once: its digest is kept, and counts only while nothing about the file has changed."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from weights_store import digests
from weights_store.digests import digest_once

OLD_NS = 1_600_000_000 * 10**9


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A file that counts as large and settled, in a cache of its own."""
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_MIN_BYTES", 8)
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    monkeypatch.setattr(digests, "_known", {})
    place = tmp_path / "model.safetensors"
    place.write_bytes(b"12345678")
    return place


@pytest.fixture
def num_read(monkeypatch):
    """How many files were read; the reads of this process do not help each other."""
    read = []

    def counted(path):
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(digests, "digest_file", counted)
    return lambda: len(read)


def _in_a_new_process(path):
    digests._known.clear()
    return digest_once(path)


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_process_does_not_read_an_unchanged_file_again(place, num_read):
    assert [_in_a_new_process(place) for _ in range(3)] == [_sha256(place)] * 3
    assert num_read() == 1


def _write_in_place(place):
    place.write_bytes(b"12345679")


def _write_in_place_and_set_the_old_time_again(place):
    before = place.stat()
    place.write_bytes(b"12345679")
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))


def _exchange(place):
    other = place.with_name("other")
    other.write_bytes(b"12345679")
    other.replace(place)


def _grow(place):
    place.write_bytes(b"123456789")


CHANGES = [_write_in_place, _write_in_place_and_set_the_old_time_again, _exchange, _grow]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_is_read_again(place, num_read, change):
    os.utime(place, ns=(OLD_NS, OLD_NS))
    _in_a_new_process(place)
    change(place)
    assert _in_a_new_process(place) == _sha256(place)
    assert num_read() == 2


def test_a_file_that_changed_just_now_is_not_kept(place, num_read, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", 60 * 10**9)
    _in_a_new_process(place)
    assert _in_a_new_process(place) == _sha256(place)
    assert num_read() == 2
    assert not (place.parent / "cache").exists()


@pytest.mark.parametrize("content", [b"12345678", b"1234567"], ids=["large", "small"])
def test_a_process_does_not_remember_what_may_change_within_a_tick_of_the_clock(place, monkeypatch, content):
    place.write_bytes(content)
    state = digests._state(place)
    monkeypatch.setattr(digests, "_state", lambda _: state)  # a clock that does not tell two changes apart
    monkeypatch.setattr(digests, "_SETTLED_NS", 60 * 10**9)
    for each in (content, content[::-1]):
        place.write_bytes(each)
        assert digest_once(place) == hashlib.sha256(each).hexdigest()


def test_a_process_reads_a_settled_file_once(place, num_read):
    place.write_bytes(b"1234567")
    assert digest_once(place) == digest_once(place) == _sha256(place)
    assert num_read() == 1


def test_a_small_file_is_not_kept(place, num_read):
    place.write_bytes(b"1234567")
    assert [_in_a_new_process(place) for _ in range(2)] == [_sha256(place)] * 2
    assert num_read() == 2


def test_a_damaged_digest_is_made_again(place, num_read):
    found = _in_a_new_process(place)
    (kept,) = (place.parent / "cache/digests").iterdir()
    whole = kept.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        kept.write_bytes(bytes(damaged))
        assert _in_a_new_process(place) == found
    assert num_read() > len(whole)
    kept.write_text("[]")
    assert _in_a_new_process(place) == found
    assert kept.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(place, num_read):
    (place.parent / "cache").write_text("a file in its place")
    assert [_in_a_new_process(place) for _ in range(2)] == [_sha256(place)] * 2
    assert num_read() == 2


def test_a_full_disk_costs_only_time_and_leaves_nothing_behind(place, num_read, monkeypatch):
    def fail(self, *_args, **_kwargs):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    assert [_in_a_new_process(place) for _ in range(2)] == [_sha256(place)] * 2
    assert num_read() == 2
    assert list((place.parent / "cache/digests").iterdir()) == []


def test_a_user_without_a_home_folder_keeps_nothing(place, num_read, monkeypatch):
    monkeypatch.delenv("TOKENWEIGHTS_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where nobody knows of a home folder
    assert [_in_a_new_process(place) for _ in range(2)] == [_sha256(place)] * 2
    assert num_read() == 2
