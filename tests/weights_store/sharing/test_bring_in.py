"""What `pull` makes of a folder: the same version, or a refusal that names what is wrong, and nothing in between."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weights_store import WeightStore
from weights_store.checks.model_folders import sign_record
from weights_store.checks.verify import verify
from weights_store.errors import ConflictError, InputError, SettingsError, StoreError
from weights_store.fingerprint import fingerprint, fingerprint_file
from weights_store.schemas import WEIGHTS
from weights_store.sharing.bring_in import bring_in
from weights_store.tables.table import Table

NAME = "hh-harmless/tis-dpo"
HUB = "hf://datasets/owner/weights"


@pytest.fixture
def folder(read_store, tmp_path, texts):
    read_store.export(NAME, tmp_path / "pushed", tokenizer=texts)
    return tmp_path / "pushed"


@pytest.fixture
def store(tmp_path):
    """A store that is not there yet."""
    return WeightStore(tmp_path / "new")


def contents(table, version=None):
    """What the shards of a version hold, byte for byte, without their names."""
    return [replace(record, name="") for record in table.records(version)]


def resign(folder, **changes):
    """Change the record as somebody would who knows how it is signed."""
    record = json.loads((folder / "tokenweights.json").read_text())
    files = {name: fingerprint_file(folder / name) for name in record.pop("files") if (folder / name).exists()}
    del record["sha256"]
    (folder / "tokenweights.json").write_bytes(sign_record({**record, **changes}, files))


def rewrite(folder, name, change):
    """Write a data file again, changed."""
    path = folder / "data" / name
    rows = pq.read_table(path)
    pq.write_table(change(rows), path)


def test_a_pulled_version_is_the_pushed_one_byte_for_byte(read_store, folder, store):
    pulled = bring_in(store.root, folder, HUB, "5" * 40)
    assert (str(pulled.weights), pulled.num_pairs, pulled.is_new) == (f"weights/{NAME}@0", 4, True)
    here, there = store.table(f"weights/{NAME}"), read_store.table(f"weights/{NAME}")
    assert len(contents(here)) == 2  # two commits, and two shards
    assert contents(here) == contents(there)
    assert list(verify(store, rows=True)) == []
    ours, theirs = store.metadata(NAME), read_store.metadata(NAME)
    for key in ("fingerprint", "identity", "tokenizer", "statistics", "contrast", "recipe"):
        assert ours[key] == theirs[key]
    assert pulled.left_behind == {"table": 8, "model": 3, "source": 1}


def test_a_pulled_version_pushed_again_keeps_its_licence_and_says_where_it_came_from(read_store, store, tmp_path):
    read_store.export(NAME, tmp_path / "pushed", licence="mit")
    bring_in(store.root, tmp_path / "pushed", str(tmp_path / "pushed"))
    record = json.loads(store.export(NAME, tmp_path / "again")[-1].read_text())
    first = json.loads((tmp_path / "pushed" / "tokenweights.json").read_text())
    assert record["licence"] == "mit"
    assert record["shards"] == first["shards"]
    assert [row["name"] for row in record["lineage"]] == [
        f"weights/{NAME}",
        f"…/{tmp_path.name}/pushed",
        *(row["name"] for row in first["lineage"]),
    ]


def test_many_groups_and_splits_come_back_in_their_order(tmp_path, store, monkeypatch):
    rng, big = np.random.default_rng(0), WeightStore(tmp_path / "big")
    monkeypatch.setattr("weights_store.tables.shards.ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr("weights_store.tables.shards.SHARD_BYTES", 20_000)
    monkeypatch.setattr("weights_store.sharing.data_files.GROUP_BYTES", 5000)  # other groups than those of the store
    monkeypatch.setattr("weights_store.sharing.data_files.FILE_BYTES", 12_000)
    identity = {"settings": {"weights": {"estimator": "uniform"}, "contrast": {}}}
    metadata = {"fingerprint": fingerprint(identity), "identity": identity, "tokenizer": {"vocab_size": 100}}
    metadata |= {"statistics": {"num_pairs": 300, "num_response_tokens": 1}, "parents": []}
    for commit in range(3):
        rows = []
        for number in range(100):
            row = {"pair_id": f"{rng.integers(2**40):011x}", "pair_weight": 1.0, "prompt_ids": [commit, number]}
            row["split"] = ("train", "test", "a/b")[int(rng.integers(3))]
            for side in ("chosen", "rejected"):
                ids = rng.integers(0, 99, rng.integers(1, 20))
                row |= {f"{side}_ids": ids, f"{side}_token_weights": rng.random(len(ids))}
                row[f"{side}_ref_logps"] = -rng.random(len(ids))
            rows.append(row)
        big.table("weights/big/one").append(pa.Table.from_pylist(rows, WEIGHTS), metadata)
    *files, _ = big.export("big/one", tmp_path / "pushed")
    assert len(files) > 6
    bring_in(store.root, tmp_path / "pushed", HUB)
    here, there = store.table("weights/big/one"), big.table("weights/big/one")
    assert len(contents(there)) > 3
    assert max(len(record.group_sizes) for record in there.records()) > 2
    assert contents(here) == contents(there)
    read = [pa.concat_tables(table.batches()) for table in (here, there)]
    assert read[0].equals(read[1])  # in the order that a training reads


def test_lineage_and_show_say_where_weights_were_pulled_from(read_store, folder, store, monkeypatch, capsys):
    import tokenweights

    bring_in(store.root, folder, HUB, "5" * 40)
    ours, theirs = store.lineage(NAME), read_store.lineage(NAME)
    assert ours.select("depth", "role", "name").rows()[:2] == [
        (0, "weights", f"weights/{NAME}"),
        (1, "pulled from", f"{HUB}@{'5' * 40}"),
    ]
    columns = ("role", "kind", "name", "version", "fingerprint", "num_rows")
    assert ours[2:].select(columns).rows() == theirs.select(columns).rows()
    assert (ours["depth"][2:] - theirs["depth"]).unique().to_list() == [2]
    assert ours["created"][2] == theirs["created"][0].replace(microsecond=0)
    assert tokenweights.main(["show", NAME, "--store", str(store.root)]) == 0
    assert f"made from\n  {HUB}@{'5' * 40}, where it was {NAME}@1\n" in capsys.readouterr().out
    assert store.survey(NAME).chosen.num_tokens == 3 + 4 + 2 + 1  # the views of a version need none of its parents
    assert store.scan_tokens(NAME).collect().height == 21
    assert store.diff(NAME, NAME).num_common == 4


def test_pulling_again_changes_nothing_and_another_push_makes_a_version(read_store, folder, store, tmp_path):
    bring_in(store.root, folder, HUB, "5" * 40)
    assert not bring_in(store.root, folder, HUB, "6" * 40).is_new
    read_store.export(NAME, tmp_path / "older", version=0)
    pulled = bring_in(store.root, tmp_path / "older", HUB, "7" * 40)
    assert (pulled.weights.version, pulled.is_new) == (1, True)
    assert contents(store.table(f"weights/{NAME}")) == contents(read_store.table(f"weights/{NAME}"), 0)
    assert [line.split(":")[0] for line in store.metadata(NAME)["changes"]] == [
        f"data.{role}" for role in ("negative_logps", "positive_logps", "ref_logps", "tokens")
    ]
    assert store.scan(NAME, 0).collect().height == 4  # the first one stays


def test_a_dataset_of_the_same_name_is_not_written_over(small_store, folder, tmp_path):
    small_store.export("hh-harmless/reversed", tmp_path / "other")
    with pytest.raises(
        InputError, match=r"tis-dpo@1 already, which was built here; give this one another name with --as"
    ):
        bring_in(small_store.root, tmp_path / "other", HUB, name=NAME)
    assert bring_in(small_store.root, tmp_path / "other", HUB, name="pulled/one").weights.table == "weights/pulled/one"
    with pytest.raises(InputError, match=f"already, which was pulled from {HUB}; give"):
        bring_in(small_store.root, folder, "hf://datasets/somebody/else", name="pulled/one")
    with pytest.raises(SettingsError, match="bad name '../x'"):
        bring_in(small_store.root, folder, HUB, name="../x")


@pytest.mark.parametrize("is_same", [True, False])
def test_of_two_pulls_at_once_the_second_is_done_if_the_first_brought_the_same_rows(
    read_store, folder, store, tmp_path, monkeypatch, is_same
):
    def commit_after_another(self, *arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setattr("weights_store.tables.table.Table.commit", commit)
            bring_in(store.root, folder if is_same else tmp_path / "older", HUB)
        return commit(self, *arguments, **keywords)

    read_store.export(NAME, tmp_path / "older", version=0)
    table, commit = store.table(f"weights/{NAME}"), Table.commit
    monkeypatch.setattr("weights_store.tables.table.Table.commit", commit_after_another)
    if is_same:
        pulled = bring_in(store.root, folder, HUB)
        assert (pulled.weights.version, pulled.is_new, pulled.num_pairs) == (0, False, 4)
    else:
        with pytest.raises(ConflictError, match="another writer made version 0 first; run again"):
            bring_in(store.root, folder, HUB)
    names = {path.name for path in table.location.path.glob("*-?????.parquet")}
    assert names == {record.name for record in table.records()}


def test_a_dataset_inside_the_folder_of_another_is_refused_before_its_rows_are_read(folder, store):
    bring_in(store.root, folder, HUB)
    before = sorted(store.root.path.rglob("*"))
    with pytest.raises(StoreError, match=f"weights/{NAME}/x and the table weights/{NAME} in .* would be nested"):
        bring_in(store.root, folder, HUB, name=f"{NAME}/x")
    assert sorted(store.root.path.rglob("*")) == before


ROW = {"depth": 0, "role": "x", "kind": "model", "created": None}
SHARD = {"num_rows": 3, "first_key": "a", "last_key": "c", "checksums": {}}


def nothing_was_made(store):
    return not any(path.is_file() for path in store.root.path.rglob("*"))


@pytest.mark.parametrize("place", [4, 2000, -60])
def test_a_changed_byte_is_refused(folder, store, place):
    path = folder / "data" / "train-00000-of-00001.parquet"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{HUB}: data/train-00000-of-00001.parquet is not the file that was pushed"):
        bring_in(store.root, folder, HUB)
    assert nothing_was_made(store)


def test_a_missing_file_and_a_missing_or_changed_record_are_refused(folder, store):
    (folder / "data" / "test-00000-of-00001.parquet").rename(folder / "kept")
    with pytest.raises(
        InputError, match=r"data/test-00000-of-00001.parquet is missing, or cannot be read: No such file"
    ):
        bring_in(store.root, folder, HUB)
    text = (folder / "tokenweights.json").read_text()
    (folder / "tokenweights.json").write_text(text.replace('"num_pairs": 3', '"num_pairs": 2'))
    with pytest.raises(InputError, match=r"tokenweights.json is not as it was written: its SHA-256 is"):
        bring_in(store.root, folder, HUB)
    (folder / "tokenweights.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenweights.json: it is not a weight dataset that"):
        bring_in(store.root, folder, HUB)
    assert nothing_was_made(store)


@pytest.mark.parametrize(
    "name", ["../secret.parquet", "/etc/passwd", "data/../../x.parquet", "data/x/y-00000-of-00001.parquet"]
)
def test_no_name_in_a_record_leads_out_of_the_folder(folder, store, name):
    resign(folder, splits={"train": {"files": [name]}})
    with pytest.raises(InputError, match=r"names the file .*, expected data/SPLIT-00000-of-00001.parquet"):
        bring_in(store.root, folder, HUB)


def set_column(rows, name, values):
    index = rows.column_names.index(name)
    return rows.set_column(index, rows.field(index), pa.array(values, rows.field(index).type))


def set_weight(rows):
    weights = [[5.0, *row[1:]] for row in rows["chosen_token_weights"].to_pylist()]
    return set_column(rows, "chosen_token_weights", weights)


FORGERIES = {
    "other weights": (set_weight, "the rows of shard 0 are not those that tokenweights.json promises"),
    "a row less": (lambda rows: rows.slice(1), "rows 0 to 2 of the version are not all there once"),
    "a row twice": (lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]), "rows 0 to 2 of the version"),
    "a row more": (
        lambda rows: pa.concat_tables([rows, set_column(rows.slice(0, 1), "row", [9])]),
        "its files have more rows than tokenweights.json says",
    ),
    "no ids": (lambda rows: rows.drop_columns(["chosen_ids"]), "train-00000-of-00001.parquet cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_file_that_was_changed_together_with_its_digest_is_refused_by_the_content(folder, store, kind):
    change, problem = FORGERIES[kind]
    rewrite(folder, "train-00000-of-00001.parquet", change)
    resign(folder)
    with pytest.raises(InputError, match=problem):
        bring_in(store.root, folder, HUB)
    assert nothing_was_made(store)


def test_a_record_of_other_settings_than_its_fingerprint_is_refused(folder, store):
    record = json.loads((folder / "tokenweights.json").read_text())
    record["identity"]["settings"]["weights"]["k"] = 2.0
    resign(folder, identity=record["identity"])
    with pytest.raises(InputError, match="the fingerprint of the dataset is .*tokenweights.json was changed"):
        bring_in(store.root, folder, HUB)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema_version": 2}, "has schema version 2, this tokenweights reads 1"),
        ({"shards": None}, "has no shards as a weight dataset in Parquet has them"),
        ({"shards": [{"num_rows": "3"}]}, "has no shards as"),
        ({"shards": [{**SHARD, "group_sizes": []}]}, "has no shards as"),
        ({"shards": [{**SHARD, "group_sizes": [2, 2]}]}, "has no shards as"),
        ({"lineage": ["x"]}, "has no lineage as"),
        ({"lineage": [{**ROW, "created": "soon"}]}, "has no lineage as"),
        ({"splits": {"train": {"files": 3}}}, "has no splits as"),
        ({"splits": {"train": {"files": []}}}, "rows 0 to 2 of the version are not all there once"),
        ({"splits": {"train": {"files": ["README.md"]}}}, "names the file 'README.md', expected data/SPLIT"),
        ({"shards": [{**SHARD, "group_sizes": [3], "checksums": {"split": 7}}]}, "has no shards as"),
        ({"shards": [{**SHARD, "group_sizes": [3], "checksums": {"split": "many"}}]}, "has no shards as"),
        ({"lineage": [{**ROW, "depth": 10**9}]}, "has no lineage as"),  # which would be printed as so many blanks
        ({"identity": {"settings": []}}, "has no identity as"),
        ({"identity": {"settings": {"weights": {"estimator": "tis"}, "contrast": None}}}, "has no identity as"),
        ({"identity": {"settings": {"weights": {}, "contrast": {}}}}, "has no identity as"),
        ({"statistics": {"num_pairs": 4}}, "has no statistics as"),
        ({"recipe": {"dataset": "x"}}, "has no recipe as"),
        ({"tokenizer": ["x"]}, "has no tokenizer as"),
        ({"tokenizer": {"vocab_size": "32"}}, "has no tokenizer as"),
        ({"recipe": ["x"], "git_commit": 3}, "has no recipe and no git_commit as"),
        ({"name": "../../x@1"}, "bad name '../../x'"),
    ],
)
def test_a_record_of_another_shape_is_refused(folder, store, changes, problem):
    resign(folder, **changes)
    with pytest.raises((InputError, SettingsError), match=problem):
        bring_in(store.root, folder, HUB)
    assert nothing_was_made(store)


def test_a_section_of_the_recipe_that_is_not_used_may_be_null(folder, store):
    recipe = json.loads((folder / "tokenweights.json").read_text())["recipe"]
    resign(folder, recipe={**recipe, "anchors": None})
    assert bring_in(store.root, folder, HUB).is_new
    assert store.metadata(NAME)["recipe"]["anchors"] is None


def test_rows_that_break_a_rule_of_weights_are_refused_although_they_are_as_pushed(small_store, store, tmp_path):
    rows = small_store.scan(NAME).with_columns(pl.col("chosen_token_weights").list.eval(-pl.element())).collect()
    small_store.table("weights/bad/signs").append(rows.to_arrow(), small_store.metadata(NAME))
    small_store.export("bad/signs", tmp_path / "pushed")
    with pytest.raises(InputError, match=r"pair a: .*chosen_token_weights.*; whoever pushed it must build it again"):
        bring_in(store.root, tmp_path / "pushed", HUB)
    assert nothing_was_made(store)


def test_what_is_interrupted_leaves_no_shard_behind(folder, store, monkeypatch):
    monkeypatch.setattr(
        "weights_store.sharing.bring_in._Groups.check_end", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        bring_in(store.root, folder, HUB)
    assert nothing_was_made(store)


def test_a_jsonl_export_is_no_folder_to_pull(read_store, store, tmp_path):
    read_store.export(NAME, tmp_path / "lines", format="jsonl")
    with pytest.raises(InputError, match="has no shards as a weight dataset in Parquet has them; pull what"):
        bring_in(store.root, tmp_path / "lines", HUB)
