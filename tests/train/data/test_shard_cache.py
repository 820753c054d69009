"""Copies of shards: fetched once, never wrong, never more than the limit. Most tests fetch from a folder, two from S3."""

import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from train.config import DataConfig
from train.data.dataset import PairDataset, open_weights
from train.data.shard_cache import _GIB, ShardCache
from weights_store import Table, WeightStore
from weights_store.errors import DamageError, InputError, SettingsError, StoreError
from weights_store.location import Location
from weights_store.schemas import WEIGHTS

TOKENIZER = {"fingerprint": "0" * 64, "vocab_size": 128, "eos_token_id": 2}


def write_shards(uri: str, num_shards: int, pairs_per_shard: int = 20) -> Table:
    """Write made-up pairs, `num_shards` shards of equally many bytes but for a few."""
    table = WeightStore(uri).table("weights/toy/tis")
    for shard in range(num_shards):
        columns: dict[str, list] = {name: [None] * pairs_per_shard for name in WEIGHTS.names}
        columns["pair_id"] = [f"{shard:02d}-{i:04d}" for i in range(pairs_per_shard)]
        columns |= {"split": ["train"] * pairs_per_shard, "pair_weight": [1.0] * pairs_per_shard}
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            columns[name] = [[shard + 3, i + 3, 2] for i in range(pairs_per_shard)]
        for side in ("chosen", "rejected"):
            columns[f"{side}_token_weights"] = [[1.0, 2.0, 0.5]] * pairs_per_shard
            columns[f"{side}_ref_logps"] = [[-1.0, -2.0, -0.5]] * pairs_per_shard
        table.append(pa.table(columns, WEIGHTS), {"fingerprint": f"{shard:064d}", "tokenizer": TOKENIZER})
    return table


@pytest.fixture(scope="module")
def pristine_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("pristine") / "store"
    write_shards(str(store), 4)
    return store


@pytest.fixture
def table(pristine_store: Path, tmp_path: Path) -> Table:
    """Four shards, one's own."""
    shutil.copytree(pristine_store, tmp_path / "store")
    return WeightStore(str(tmp_path / "store")).table("weights/toy/tis")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that were fetched, as they come."""
    names: list[str] = []
    ordinary = Location.stream
    monkeypatch.setattr(Location, "stream", lambda self, name: (names.append(name), ordinary(self, name))[1])
    return names


def cache_for(tmp_path: Path, table: Table, num_shards: float = 100) -> ShardCache:
    """A cache with room for so many of the largest shard."""
    largest = max(record.num_bytes for record in table.records())
    return ShardCache(str(tmp_path / "cache"), num_shards * largest / _GIB)


def files_in(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {".lock"}


def test_a_shard_is_fetched_once_and_read_as_it_was_committed(tmp_path, table, fetched) -> None:
    cache, records = cache_for(tmp_path, table), table.records()
    for _ in range(2):
        for record in records:
            assert cache.open(table, record).read_group(0).equals(table.open_shard(record).read_group(0))
    assert fetched == [record.name for record in records]
    assert files_in(cache) == set(fetched)


def test_the_least_recently_used_copy_goes_first_and_the_limit_holds(tmp_path, table, fetched) -> None:
    cache, (a, b, c, d) = cache_for(tmp_path, table, 3), table.records()
    for record in (a, b, c, a, d):  # of a, b and c it is b that was not used for longest
        cache.open(table, record)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes
        time.sleep(0.01)  # the clock of a file system has steps of milliseconds
    assert files_in(cache) == {a.name, c.name, d.name}
    cache.open(table, a)
    assert len(fetched) == 4


def test_a_copy_that_is_deleted_while_it_is_open_can_be_read_to_its_end(tmp_path, table) -> None:
    cache, (a, b, *_) = cache_for(tmp_path, table, 1), table.records()
    reader = cache.open(table, a)
    cache.open(table, b)
    assert files_in(cache) == {b.name}
    assert reader.read_group(0).num_rows == a.num_rows


def test_a_shard_larger_than_the_limit_is_read_in_place_and_one_line_says_so(tmp_path, table, fetched, caplog) -> None:
    cache, records = cache_for(tmp_path, table, 0.5), table.records()
    assert cache.open(table, records[0]).read_group(0).num_rows == 20
    assert (fetched, files_in(cache)) == ([], set())
    cache.warn_of_oversized(records)
    cache_for(tmp_path, table, 1).warn_of_oversized(records)
    (line,) = caplog.messages
    assert line.startswith("4 of 4 shards are larger than data.cache_gib=")


def test_many_readers_of_one_folder_fetch_each_shard_once(tmp_path, table, monkeypatch, fetched) -> None:
    ordinary = Location.stream  # already the one that counts

    def slow(self: Location, name: str) -> Iterator[bytes]:
        time.sleep(0.05)  # so that all others come meanwhile
        return ordinary(self, name)

    monkeypatch.setattr(Location, "stream", slow)
    caches = [cache_for(tmp_path, table) for _ in range(8)]
    jobs = [(cache, record) for record in table.records() for cache in caches]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda job: job[0].open(table, job[1]).read_group(0, ["pair_id"]).num_rows, jobs))
    assert rows == [20] * 32
    assert sorted(fetched) == table.shards()


def test_readers_that_take_each_others_room_all_get_their_rows(tmp_path, table) -> None:
    caches = [cache_for(tmp_path, table, 1) for _ in range(4)]
    jobs = [(cache, record) for _ in range(10) for cache, record in zip(caches, table.records(), strict=True)]
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda job: job[0].open(table, job[1]).read_group(0, ["pair_id"])["pair_id"][0], jobs))
    assert [str(key) for key in keys] == [f"{shard:02d}-0000" for shard in range(4)] * 10
    assert len(files_in(caches[0])) <= 1


FETCH_HALF = """
import sys, time
from pathlib import Path
from train.data.shard_cache import ShardCache
from weights_store import WeightStore
from weights_store.location import Location

def half(self, name):
    data = self.read(name)
    yield data[: len(data) // 2]
    Path(sys.argv[3]).touch()
    time.sleep(60)

Location.stream = half
table = WeightStore(sys.argv[1]).table("weights/toy/tis")
ShardCache(sys.argv[2], 1).open(table, table.records()[0])
"""


def test_a_fetch_that_was_killed_leaves_nothing_wrong(tmp_path, table, fetched) -> None:
    cache, record = cache_for(tmp_path, table), table.records()[0]
    store, folder, halfway = str(table.root), str(tmp_path / "cache"), tmp_path / "halfway"
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", FETCH_HALF, store, folder, str(halfway)], cwd=root)
    try:
        while not halfway.exists():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    (partial,) = files_in(cache)
    assert partial == f"{record.name}.partial"
    assert cache.open(table, record).read_group(0).equals(table.open_shard(record).read_group(0))
    assert files_in(cache) == {record.name}
    assert fetched == [record.name]


def test_unfinished_copies_are_deleted_when_abandoned_and_keep_their_room_when_not(tmp_path, table, fetched) -> None:
    cache, (a, b, *_) = cache_for(tmp_path, table, 2), table.records()
    partial = cache.folder / "other.parquet.partial"
    partial.write_bytes(bytes(cache.max_bytes))
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process does that fetches it
        assert cache.open(table, a).read_group(0).num_rows == 20
        assert files_in(cache) == {partial.name}  # no room: read in place
    cache.open(table, b)
    assert files_in(cache) == {b.name}
    assert fetched == [b.name]


def test_a_shard_that_is_not_the_committed_one_is_refused_and_not_kept(tmp_path, table) -> None:
    cache, (a, b, c, _) = cache_for(tmp_path, table), table.records()
    path = table.location.path / a.name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamageError, match=f"weights/toy/tis: shard {a.name} is not the file .*: its digest differs"):
        cache.open(table, a)
    (table.location.path / b.name).write_bytes((table.location.path / b.name).read_bytes()[:-1])
    with pytest.raises(DamageError, match="its digest differs"):
        cache.open(table, b)
    (table.location.path / c.name).unlink()
    with pytest.raises(DamageError, match=f"shard {c.name} is missing"):
        cache.open(table, c)
    assert files_in(cache) == set()


def test_a_copy_that_was_cut_off_is_fetched_again_and_a_flipped_bit_in_it_is_found(tmp_path, table, fetched) -> None:
    cache, record = cache_for(tmp_path, table), table.records()[0]
    cache.open(table, record)
    copy = cache.folder / record.name
    os.truncate(copy, record.num_bytes - 1)
    assert cache.open(table, record).read_group(0).num_rows == 20
    assert len(fetched) == 2
    data = bytearray(copy.read_bytes())
    data[100] ^= 1  # in a value of the first column
    copy.write_bytes(data)
    with pytest.raises(
        DamageError, match=rf"\(the copy in {cache.folder}; deleted, it is fetched again\), shard {record.name}"
    ):
        cache.open(table, record).read_group(0)


def test_a_full_disk_and_a_place_that_is_no_folder_say_what_to_set(disk, tmp_path, table) -> None:
    folder, _ = disk
    cache = ShardCache(str(folder), 1)
    with suppress(OSError):
        (folder / "ballast").write_bytes(bytes(1 << 20))
    with pytest.raises(
        StoreError, match="cannot write shards to the cache in .*: No space left .*; set data.cache_folder"
    ):
        cache.open(table, table.records()[0])
    assert files_in(cache) == set()
    (tmp_path / "file").touch()
    with pytest.raises(
        StoreError, match="cannot write shards to the cache in .*/file/shards: Not a directory; set data"
    ):
        ShardCache(str(tmp_path / "file"), 1)
    with pytest.raises(InputError, match="~nobody-here/x: there is no home folder of that name here"):
        ShardCache("~nobody-here/x", 1)


def test_the_cache_lies_where_the_environment_says_unless_the_config_does(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TOKENWEIGHTS_CACHE", str(tmp_path / "machine"))
    assert ShardCache(None, 1).folder == tmp_path / "machine" / "shards"
    assert ShardCache(str(tmp_path / "mine"), 1).folder == tmp_path / "mine" / "shards"
    monkeypatch.delenv("TOKENWEIGHTS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ShardCache(None, 1).folder == tmp_path / "home" / ".cache" / "tokenweights" / "shards"


def bytes_sent(server: str) -> int:
    with urllib.request.urlopen(f"{server}/-/bytes", timeout=30) as reply:
        return int(reply.read())


def test_shards_of_an_object_store_are_sent_once_and_a_second_epoch_asks_for_nothing(
    counting_s3, tmp_path, monkeypatch, caplog
) -> None:
    environment = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in (environment | {"ENDPOINT_URL": counting_s3}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    table = write_shards("s3://bucket/store", 3)
    config = DataConfig(store="s3://bucket/store", weights="toy/tis", cache_folder=str(tmp_path / "cache"))
    bytes_sent(counting_s3)

    pairs = PairDataset(open_weights(config), config, vocab_size=128)
    assert bytes_sent(counting_s3) == 0  # the log knows the row groups
    first_epoch = [pairs[row].pair_id for row in range(60)]
    assert bytes_sent(counting_s3) == sum(record.num_bytes for record in table.records())

    assert caplog.messages == []

    tiny = config.model_copy(update={"cache_gib": 1e-7})
    in_place = PairDataset(open_weights(tiny), tiny, vocab_size=128)
    assert caplog.messages[0].startswith("3 of 3 shards are larger than data.cache_gib=")
    assert [in_place[row].pair_id for row in range(60)] == first_epoch

    monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere")
    worker = pickle.loads(pickle.dumps(pairs))  # nothing in memory, no open connection
    assert [worker[row].pair_id for row in range(60)] == first_epoch
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL is not a URL"):
        pickle.loads(pickle.dumps(pairs))[0]
