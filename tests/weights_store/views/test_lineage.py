import json
import shutil

import polars as pl
import pytest

from weights_store.checks.model_folders import model_name
from weights_store.errors import DamageError, NotFoundError
from weights_store.fingerprint import fingerprint

NAME = "hh-harmless/tis-dpo"
KEY = "hh-harmless-0123456789ab"


def test_everything_up_to_the_raw_pairs_stands_there_once(small_store, model_places):
    # Pairs a, b, c in version 0, d on top in version 1. The contrastive models were trained on version 0's pairs.
    lineage = small_store.lineage(NAME)
    assert lineage.select("depth", "role", "kind", "name", "version", "num_rows").rows() == [
        (0, "weights", "table", f"weights/{NAME}", 1, 4),
        (1, "tokens", "table", f"tokens/{KEY}", 1, 4),
        (2, "source", "source", "data/hh_harmless.jsonl", None, 5),
        (2, "quarantine", "table", f"quarantine/{KEY}", 0, 1),
        (1, "ref_logps", "table", f"logps/{KEY}/ref", 1, 4),
        (2, "model", "model", "models/tiny-chat", None, None),
        (1, "positive_logps", "table", f"logps/{KEY}/positive", 1, 4),
        (2, "positive model", "model", model_places["positive"], None, None),
        (3, "trained on", "table", "weights/hh-harmless/uniform", 0, 3),
        (4, "tokens", "table", f"tokens/{KEY}", 0, 3),
        (4, "ref_logps", "table", f"logps/{KEY}/ref", 0, 3),
        (1, "negative_logps", "table", f"logps/{KEY}/negative", 1, 4),
        (2, "negative model", "model", model_places["negative"], None, None),
    ]


def test_fingerprints_are_the_recorded_ones(small_store):
    lineage = small_store.lineage(NAME)
    recorded = small_store.metadata(NAME)["parents"]
    shown = dict(zip(lineage["role"], lineage["fingerprint"], strict=True))
    assert shown["positive_logps"] == recorded[2]["fingerprint"]
    assert shown["source"] == "50" * 32
    assert shown["model"] == fingerprint("ref model")
    assert shown["positive model"] == fingerprint("positive model")


def test_times_are_those_of_the_commits(small_store):
    lineage = small_store.lineage(NAME, 0)
    assert lineage["created"][0] == small_store.history(NAME).row(-1, named=True)["created"]
    assert lineage.filter(kind="source")["created"].to_list() == [None]
    assert lineage.filter(role="positive model")["created"].null_count() == 0


def test_uniform_weights_have_no_contrastive_models(small_store):
    assert "positive model" not in small_store.lineage("hh-harmless/uniform")["role"].to_list()


def test_what_has_left_the_store_keeps_its_row_without_number_and_time(small_store):
    shutil.rmtree(small_store.root.path / "logps" / KEY / "negative")
    row = small_store.lineage(NAME).row(by_predicate=_role("negative_logps"), named=True)
    assert (row["version"], row["num_rows"], row["created"]) == (1, None, None)
    assert row["fingerprint"] == small_store.metadata(NAME)["parents"][3]["fingerprint"]


def test_another_table_in_the_place_of_a_parent_is_not_taken_for_it(small_store):
    table = small_store.table(f"logps/{KEY}/negative")
    rows = table.scan().collect().to_arrow()
    shutil.rmtree(table.location.path)
    for version in (0, 1):
        table.replace(rows, {"fingerprint": f"{version}" * 64})
    row = small_store.lineage(NAME).row(by_predicate=_role("negative_logps"), named=True)
    assert (row["num_rows"], row["created"]) == (None, None)


def test_models_of_other_settings_are_not_taken_for_the_pair(small_store, model_places):
    record = json.loads((small_store.root.path / model_places["positive"] / "contrast.json").read_text())
    shutil.rmtree(small_store.root.path / model_places["positive"])
    record["identity"]["training"]["seed"] = 7
    put_old_model(small_store, record)
    row = small_store.lineage(NAME).row(by_predicate=_role("positive_logps"), named=True)
    assert row["num_rows"] == 4
    assert "positive model" not in small_store.lineage(NAME)["role"].to_list()


def test_with_two_models_of_the_same_settings_both_stand_there_until_a_fingerprint_decides(small_store, model_places):
    record = json.loads((small_store.root.path / model_places["positive"] / "contrast.json").read_text())
    shutil.rmtree(small_store.root.path / model_places["positive"])
    first, later = record["data"], "da" * 32
    for data in (first, later):
        put_old_model(small_store, {**record, "data": data})
    assert small_store.lineage(NAME)["role"].to_list().count("positive model, one of 2") == 2
    for data, model in ((first, fingerprint("positive model")), (later, "ff")):
        place = put_old_model(small_store, {**record, "data": data}, fingerprint=model)
    lineage = small_store.lineage(NAME)
    assert lineage.filter(role="positive model")["name"].to_list() == [model_places["positive"]] != [place]


def test_a_model_that_is_gone_is_not_taken_for_the_starting_model(small_store, model_places):
    (small_store.root.path / model_places["negative"] / "contrast.json").unlink()
    row = small_store.lineage(NAME).row(by_predicate=_role("negative model, not in models/"), named=True)
    assert (row["name"], row["fingerprint"]) == (None, fingerprint("negative model"))
    assert row["created"] is None


def test_a_damaged_record_of_a_model_is_one_line(small_store, model_places):
    path = small_store.root.path / model_places["positive"] / "contrast.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        DamageError, match="^[^\n]*contrast.json is damaged: [^\n]*; restore it from a copy, or delete "
    ):
        small_store.lineage(NAME)


def put_old_model(store, record, **more):
    """Put a record on the shelf as earlier versions wrote it; return its place."""
    old = {key: record[key] for key in ("identity", "data", "version")}
    place = f"models/{model_name(old['identity'], old['data'])}"
    (store.root / place).write("contrast.json", json.dumps({**old, **more}).encode())
    return place


def test_unknown_versions_are_refused(small_store):
    with pytest.raises(NotFoundError, match="has no version 7"):
        small_store.lineage(NAME, 7)


def _role(role):
    return pl.col("role") == role
