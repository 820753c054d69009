import json
import re
from collections import Counter

import polars as pl
import pyarrow as pa
import pytest

from pipeline.stages.prepare import prepare
from weights_store import Table, WeightStore
from weights_store.errors import InputError, StoreError
from weights_store.names import quarantine_path
from weights_store.schemas import QUARANTINE


def assistant(content):
    return [{"role": "assistant", "content": content}]


def pair(index, chosen="the baker mixes", rejected="the sailor steers"):
    prompt = [{"role": "user", "content": f"question {index}"}]
    return {"prompt": prompt, "chosen": assistant(chosen), "rejected": assistant(rejected)}


BAD_ROWS = [
    (b'{"prompt": "p", "chosen": "a", ', "unparsable_json"),
    (b'{"prompt": "p", "chosen": "\xff\xfe", "rejected": "b"}', "invalid_utf8"),
    (b"[1, 2]", "unparsable_json"),
    ({"prompt": "p", "chosen": "a", "rejected": None}, "missing_value"),
    ({"prompt": "p", "chosen": 17, "rejected": "b"}, "not_text"),
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_response"),
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen_equals_rejected"),
    ({"prompt": "p", "chosen": "word " * 90, "rejected": "b"}, "response_too_long"),
    ({"prompt": "word " * 200, "chosen": "a", "rejected": "b"}, "prompt_too_long"),
    ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "no_final_assistant_turn"),
    ({"chosen": "a", "rejected": "b"}, "no_prompt"),
    (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "invalid_utf8"),
    (pair(1), "duplicate_pair"),
]


@pytest.fixture
def run(make_recipe, toy_model, tmp_path, write_jsonl):
    def run_on(rows, **settings):
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        settings = {"dataset.max_response_tokens": 60, "dataset.max_prompt_tokens": 100, **settings}
        recipe = make_recipe(**settings)
        return prepare(recipe, toy_model)

    return run_on


def tables(prepared):
    store = WeightStore(prepared.tokens.store)
    tokens = store.table(prepared.tokens.table).scan(prepared.tokens.version).collect()
    return tokens, store.table(quarantine_path(prepared.tokens.table)).scan().collect()


def test_every_bad_row_is_quarantined_with_its_reason_and_the_rest_goes_on(run):
    rows = [pair(0), pair(1), *(row for row, _ in BAD_ROWS), pair(2)]
    prepared = run(rows)
    tokens, quarantine = tables(prepared)
    assert prepared.quarantined == dict(Counter(reason for _, reason in BAD_ROWS))
    by_row = dict(zip(quarantine["source_row"], quarantine["reason"], strict=True))
    assert by_row == {2 + index: reason for index, (_, reason) in enumerate(BAD_ROWS)}
    assert sorted(tokens["source_row"]) == [0, 1, 2 + len(BAD_ROWS)]
    assert prepared.num_source_rows == len(rows) == tokens.height + quarantine.height


def test_quarantine_keeps_what_was_in_the_row(run):
    _, quarantine = tables(run([pair(0), BAD_ROWS[0][0], BAD_ROWS[1][0]]))
    assert quarantine["raw"][0] == '{"prompt": "p", "chosen": "a",'
    assert "\ufffd" in quarantine["raw"][1]


def test_same_file_again_does_nothing(run):
    first = run([pair(0), pair(1), BAD_ROWS[0][0]])
    again = run([pair(0), pair(1), BAD_ROWS[0][0]])
    assert (again.tokens, again.num_new_pairs) == (first.tokens, 0)
    assert again.quarantined == first.quarantined


def test_appended_rows_make_a_version_with_only_them_new(run):
    first = run([pair(0), pair(1)])
    second = run([pair(0), pair(1), pair(2)])
    assert (second.num_new_pairs, second.tokens.version) == (1, first.tokens.version + 1)
    assert tables(second)[0].height == 3
    assert tables(first)[0].height == 2


def test_pairs_that_left_the_source_leave_the_newest_version(run):
    first = run([pair(0), pair(1), pair(2)])
    second = run([pair(2), pair(0), pair(3)])
    kept = set(tables(second)[0]["pair_id"])
    assert len(kept) == 3
    assert len(kept & set(tables(first)[0]["pair_id"])) == 2
    assert tables(first)[0].height == 3


def test_pairs_that_moved_in_the_source_are_recorded_where_they_stand_now(run):
    run([pair(0), pair(1)])
    moved = run([BAD_ROWS[0][0], pair(1), pair(0), pair(2)])
    tokens, quarantine = tables(moved)
    assert (moved.num_new_pairs, quarantine["source_row"].to_list()) == (1, [0])
    by_question = {json.loads(row["prompt"])[0]["content"]: row["source_row"] for row in tokens.iter_rows(named=True)}
    assert by_question == {"question 1": 1, "question 0": 2, "question 2": 3}


def test_columns_read_the_other_way_round_turn_every_pair(run):
    first, _ = tables(run([pair(0), pair(1)]))
    swapped = run([pair(0), pair(1)], **{"dataset.chosen_column": "rejected", "dataset.rejected_column": "chosen"})
    second, _ = tables(swapped)
    assert second["chosen_ids"].to_list() == first["rejected_ids"].to_list()
    assert set(second["pair_id"]).isdisjoint(first["pair_id"])


def test_another_split_name_reaches_the_rows_that_were_there(run):
    first = run([pair(0)])
    second = run([pair(0)], **{"dataset.split": "validation"})
    assert tables(second)[0]["split"].to_list() == ["validation"]
    assert second.tokens.fingerprint != first.tokens.fingerprint


def test_byte_order_mark_is_no_broken_line(run, tmp_path, make_recipe, toy_model):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(pair(0)).encode())
    prepared = prepare(make_recipe(**{"dataset.source": str(path)}), toy_model)
    assert (prepared.num_pairs, prepared.quarantined) == (1, {})


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.json"])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_files_that_are_not_what_they_are_called_say_so(tmp_path, make_recipe, toy_model, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"dataset.source .*{name} is not"):
        prepare(make_recipe(**{"dataset.source": str(tmp_path / name)}), toy_model)


def test_another_limit_is_another_table(run):
    first = run([pair(0)])
    second = run([pair(0)], **{"dataset.max_response_tokens": 59})
    assert first.tokens.table != second.tokens.table


def test_max_pairs_takes_the_first_rows(run):
    prepared = run([pair(index) for index in range(5)], **{"dataset.max_pairs": 2})
    assert sorted(tables(prepared)[0]["source_row"]) == [0, 1]


def test_a_source_without_a_usable_pair_says_what_was_wrong(run):
    with pytest.raises(
        InputError, match="no usable pair in 2 rows .*1 unparsable_json, 1 not_text|1 not_text, 1 unparsable_json"
    ):
        run([BAD_ROWS[0][0], BAD_ROWS[4][0]])


def test_a_missing_column_names_the_columns_that_are_there(run):
    with pytest.raises(
        InputError, match=r"no column 'better'; it has prompt, chosen, rejected\. Set dataset.chosen_column"
    ):
        run([pair(0)], **{"dataset.chosen_column": "better"})


def test_parquet_json_and_jsonl_of_the_same_rows_give_the_same_pairs(run, tmp_path, make_recipe, toy_model):
    rows = [pair(0), pair(1)]
    ids = {".jsonl": set(tables(run(rows))[0]["pair_id"])}
    pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for suffix in (".parquet", ".json"):
        recipe = make_recipe(**{"dataset.source": str(tmp_path / f"x{suffix}"), "dataset.name": f"toy{suffix[1:]}"})
        ids[suffix] = set(tables(prepare(recipe, toy_model))[0]["pair_id"])
    assert ids[".jsonl"] == ids[".parquet"] == ids[".json"]


def test_saved_dataset_folder_is_read_like_a_hub_dataset(run, tmp_path, make_recipe, toy_model):
    from datasets import Dataset

    ids = set(tables(run([pair(0), pair(1)]))[0]["pair_id"])
    Dataset.from_list([pair(0), pair(1)]).save_to_disk(str(tmp_path / "saved"))
    recipe = make_recipe(**{"dataset.source": str(tmp_path / "saved"), "dataset.name": "saved"})
    first = prepare(recipe, toy_model)
    assert set(tables(first)[0]["pair_id"]) == ids
    assert prepare(recipe, toy_model).tokens == first.tokens  # read again, found the same


def test_the_same_pairs_among_other_bad_rows_make_a_version_that_says_so(run):
    first = run([pair(0), pair(1)])
    second = run([pair(0), BAD_ROWS[0][0], pair(1)])
    assert (second.num_source_rows, second.num_new_pairs, second.quarantined) == (3, 0, {"unparsable_json": 1})
    assert second.tokens.version == first.tokens.version + 1
    assert (
        second.tokens.fingerprint == first.tokens.fingerprint
    )  # the pairs are the same: nothing after prepare has to run again


@pytest.mark.parametrize("second_rows", [[0, 1, 2, 3, 4, 5, 6, 7], [6, 2, 9, 0, 8]])
def test_little_memory_gives_the_same_tables(run, monkeypatch, second_rows):
    # Appended, and once with pairs that left, moved and came, with memory for about one pair at a time.
    def both_builds(name):
        run([*(pair(index) for index in range(5)), pair(3), BAD_ROWS[0][0]], **{"dataset.name": name})
        prepared = run([*(pair(index) for index in second_rows), BAD_ROWS[1][0]], **{"dataset.name": name})
        tokens, quarantine = tables(prepared)
        return prepared, tokens.sort("pair_id"), quarantine.sort("source_row")

    roomy, tokens, quarantine = both_builds("roomy")
    monkeypatch.setattr("pipeline.source.external_sort.DEFAULT_BYTES", 300)
    monkeypatch.setattr("pipeline.stages.prepare.ROWS_PER_BATCH", 2)
    monkeypatch.setattr("pipeline.source.intake.ROWS_PER_BATCH", 2)
    tight, tight_tokens, tight_quarantine = both_builds("tight")
    assert tight_tokens.equals(tokens)
    assert tight_quarantine.equals(quarantine)
    assert tight.tokens.fingerprint == roomy.tokens.fingerprint
    assert (tight.num_new_pairs, tight.quarantined) == (roomy.num_new_pairs, roomy.quarantined)


def test_what_a_scorer_could_not_score_stays_in_quarantine_when_rows_are_added(run):
    first = run([pair(0), pair(1)])
    table = WeightStore(first.tokens.store).table(quarantine_path(first.tokens.table))
    pair_id = tables(first)[0]["pair_id"][0]
    row = {"source_row": 0, "pair_id": pair_id, "reason": "unscorable", "detail": "logps/x: too long", "raw": ""}
    table.append(pa.Table.from_pylist([row], QUARANTINE), table.metadata())
    _, quarantine = tables(run([pair(0), pair(1), BAD_ROWS[0][0]]))
    assert quarantine["reason"].to_list() == ["unscorable", "unparsable_json"]


def test_another_build_of_the_same_dataset_that_was_faster_is_compared_with_again(run, monkeypatch):
    # The other build appends pair 2 between our look and our first commit.
    run([pair(0), pair(1)])
    original, raced = Table.commit, []

    def commit(table, *args, **settings):
        if not raced:
            raced.append(True)
            run([pair(0), pair(1), pair(2)])
        return original(table, *args, **settings)

    monkeypatch.setattr(Table, "commit", commit)
    prepared = run([pair(0), pair(1), pair(2), pair(3)])
    assert raced
    assert sorted(tables(prepared)[0]["source_row"]) == [0, 1, 2, 3]
    assert prepared.num_new_pairs == 1


def test_another_limit_says_what_differs(run, make_recipe, toy_model, caplog):
    run([pair(0)])
    caplog.set_level("INFO", "tokenweights")
    settings = {"dataset.max_response_tokens": 59, "dataset.max_prompt_tokens": 100}
    prepare(make_recipe(**settings), toy_model)
    assert "is a new table; unlike tokens/toy-" in caplog.text
    assert "max_response_tokens: 60 -> 59" in caplog.text


def test_real_transcripts(shared_folder, make_recipe):
    recipe = make_recipe(**{"dataset.source": str(shared_folder / "data" / "hh_harmless.jsonl"), "dataset.name": "hh"})
    prepared = prepare(recipe, shared_folder / "models" / "tiny-chat")
    assert prepared.num_source_rows == 1775
    assert prepared.num_pairs + sum(prepared.quarantined.values()) == 1775
    assert prepared.quarantined == {"empty_response": 3, "prompts_differ": 4}


@pytest.mark.parametrize("free_kib", [0, 8, 24])
def test_a_full_disk_is_one_line_and_a_later_run_goes_on(run, disk, free_kib):
    folder, _ = disk
    (folder / "filler").write_bytes(bytes((1 << 20) - (free_kib << 10)))
    rows = [pair(index, chosen=f"the baker mixes {index}") for index in range(400)]
    with pytest.raises(StoreError) as caught:
        run(rows, **{"store.uri": str(folder / "store")})
    text = str(caught.value)
    assert re.match(rf"cannot write (tokens|quarantine)/toy-\w+ in {folder}/store: .*No space left on device", text)
    assert text.endswith("; nothing became visible; make room and run again")
    (folder / "filler").unlink()
    assert run(rows, **{"store.uri": str(folder / "store")}).num_pairs == 400
