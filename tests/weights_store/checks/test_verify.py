import json
import random
import re
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weights_store import WeightStore
from weights_store.checks.verify import Finding
from weights_store.checks.verify import verify as verify_store
from weights_store.errors import DamageError, NotFoundError, SettingsError
from weights_store.fingerprint import fingerprint
from weights_store.messages import progress_of
from weights_store.schemas import LOGPS, QUARANTINE, TOKENS, WEIGHTS
from weights_store.tables import commits
from weights_store.tables.compaction import optimize
from weights_store.tables.notes import NOT_A_VERSION
from weights_store.tables.shards import ShardWriter

TOKENS_PATH, QUARANTINE_PATH, LOGPS_PATH, WEIGHTS_PATH = "tokens/hh", "quarantine/hh", "logps/hh/ref", "weights/hh/tis"
NUM_PAIRS = 60
SIDES = ("chosen", "rejected")
VOCAB_SIZE = 500


def pair_name(index):
    return f"p{index:03d}"


def pairs(indices):
    """Pairs with different ids and lengths: prompt of 5..9, chosen of 30..36, rejected of 25..35 tokens."""
    rows = []
    for index in indices:
        rng = random.Random(index)
        ids = [rng.choices(range(VOCAB_SIZE), k=n) for n in (5 + index % 5, 30 + index % 7, 25 + index % 11)]
        logps = [[-rng.expovariate(1) for _ in side] for side in ids[1:]]
        weights = [[rng.uniform(0.5, 1.5) for _ in side] for side in ids[1:]]
        rows.append({"pair_id": pair_name(index), "ids": ids, "logps": logps, "weights": weights, "source_row": index})
    return rows


def tokens_row(pair):
    prompt_ids, chosen_ids, rejected_ids = pair["ids"]
    return {
        "pair_id": pair["pair_id"],
        "prompt": "[]",
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "chosen_score": None,
        "rejected_score": None,
        "source_row": pair["source_row"],
        "split": "train",
    }


def logps_row(pair):
    return {"pair_id": pair["pair_id"], "chosen_logps": pair["logps"][0], "rejected_logps": pair["logps"][1]}


def weights_row(pair):
    return {
        **{name: tokens_row(pair)[name] for name in ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids", "split")},
        "chosen_token_weights": pair["weights"][0],
        "rejected_token_weights": pair["weights"][1],
        "chosen_ref_logps": pair["logps"][0],
        "rejected_ref_logps": pair["logps"][1],
        "pair_weight": 1.0,
        **dict.fromkeys(("anchor_ids", "anchor_ref_logps", "chosen_score", "rejected_ref_top_ids")),
    }


def quarantine_row(source_row, reason="empty_response", pair_id=None):
    return {"source_row": source_row, "pair_id": pair_id, "reason": reason, "detail": f"d{source_row}", "raw": "x" * 99}


TOKENIZER = {"fingerprint": "t", "vocab_size": VOCAB_SIZE}


def tokens_metadata(num_pairs, quarantined=None, **changes):
    quarantined = {"empty_response": 3, "not_text": 1} if quarantined is None else quarantined
    num_source_rows = num_pairs + sum(quarantined.values())
    statistics = {"num_source_rows": num_source_rows, "num_pairs": num_pairs, "quarantined": quarantined}
    return {"fingerprint": f"tokens-{num_pairs}", "tokenizer": TOKENIZER, "statistics": statistics, **changes}


def weights_metadata(parents, num_pairs, **changes):
    identity = {"data": {role: parent.fingerprint for role, parent in parents.items()}}
    quarantined = {"empty_response": 3, "not_text": 1, "unscorable": 1}
    return {
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "parents": [{"role": role, **parent.as_parent()} for role, parent in parents.items()],
        "tokenizer": TOKENIZER,
        "statistics": {"num_source_rows": num_pairs + 5, "num_pairs": num_pairs, "quarantined": quarantined},
        **changes,
    }


def build(root):
    """A store of 60 pairs, 4 unusable rows and 1 unscorable pair, grown as builds grow it: in two versions and optimized."""
    store = WeightStore(root)
    quarantine = store.table(QUARANTINE_PATH)
    rows = [quarantine_row(100 + index) for index in range(3)] + [quarantine_row(200, "not_text")]
    quarantine.append(pa.Table.from_pylist(rows, QUARANTINE), {"fingerprint": "q"})
    unscorable = quarantine_row(NUM_PAIRS - 1, "unscorable", pair_name(NUM_PAIRS - 1))
    quarantine.append(pa.Table.from_pylist([unscorable], QUARANTINE), {"fingerprint": "q"})
    tokens, logps, weights = (store.table(path) for path in (TOKENS_PATH, LOGPS_PATH, WEIGHTS_PATH))
    # The second version's keys lie between the first one's, so that shards overlap.
    for num_tokens, indices in ((40, [i for i in range(NUM_PAIRS) if i % 3]), (NUM_PAIRS, range(0, NUM_PAIRS, 3))):
        added = pairs(indices)
        scored = [pair for pair in added if pair["source_row"] != NUM_PAIRS - 1]
        made = tokens.append(pa.Table.from_pylist(list(map(tokens_row, added)), TOKENS), tokens_metadata(num_tokens))
        of_tokens = {"fingerprint": f"logps-{num_tokens}", "parents": [made.as_parent()]}
        logs = logps.append(pa.Table.from_pylist(list(map(logps_row, scored)), LOGPS), of_tokens)
        metadata = weights_metadata({"tokens": made, "ref_logps": logs}, num_tokens - 1)
        weights.append(pa.Table.from_pylist(list(map(weights_row, scored)), WEIGHTS), metadata)
    optimize(logps)
    return store


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Cut rows into row groups of some pairs and shards of some row groups, and join them in several ranges."""
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr("weights_store.tables.shards.SHARD_BYTES", 12_000)
    monkeypatch.setattr("weights_store.checks.relations.JOIN_BYTES", 60_000)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 3000)
        patch.setattr("weights_store.tables.shards.SHARD_BYTES", 12_000)
        return build(tmp_path_factory.mktemp("built") / "store").uri


@pytest.fixture
def store(built, tmp_path):
    shutil.copytree(built, tmp_path / "store")
    return WeightStore(tmp_path / "store")


def verify(store, tables=None):
    return verify_store(store, tables, rows=True)


def shards(store, path):
    return sorted(file for file in (store.root.path / path).glob("*.parquet") if file.name != NOT_A_VERSION)


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def only(findings, table=None):
    (found,) = [finding for finding in findings if table is None or finding.table == table]
    return found


# --- bytes -------------------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_a_store_as_it_was_committed(store, caplog):
    caplog.set_level("INFO", "tokenweights")
    assert list(verify(store)) == []
    tables = [TOKENS_PATH, QUARANTINE_PATH, LOGPS_PATH, WEIGHTS_PATH]
    assert [r.getMessage().partition(":")[0] for r in caplog.records if not progress_of(r)] == tables
    assert store.table(LOGPS_PATH).metadata()["changes"] == ["optimized: 2 shards -> 1"]
    assert len(shards(store, WEIGHTS_PATH)) >= 3


def test_work_that_is_spread_finds_what_work_in_turn_finds(store, elsewhere, monkeypatch):
    monkeypatch.setattr("weights_store.checks.files._BATCH_BYTES", 12_000)
    assert list(verify_store(store, rows=True, spread=elsewhere)) == []
    for path, at in ((TOKENS_PATH, 0), (LOGPS_PATH, 0), (WEIGHTS_PATH, 2)):
        flip(shards(store, path)[at], 700)
    shards(store, WEIGHTS_PATH)[0].unlink()
    found = list(verify(store))
    assert {finding.table for finding in found} == {TOKENS_PATH, LOGPS_PATH, WEIGHTS_PATH}
    monkeypatch.chdir(store.root.path.parent)  # a relative store means the same folder in every process
    assert list(verify_store(WeightStore(store.root.path.name), rows=True, spread=elsewhere)) == found


def group_at(path, at):
    """The row group whose column chunks hold one byte, None when it is the footer's."""
    footer = pq.read_metadata(path)
    for index in range(footer.num_row_groups):
        columns = [footer.row_group(index).column(column) for column in range(footer.num_columns)]
        starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
        ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
        if min(starts) <= at < max(ends):
            return index
    return None


def test_every_flipped_bit_is_found_and_mostly_its_row_group_named(store, monkeypatch):
    monkeypatch.setattr("weights_store.checks.relations.JOIN_BYTES", 1 << 30)
    rng = random.Random(0)
    files = [
        path for table in (TOKENS_PATH, LOGPS_PATH, WEIGHTS_PATH, QUARANTINE_PATH) for path in shards(store, table)
    ]
    outcomes = Counter()
    for _ in range(200):
        path = rng.choice(files)
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        expected = group_at(path, at)
        flip(path, at, rng.randrange(8))
        table = str(path.parent.relative_to(store.root.path))
        found = list(verify(store, [table]))
        path.write_bytes(whole)
        assert found, f"bit flipped in byte {at} of {path} was not found"
        assert {(finding.table, finding.shard) for finding in found if finding.shard} == {(table, path.name)}
        if expected is not None:
            named = {finding.row_group for finding in found} - {None}
            assert named <= {expected}
            outcomes[bool(named)] += 1
    assert sum(outcomes.values()) > 80
    # The rest hit bytes between the values, such as page headers, that change no value.
    assert outcomes[True] > 4 * outcomes[False]
    assert list(verify(store)) == []


def test_a_flipped_value_is_named_by_row_group_column_and_pairs(store):
    path = shards(store, TOKENS_PATH)[0]
    footer = pq.read_metadata(path)
    names = [footer.row_group(1).column(column).path_in_schema for column in range(footer.num_columns)]
    column = footer.row_group(1).column(names.index("chosen_ids.list.element"))
    flip(path, column.data_page_offset + column.total_compressed_size // 2)
    found = only(verify(store, [TOKENS_PATH]))
    keys = pq.ParquetFile(path).read_row_group(1, columns=["pair_id"])["pair_id"].to_pylist()
    assert (found.shard, found.row_group, found.version) == (path.name, 1, 0)
    assert re.match(rf"column chosen_ids .*\(?rows pair_id {keys[0]} … {keys[-1]}\)", found.problem)
    assert str(found).startswith(f"tokens/hh@0, shard {path.name}, row group 1: column chosen_ids")


def test_damage_outside_the_values_is_said_to_be_there(store):
    path = shards(store, LOGPS_PATH)[0]
    created_by = path.read_bytes().index(b"parquet-cpp-arrow")
    flip(path, created_by)
    found = only(verify(store, [LOGPS_PATH]))
    assert found.row_group is None
    assert "SHA-256 differs); every value is as committed: the damage is in the footer" in found.problem


def test_a_truncated_an_extended_and_a_missing_shard_are_told_apart(store):
    first, second, third = shards(store, WEIGHTS_PATH)[:3]
    size = second.stat().st_size
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(second.read_bytes() + b"\0" * 7)
    third.unlink()
    found = {}
    for finding in verify(store, [WEIGHTS_PATH]):
        found.setdefault(finding.shard, finding.problem)
    assert found.keys() == {first.name, second.name, third.name}
    assert re.search(r"it has (\d+) bytes, (\d+) were committed: it was cut off", found[first.name])
    assert f"it has {size + 7} bytes, {size} were committed: it was extended" in found[second.name]
    assert found[third.name].startswith("the file is missing; restore")


def test_exchanged_shards_are_both_found(store):
    one, other = shards(store, WEIGHTS_PATH)[:2]
    bytes_of_one, bytes_of_other = one.read_bytes(), other.read_bytes()
    one.write_bytes(bytes_of_other)
    other.write_bytes(bytes_of_one)
    exchanged = [finding for finding in verify(store, [WEIGHTS_PATH]) if "it holds the bytes of" in finding.problem]
    assert [(finding.shard, other.name in finding.problem) for finding in exchanged] == [
        (one.name, True),
        (other.name, False),
    ]


def test_a_shard_that_only_an_old_version_needs_is_checked(store):
    old = min(store.table(LOGPS_PATH).shards(0))
    assert old not in store.table(LOGPS_PATH).shards()
    flip(store.root.path / LOGPS_PATH / old, 50)
    found = only(verify(store))
    assert (found.version, found.shard) == (0, old)


def test_damage_hides_no_law(store):
    # The last weights row of the second version is bad, and a shard of the first version and one of the tokens are damaged.
    bad = weights_row(pairs([NUM_PAIRS])[0]) | {"pair_weight": -1.0}
    metadata = store.table(WEIGHTS_PATH).metadata()
    store.table(WEIGHTS_PATH).append(pa.Table.from_pylist([bad], WEIGHTS), metadata)
    shards(store, TOKENS_PATH)[0].unlink()
    flip(shards(store, WEIGHTS_PATH)[0], 200)
    found = list(verify(store))
    assert any(f.table == TOKENS_PATH and "missing" in f.problem for f in found)
    assert any(f.shard == shards(store, WEIGHTS_PATH)[0].name and f.row_group == 0 for f in found)
    assert any(f.pair_id == pair_name(NUM_PAIRS) and "pair_weight is -1.0" in f.problem for f in found)
    assert not any(f"has no row in {TOKENS_PATH}" in f.problem for f in found)  # it may have stood in the missing shard


def test_damage_of_an_unasked_parent_is_said_to_keep_from_comparing(store):
    shards(store, TOKENS_PATH)[0].unlink()
    found = only(verify(store, [WEIGHTS_PATH]))
    assert "not all of it could be compared with tokens/hh@1, which is damaged" in found.problem


def test_progress_is_shown_in_bytes_of_each_table(store, caplog, monkeypatch):
    monkeypatch.setattr("weights_store.checks.files.BYTES_PER_PROGRESS", 1)
    caplog.set_level("INFO", "tokenweights")
    list(verify(store, [WEIGHTS_PATH]))
    shown = [progress for record in caplog.records if (progress := progress_of(record))]
    last = [progress for progress in shown if progress.name == f"verify {WEIGHTS_PATH}"][-1]
    num_bytes = sum(path.stat().st_size for path in shards(store, WEIGHTS_PATH))
    assert (last.done, last.total, last.unit) == (num_bytes, num_bytes, "bytes")


def test_a_shard_that_vanishes_while_others_are_verified_is_a_finding(store, caplog):
    def remove_tokens(record):
        if record.getMessage().startswith(f"{WEIGHTS_PATH}:"):  # the tokens have been found sound by then
            shards(store, TOKENS_PATH)[0].unlink()
        return True

    caplog.set_level("INFO", "tokenweights")
    caplog.handler.addFilter(remove_tokens)
    found = only(verify(store))
    caplog.handler.removeFilter(remove_tokens)
    assert found.table == WEIGHTS_PATH
    assert "tokens/hh" in found.problem


# --- logs --------------------------------------------------------------------------------------------------------------


def log_file(store, path, version):
    return store.root.path / path / "_delta_log" / f"{version:020d}.json"


UNREADABLE = [
    "",
    "{",
    "7",
    "[]\n",
    "{}",
    '{"adt": {"path": "x.parquet"}}',
    '{"commitInfo": 3}',
    '{"commitInfo": {"tokenweights": "[]"}}',
    "\xff",
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_unreadable_commit_is_a_finding(store, text):
    log_file(store, TOKENS_PATH, 1).write_bytes(text.encode("latin-1"))
    found = [finding for finding in verify(store) if finding.table == TOKENS_PATH]
    assert found
    assert found[0].version == 1
    assert found[0].problem.startswith("its commit cannot be read")


def test_a_missing_commit_is_a_finding(store):
    log_file(store, LOGPS_PATH, 0).unlink()
    assert "commit 0 is missing from _delta_log" in only(verify(store, [LOGPS_PATH])).problem


def edit_commit(store, path, version, old, new, with_new_digest=True):
    """Replace text of a commit, as damage does, or as a writer would that is wrong from the start."""
    file = log_file(store, path, version)
    text = file.read_text()
    assert old in text
    lines = [json.loads(line) for line in text.replace(old, new).splitlines()]
    for info in (line["commitInfo"] for line in lines if "commitInfo" in line):
        if with_new_digest:
            info["tokenweightsSha256"] = commits.digest(info["tokenweights"], info["tokenweightsShards"])
    file.write_text("\n".join(json.dumps(line, separators=(",", ":")) for line in lines) + "\n")


@pytest.mark.parametrize(
    ("old", "new"), [("vocab_size", "vocab_sise"), ("num_pairs", "num_pairt"), ("sha256", "sha257")]
)
def test_any_change_of_what_a_commit_says_is_found(store, old, new):
    edit_commit(store, TOKENS_PATH, 0, old, new, with_new_digest=False)
    assert "its digest differs" in only(verify(store, [TOKENS_PATH])).problem


def test_a_changed_checksum_in_a_commit_is_found(store):
    record = store.table(TOKENS_PATH).records()[-1]
    checksum = record.checksums["chosen_ids"]
    edit_commit(store, TOKENS_PATH, 1, checksum, f"{int(checksum, 16) ^ 1:016x}")
    found = only(verify(store, [TOKENS_PATH]))
    assert (found.shard, found.version) == (record.name, 1)
    assert "the commit's record of it is damaged" in found.problem


def test_a_changed_count_in_a_commit_is_found(store):
    edit_commit(store, TOKENS_PATH, 0, '\\"num_rows_written\\": 40', '\\"num_rows_written\\": 41')
    assert "says 41 rows were written, its shards have 40" in only(verify(store, [TOKENS_PATH])).problem


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('\\"numRecords\\": ', '\\"numRecords\\": 1'),
        ('\\"maxValues\\": {\\"pair_id\\": \\"p', '\\"maxValues\\": {\\"pair_id\\": \\"o'),
    ],
)
def test_statistics_that_would_make_delta_skip_rows_are_found(store, old, new):
    record = store.table(TOKENS_PATH).records()[-1]
    edit_commit(store, TOKENS_PATH, 1, old, new)
    found = only(verify(store, [TOKENS_PATH]))
    assert found.version == 1
    assert f"size, partition or statistics of {record.name} are not those of the shard" in found.problem


def test_a_schema_that_is_not_ours_is_found(store):
    edit_commit(store, TOKENS_PATH, 0, '\\"name\\":\\"source_row\\"', '\\"name\\":\\"source_rov\\"')
    assert "its log has the columns ['pair_id', 'prompt'" in only(verify(store, [TOKENS_PATH])).problem


def checkpoint_of(store, path):
    from deltalake import DeltaTable

    folder = store.root.path / path
    DeltaTable(str(folder)).create_checkpoint()
    (checkpoint,) = (folder / "_delta_log").glob("*.checkpoint.parquet")
    return checkpoint


def test_a_cut_checkpoint_is_found_and_named(store):
    checkpoint = checkpoint_of(store, TOKENS_PATH)
    assert list(verify(store)) == []
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    named, refused = verify(store, [TOKENS_PATH])
    assert str(named).startswith(f"{TOKENS_PATH}@1, file _delta_log/{checkpoint.name}: it is damaged: ")
    assert "delete it, or run `tokenweights repair`" in named.problem
    assert refused.problem.startswith("Delta cannot open it: ")


def test_a_checkpoint_that_names_other_files_is_found_and_not_read(store):
    checkpoint = checkpoint_of(store, TOKENS_PATH)
    rows = pq.read_table(checkpoint)
    last = max(index for index, add in enumerate(rows["add"].to_pylist()) if add)
    pq.write_table(pa.concat_tables([rows.slice(0, last), rows.slice(last + 1)]), checkpoint)
    assert "not the same" in next(verify(store, [TOKENS_PATH])).problem
    for read in (store.table(TOKENS_PATH).scan, store.table(TOKENS_PATH).records):
        with pytest.raises(DamageError, match=r"its log names \d+ files, which are not those .* `tokenweights repair"):
            read()


def test_statistics_in_a_checkpoint_are_compared(store):
    checkpoint = checkpoint_of(store, TOKENS_PATH)
    rows = pq.read_table(checkpoint)
    adds = rows["add"].to_pylist()
    last = max(index for index, add in enumerate(adds) if add)
    adds[last]["stats"] = adds[last]["stats"].replace('"p', '"o')
    if adds[last].get("stats_parsed"):
        adds[last]["stats_parsed"]["maxValues"]["pair_id"] = "o"
    column = pa.array(adds, rows.schema.field("add").type)
    pq.write_table(rows.set_column(rows.schema.names.index("add"), rows.schema.field("add"), column), checkpoint)
    assert any("readers would skip or miscount rows" in finding.problem for finding in verify(store, [TOKENS_PATH]))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00", '{"version":"1","size":3}', '{"version":7,"size":3}', '{"size":3}']
)
def test_a_damaged_hint_at_the_last_checkpoint_is_found_and_named(store, text):
    checkpoint_of(store, TOKENS_PATH)
    (store.root.path / TOKENS_PATH / "_delta_log" / "_last_checkpoint").write_text(text)
    found = list(verify(store, [TOKENS_PATH]))
    assert f"{TOKENS_PATH}@1, file _delta_log/_last_checkpoint: it is damaged: it names" in str(found[0])
    assert "delete it, or run `tokenweights repair`" in found[0].problem


def test_a_foreign_commit_is_found_and_the_rest_still_checked(store):
    from deltalake import write_deltalake

    folder = store.root.path / LOGPS_PATH
    flip(folder / store.table(LOGPS_PATH).shards()[0], 100)
    write_deltalake(str(folder), pa.Table.from_pylist([logps_row(pairs([99])[0])], LOGPS), mode="append")
    found = [finding for finding in verify(store) if finding.table == LOGPS_PATH]
    assert found[0].version == 3
    assert "was not written by tokenweights: 1 files without checksums" in found[0].problem
    assert found[1].row_group == 0


# --- laws of rows ------------------------------------------------------------------------------------------------------


def without(values, index):
    return values[:index] + values[index + 1 :]


NAN, INF = float("nan"), float("inf")
BROKEN_LAWS = [
    (TOKENS_PATH, {"prompt_ids": lambda ids: []}, "prompt_ids is empty"),
    (
        TOKENS_PATH,
        {"chosen_ids": lambda ids: [], "rejected_ids": lambda ids: []},
        "chosen_ids and rejected_ids are empty, expected tokens in one of them",
    ),
    (
        TOKENS_PATH,
        {"chosen_ids": lambda ids: [*ids[:3], -1, *ids[3:]]},
        r"chosen_ids\[3\] is -1, expected an id in 0..499",
    ),
    (TOKENS_PATH, {"chosen_ids": lambda ids: [500, *ids]}, r"chosen_ids\[0\] is 500, expected an id in 0..499"),
    (
        LOGPS_PATH,
        {"chosen_logps": lambda v: [*v[:4], 0.5, *v[5:]]},
        r"chosen_logps\[4\] is 0.5, expected a finite number <= 0",
    ),
    (LOGPS_PATH, {"rejected_logps": lambda v: [NAN, *v[1:]]}, r"rejected_logps\[0\] is nan"),
    (LOGPS_PATH, {"rejected_logps": lambda v: [*v[:-1], -INF]}, r"rejected_logps\[\d+\] is -inf"),
    (LOGPS_PATH, {"chosen_logps": lambda v: v[1:]}, r"30 chosen_logps for 31 chosen_ids of tokens/hh@2"),
    (LOGPS_PATH, {"rejected_logps": lambda v: [*v, -1.0]}, r"31 rejected_logps for 30 rejected_ids of tokens/hh@2"),
    (LOGPS_PATH, {"pair_id": lambda _: "zzz"}, r"has no row in tokens/hh@2"),
    (WEIGHTS_PATH, {"chosen_token_weights": lambda v: v[1:]}, "30 chosen_token_weights for 31 chosen_ids"),
    (WEIGHTS_PATH, {"rejected_ref_logps": lambda v: [*v, -1.0]}, "31 rejected_ref_logps for 30 rejected_ids"),
    (
        WEIGHTS_PATH,
        {"rejected_token_weights": lambda v: [*v[:2], -0.5, *v[3:]]},
        r"rejected_token_weights\[2\] is -0.5",
    ),
    (WEIGHTS_PATH, {"chosen_token_weights": lambda v: [INF, *v[1:]]}, r"chosen_token_weights\[0\] is inf"),
    (WEIGHTS_PATH, {"chosen_ref_logps": lambda v: [1.0, *v[1:]]}, r"chosen_ref_logps\[0\] is 1.0"),
    (WEIGHTS_PATH, {"pair_weight": lambda _: NAN}, "pair_weight is nan"),
    (WEIGHTS_PATH, {"prompt_ids": lambda ids: [*ids[:-1], 501]}, r"prompt_ids\[\d\] is 501, expected an id in 0..499"),
    (
        WEIGHTS_PATH,
        {"prompt_ids": lambda ids: [(ids[0] + 1) % 500, *ids[1:]]},
        r"prompt_ids\[0\] is \d+, in tokens/hh@2 it is",
    ),
    (WEIGHTS_PATH, {"prompt_ids": lambda ids: [*ids, 7]}, r"7 prompt_ids for 6 prompt_ids of tokens/hh@2"),
    (WEIGHTS_PATH, {"prompt_ids": lambda ids: []}, "prompt_ids is empty"),
    (WEIGHTS_PATH, {"anchor_ids": lambda _: [1], "anchor_ref_logps": lambda _: [0.5]}, r"anchor_ref_logps\[0\] is 0.5"),
    (WEIGHTS_PATH, {"anchor_ids": lambda _: [1]}, "0 anchor_ref_logps for 1 anchor_ids"),
    (WEIGHTS_PATH, {"pair_id": lambda _: "zzz"}, r"has no row in tokens/hh@2"),
    (WEIGHTS_PATH, {"pair_id": lambda _: "zzz"}, rf"has no row in {LOGPS_PATH}@3"),
    (WEIGHTS_PATH, {"chosen_score": lambda _: 0.5}, "chosen_score is 0.5, in tokens/hh@2 it is None"),
    (
        WEIGHTS_PATH,
        {"chosen_ref_logps": lambda v: [*v[:2], v[2] - 1, *v[3:]]},
        rf"chosen_ref_logps\[2\] is -\d.*, in {LOGPS_PATH}@3 it is -\d",
    ),
    (
        WEIGHTS_PATH,
        {"rejected_ref_top_ids": lambda _: [4, 5]},
        rf"rejected_ref_top_ids is a list of 2, in {LOGPS_PATH}@3 it is None",
    ),
]


def add_tokens(store, pair, **changes):
    """Make tokens/hh@2, with one pair more."""
    row = tokens_row(pair) | changes
    return store.table(TOKENS_PATH).append(pa.Table.from_pylist([row], TOKENS), tokens_metadata(NUM_PAIRS + 1))


def add_logps(store, row, tokens):
    metadata = {"fingerprint": "logps", "parents": [tokens.as_parent()]}
    return store.table(LOGPS_PATH).append(pa.Table.from_pylist([row], LOGPS), metadata)


def add_weights(store, row, tokens, **changes):
    parents = {"tokens": tokens, "ref_logps": store.table(LOGPS_PATH).reference()}
    metadata = weights_metadata(parents, NUM_PAIRS, **changes)
    return store.table(WEIGHTS_PATH).append(pa.Table.from_pylist([row], WEIGHTS), metadata)


@pytest.mark.parametrize(("path", "change", "problem"), BROKEN_LAWS)
def test_each_broken_law_names_its_pair(store, path, change, problem):
    # Pair p071 is new; its rows are written as they should be, but for one thing.
    pair = pairs([71])[0]
    row = {TOKENS_PATH: tokens_row, LOGPS_PATH: logps_row, WEIGHTS_PATH: weights_row}[path](pair)
    row |= {name: make(row[name]) for name, make in change.items()}
    if path == TOKENS_PATH:
        add_tokens(store, pair, **row)
    elif path == LOGPS_PATH:
        add_logps(store, row, add_tokens(store, pair))
    else:
        tokens = add_tokens(store, pair)
        add_logps(store, logps_row(pair), tokens)
        add_weights(store, row, tokens)
    found = list(verify(store))
    assert {(finding.table, finding.pair_id) for finding in found} == {(path, row["pair_id"])}
    assert any(re.match(problem, finding.problem) for finding in found), found


def test_scores_and_top_k_are_those_of_the_tables_that_weights_were_made_from(store):
    pair = pairs([71])[0]
    ids, logps = pair["ids"][1:], pair["logps"]
    tops = {
        **{
            f"{side}_top_ids": [i for i in side_ids for _ in range(2)]
            for side, side_ids in zip(SIDES, ids, strict=True)
        },
        **{f"{side}_top_logps": [-1.0, -2.0] * len(side_logps) for side, side_logps in zip(SIDES, logps, strict=True)},
    }
    scores = {"chosen_score": 4.5, "rejected_score": 1.0}
    row = weights_row(pair) | scores | {name.replace("_top_", "_ref_top_"): values for name, values in tops.items()}
    tokens = add_tokens(store, pair, **scores)
    scored = pa.Table.from_pylist([logps_row(pair) | tops], LOGPS)
    ref = store.table(LOGPS_PATH.replace("ref", "top")).append(
        scored, {"fingerprint": "top", "parents": [tokens.as_parent()]}
    )
    table, metadata = store.table("weights/hh/top"), weights_metadata({"tokens": tokens, "ref_logps": ref}, 1)
    table.append(pa.Table.from_pylist([row], WEIGHTS), metadata)
    assert list(verify(store, [table.path])) == []
    row["chosen_ref_top_ids"][3] += 1
    table.replace(pa.Table.from_pylist([row | {"rejected_score": 2.0}], WEIGHTS), metadata)
    assert [finding.problem for finding in verify(store, [table.path])] == [
        f"rejected_score is 2.0, in {tokens} it is 1.0",
        f"chosen_ref_top_ids[3] is {ids[0][1] + 1}, in {ref} it is {ids[0][1]}",
    ]


def test_all_rows_that_break_a_law_are_counted(store):
    tokens = store.table(TOKENS_PATH).reference()
    rows = [logps_row(pair) for pair in pairs(range(NUM_PAIRS, NUM_PAIRS + 3))]
    rows[1]["chosen_logps"][2] = rows[2]["chosen_logps"][0] = rows[2]["chosen_logps"][1] = 1.0
    store.table(LOGPS_PATH).append(
        pa.Table.from_pylist(rows, LOGPS), {"fingerprint": "x", "parents": [tokens.as_parent()]}
    )
    by_problem = {finding.problem: finding.pair_id for finding in verify(store)}
    assert by_problem == {
        "chosen_logps[2] is 1.0, expected a finite number <= 0 (1 more rows like this in the row group)": pair_name(61),
        "has no row in tokens/hh@1 or tokens/hh@0, which the table was made from (2 more like this)": pair_name(60),
    }


def test_log_probs_of_pairs_that_have_left_the_newest_tokens_are_no_finding(store):
    left = pairs(range(10, NUM_PAIRS))
    made = store.table(TOKENS_PATH).replace(
        pa.Table.from_pylist(list(map(tokens_row, left)), TOKENS), tokens_metadata(50)
    )
    add_logps(store, logps_row(pairs([NUM_PAIRS - 1])[0]), made)
    assert list(verify(store)) == []


def commit_rows(store, path, rows, metadata, mode="append"):
    table = store.table(path)
    writer = table.writer()
    writer.write(rows)
    return table.commit(writer.finish(), metadata, table.version(), mode)


def test_a_key_that_stands_twice_is_found(store):
    twice = pa.Table.from_pylist(list(map(logps_row, pairs([7, 30]))), LOGPS)
    metadata = store.table(LOGPS_PATH).metadata()
    commit_rows(store, LOGPS_PATH, twice, metadata)
    found = only(verify(store))
    assert (found.table, found.version, found.pair_id) == (LOGPS_PATH, 3, pair_name(7))
    assert found.problem == "occurs 2 times, expected once; build the table again (1 more like this)"


def test_a_quarantine_row_that_stands_twice_is_found(store):
    rows = pa.Table.from_pylist([quarantine_row(NUM_PAIRS - 1, "unscorable")], QUARANTINE)
    commit_rows(store, QUARANTINE_PATH, rows, {"fingerprint": "q"})
    assert only(verify(store)).problem.startswith("source_row 59, detail 'd59' occurs 2 times")


def test_a_key_that_is_null_is_found(store):
    rows = [logps_row(pair) for pair in pairs([0, 1, 2])]
    rows[1]["pair_id"] = None
    table = store.table(LOGPS_PATH)
    schema = LOGPS.set(0, pa.field("pair_id", pa.string()))
    writer = ShardWriter(table.location, schema, table.key)
    writer.write(pa.Table.from_pylist(rows, schema))
    table.commit(writer.finish(), table.metadata(), table.version(), "overwrite")
    assert only(verify(store)).problem == "pair_id is null in row 1 of the row group"


def test_a_reason_for_quarantine_that_nobody_knows_is_found(store):
    rows = pa.Table.from_pylist([quarantine_row(7, "bad_mood")], QUARANTINE)
    store.table(QUARANTINE_PATH).append(rows, {"fingerprint": "q"})
    problems = [finding.problem for finding in verify(store)]
    assert "reason 'bad_mood' is none of the known ones" in problems


# --- lineage and balance -----------------------------------------------------------------------------------------------


def weights_with(store, parents, **changes):
    """Publish the weights again, whole, with another lineage."""
    pairs_of_all = pairs(range(NUM_PAIRS - 1))
    metadata = store.table(WEIGHTS_PATH).metadata() | {"parents": parents} | changes
    rows = pa.Table.from_pylist(list(map(weights_row, pairs_of_all)), WEIGHTS)
    store.table(WEIGHTS_PATH).replace(rows, metadata)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 9}, "its parent logps/hh/ref@9 is not in the store"),
        ({"table": "logps/hh/gone"}, "its parent logps/hh/gone@1 is not in the store"),
        ({"table": "../gone"}, "its parent ../gone@1 is not in the store"),
        ({"fingerprint": "somebody-elses"}, "has fingerprint logps-60…, recorded is somebody-els…"),
        ({"version": "1"}, "its parent .* is malformed"),
    ],
)
def test_a_parent_that_is_not_what_was_recorded_is_found(store, change, problem):
    first, second = store.table(WEIGHTS_PATH).metadata()["parents"]
    weights_with(store, [first, second | change])
    found = only(verify(store))
    assert (found.table, found.version) == (WEIGHTS_PATH, 2)
    assert re.search(problem, found.problem)


def test_a_fingerprint_that_is_not_of_its_identity_is_found(store):
    metadata = store.table(WEIGHTS_PATH).metadata()
    weights_with(store, metadata["parents"], identity={"data": {}})
    assert "that of its identity" in only(verify(store)).problem


def test_source_rows_that_are_nowhere_are_found(store):
    metadata = store.table(WEIGHTS_PATH).metadata()
    weights_with(store, metadata["parents"], statistics=metadata["statistics"] | {"num_source_rows": 70})
    assert only(verify(store)).problem == "70 source rows are not 59 pairs + 5 quarantined"


def test_rows_that_statistics_count_otherwise_are_found(store):
    made = add_tokens(store, pairs([NUM_PAIRS])[0])
    commit_rows(store, TOKENS_PATH, pa.Table.from_pylist([], TOKENS), tokens_metadata(NUM_PAIRS + 2))
    assert made.version == 2
    found = only(verify(store))
    assert (found.table, found.version) == (TOKENS_PATH, 3)
    assert found.problem == "its statistics count 62 pairs, it holds 61 rows"


def test_quarantine_that_does_not_hold_what_tokens_count_is_found(store):
    store.table(QUARANTINE_PATH).append(pa.Table.from_pylist([quarantine_row(300)], QUARANTINE), {"fingerprint": "q"})
    found = only(verify(store))
    assert found.table == TOKENS_PATH
    assert "count 3 rows in quarantine as empty_response, quarantine/hh@2 holds 4" in found.problem


def test_quarantine_that_is_not_there_is_found(store):
    shutil.rmtree(store.root.path / QUARANTINE_PATH)
    assert [finding.problem.partition(",")[0] for finding in verify(store)] == [
        "its statistics count 3 rows in quarantine as empty_response",
        "its statistics count 1 rows in quarantine as not_text",
    ]


# --- the call ----------------------------------------------------------------------------------------------------------


def test_only_the_tables_asked_for_are_verified(store):
    flip(shards(store, TOKENS_PATH)[0], 60)
    assert next(iter(verify(store, [LOGPS_PATH, QUARANTINE_PATH]))).problem.startswith(
        "not all of it could be compared"
    )
    assert {finding.table for finding in verify(store, [TOKENS_PATH])} == {TOKENS_PATH}


def test_a_table_that_is_not_there_is_refused(store, tmp_path):
    with pytest.raises(NotFoundError, match="no table weights/hh/other in"):
        verify(store, ["weights/hh/other"])
    with pytest.raises(SettingsError, match="no kind of table 'models'"):
        verify(store, ["models/x"])
    with pytest.raises(NotFoundError, match="no store at"):
        verify(WeightStore(tmp_path / "nowhere"))


def test_a_finding_is_one_line_with_its_place_and_problem():
    whole = Finding("logps/x", "is broken", 3, "a.parquet", 2, "p1")
    assert str(whole) == "logps/x@3, shard a.parquet, row group 2, pair p1: is broken"
    assert str(Finding("logps/x", "is broken")) == "logps/x: is broken"
