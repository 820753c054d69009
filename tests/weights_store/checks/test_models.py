"""Verify finds what is wrong with the contrastive models of a store, and which weight datasets lack theirs."""

import json
import random
import shutil

import pytest

from weights_store.checks.model_folders import model_name, sign_record
from weights_store.checks.verify import verify
from weights_store.fingerprint import combine_model, fingerprint, fingerprint_file

NAME = "weights/hh-harmless/tis-dpo"
UNIFORM = "weights/hh-harmless/uniform"


@pytest.fixture
def folders(small_store, model_places):
    """The folders of the two models of the small store, by side."""
    return {side: small_store.root.path / place for side, place in model_places.items()}


def findings(store, *tables):
    """What is wrong with models of a store: the small store's tables have findings of their own."""
    found = list(verify(store, tables or None))
    return [
        finding for finding in found if finding.table.startswith("models/") or "model that scored" in finding.problem
    ]


def place(folder):
    return f"models/{folder.name}"


def test_sound_models_have_no_finding(small_store):
    assert findings(small_store) == []
    assert findings(small_store, NAME) == []


def test_each_flipped_bit_of_a_model_is_a_finding_in_its_place(small_store, folders):
    rng, folder = random.Random(15), folders["positive"]
    for name in ("config.json", "model.safetensors", "contrast.json"):
        whole = (folder / name).read_bytes()
        for bit in rng.sample(range(8 * len(whole)), 6):
            flipped = bytearray(whole)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            (finding,) = findings(small_store)
            assert (finding.table, finding.is_note) == (place(folder), False)
            assert finding.problem.startswith((f"{name} is damaged: ", f"{name} is the record of another model"))
        (folder / name).write_bytes(whole)


def test_missing_cut_and_foreign_files_are_findings(small_store, folders):
    positive, negative = folders["positive"], folders["negative"]
    (positive / "config.json").unlink()
    (positive / "pytorch_model.bin").write_bytes(b"")
    (negative / "model.safetensors").write_bytes(b"negative we")
    found = {(finding.table, finding.problem.partition(";")[0].partition(":")[0]) for finding in findings(small_store)}
    assert found == {
        (place(positive), "config.json is missing"),
        (place(positive), "pytorch_model.bin is not of this model"),
        (place(negative), "model.safetensors is damaged"),
    }


def test_a_model_in_a_folder_of_another_name_is_a_finding(small_store, folders):
    folders["positive"].rename(folders["positive"].with_name("0" * 16))
    (finding,) = findings(small_store)
    assert finding.table == f"models/{'0' * 16}"
    assert finding.problem.startswith(f"contrast.json is the record of another model, {folders['positive'].name}; ")


def test_a_missing_model_is_a_finding_of_the_newest_weights_that_it_made(small_store, folders):
    shutil.rmtree(folders["negative"])
    found = findings(small_store)
    assert [(finding.table, finding.version) for finding in found] == [("weights/hh-harmless/reversed", 0), (NAME, 1)]
    expected = (
        f"the negative model that scored for it, {fingerprint('negative model')[:12]}…, is not in models/; restore it"
    )
    assert all(finding.problem.startswith(expected) for finding in found)
    assert findings(small_store, UNIFORM) == []


def test_a_model_without_a_record_is_unfinished_and_no_finding_unless_weights_need_it(small_store, folders):
    unfinished = folders["positive"].with_name("1" * 16)
    unfinished.mkdir()
    (unfinished / "train.json").write_text("{")
    assert findings(small_store) == []
    (folders["positive"] / "contrast.json").unlink()
    assert {finding.table for finding in findings(small_store)} == {"weights/hh-harmless/reversed", NAME}


def test_named_weights_are_checked_with_the_models_that_made_them(small_store, folders):
    (folders["positive"] / "model.safetensors").write_bytes(b"positive weighty")
    assert [finding.table for finding in findings(small_store, NAME)] == [place(folders["positive"])]
    assert findings(small_store, UNIFORM) == []


def test_training_data_that_are_gone_or_another_version_are_a_finding(small_store, folders):
    record = json.loads((folders["positive"] / "contrast.json").read_text())
    files = record.pop("files")
    del record["sha256"]
    (folders["positive"] / "contrast.json").write_bytes(sign_record(record | {"version": 7}, files))
    (finding,) = findings(small_store)
    assert (finding.table, finding.problem) == (
        place(folders["positive"]), f"its parent {UNIFORM}@7 is not in the store"
    )  # fmt: skip


def test_a_record_of_an_earlier_version_is_a_note_and_its_fingerprint_is_compared(small_store, folders):
    folder = folders["positive"]
    weights = {"model.safetensors": fingerprint_file(folder / "model.safetensors")}
    made = combine_model({"vocab_size": 10}, weights)
    old = {key: json.loads((folder / "contrast.json").read_text())[key] for key in ("identity", "data", "version")}
    assert folder.name == model_name(old["identity"], old["data"])
    for more, covered in (({}, "no file"), ({"fingerprint": made}, "only weights and config.json")):
        (folder / "contrast.json").write_text(json.dumps({**old, **more}))
        note, *others = (finding for finding in findings(small_store) if finding.table == place(folder))
        assert (note.is_note, others) == (True, [])
        assert note.problem == f"its record is of an earlier version and covers {covered}"
    (folder / "model.safetensors").write_bytes(b"other")
    finding, note = (finding for finding in findings(small_store) if finding.table == place(folder))
    assert finding.problem.startswith("weights or config.json are damaged: their fingerprint is ")
    assert (finding.is_note, note.is_note) == (False, True)
