"""The store's commands as a person meets them, on the small store."""

import json
import os
import time

import pytest

import tokenweights

NAME = "hh-harmless/tis-dpo"
LOGPS = "logps/hh-harmless-0123456789ab/ref"


@pytest.fixture
def command(capsys, small_store):
    def run(*arguments):
        code = tokenweights.main([*arguments, "--store", str(small_store.root)])
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_ls_has_one_aligned_line_per_dataset(command):
    code, out, _ = command("ls")
    head, *lines = out.splitlines()
    assert (code, [line.split()[:2] for line in lines]) == (
        0,
        [["hh-harmless/reversed", "0"], ["hh-harmless/tis-dpo", "1"], ["hh-harmless/uniform", "0"]],
    )
    # Numbers end where their heading ends.
    assert {line[: head.index("version") + len("version")][-1] for line in lines} == {"0", "1"}


def test_show_has_statistics_parents_versions_and_rows(command):
    code, out, _ = command("show", f"{NAME}@0")
    assert code == 0
    assert out.startswith(f"weights/{NAME}@0  fingerprint ")
    assert "  num_response_tokens                 19\n" in out
    assert "  tokens          tokens/hh-harmless-0123456789ab@0  " in out
    # b: prompt 1, chosen 4, rejected 3 tokens; mean weights 7 / 4 and 4.5 / 3.
    assert ["b", "train", "1", "4", "3", "1.7500", "1.5000"] in rows(out)


def test_history_gives_each_change_a_line_of_its_own(command):
    code, out, _ = command("history", NAME)
    assert code == 0
    newest, *more, oldest = rows(out)[1:]
    assert (newest[0], newest[8], oldest[0]) == ("1", "data.negative_logps:", "0")
    assert [line[0] for line in more] == ["data.positive_logps:", "data.ref_logps:", "data.tokens:"]


def test_lineage_is_indented_by_depth(command):
    code, out, _ = command("lineage", NAME)
    lines = out.splitlines()
    assert code == 0
    assert lines[1].startswith("weights  ")
    assert lines[2].startswith("  tokens  ")
    assert lines[3].startswith("    source  ")
    assert "data/hh_harmless.jsonl  " in lines[3]


def test_diff_says_settings_pairs_and_weights(command):
    code, out, _ = command("diff", NAME, "hh-harmless/reversed")
    assert code == 0
    assert '  settings.weights.estimator: "tis" -> "reversed"\n' in out
    assert ["4", "0", "0", "0"] in rows(out)
    assert ["chosen", "10", "8", "1.1500", "3.7500"] in rows(out)
    assert ["a", "rejected", "1.8750", "3.7500"] in rows(out)
    assert ["pair", "weights", "4", "0", "0.0000", "0.0000"] in rows(out)
    assert "anchors" not in out


def test_diff_counts_anchors_that_differ(ti_store, command):
    _, out, _ = command("diff", NAME, "hh-harmless/ti-dpo")
    assert "\nanchors: 4 pairs with another one or none\n" in out


def test_diff_of_the_same_has_no_largest_changes(command):
    _, out, _ = command("diff", NAME, NAME)
    assert "  no difference\n" in out
    assert "largest" not in out


def test_export_names_every_file(command, tmp_path):
    code, out, _ = command("export", f"{NAME}@0", str(tmp_path / "out"))
    assert code == 0
    assert [line[-1] for line in rows(out)] == [
        str(tmp_path / "out" / name) for name in ("part-00000.parquet", "tokenweights.json")
    ]
    code, _, err = command("export", NAME, str(tmp_path / "out"))
    assert (code, err.count("\n")) == (1, 1)
    assert "not an empty folder" in err


def test_export_for_the_release_says_how_to_read_it_and_what_is_missing(command, tmp_path):
    code, out, _ = command("export", NAME, str(tmp_path / "ids"), "--format", "jsonl")
    assert code == 0
    assert "with transform.method=origin" in out
    assert "give --tokenizer" in out


def test_export_takes_the_texts_from_a_model_folder(command, tmp_path, texts):
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel

    vocabulary = {texts.get(token_id, f"<{token_id}>"): token_id for token_id in range(10)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = ("export", f"{NAME}@0", str(tmp_path / "out"), "--format", "jsonl", "--tokenizer")
    code, out, _ = command(*arguments, str(tmp_path))
    assert code == 0
    assert "give --tokenizer" not in out
    first = json.loads((tmp_path / "out/train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (first["prompt"], first["chosen"], first["rejected"]) == ("Q?", "Yes sir", "No")
    code, _, err = command(*arguments, str(tmp_path / "none"))
    assert (code, err.count("\n")) == (1, 1)
    assert "has no tokenizer.json" in err


def test_verify_of_a_sound_store_is_one_line_on_stdout(command, small_store):
    code, out, _ = command("verify")
    assert (code, out) == (0, f"checked 8 tables in {small_store.root}: all as it was committed\n")


def test_verify_of_a_damaged_shard_is_exit_code_1_and_names_it(command, small_store):
    table = small_store.table(f"weights/{NAME}")
    path = table.location.path / table.shards()[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, out, _ = command("verify", NAME)
    *findings, summary = out.splitlines()
    assert code == 1
    assert any(path.name in finding for finding in findings)
    assert summary == f"checked 1 table in {small_store.root}: {len(findings)} finding" + "s" * (len(findings) > 1)
    assert command("verify", LOGPS)[0] == 0


def test_vacuum_deletes_only_when_told_to_and_only_what_is_old(command, small_store):
    folder = small_store.table(f"weights/{NAME}").location.path
    shard = sorted(folder.glob("*.parquet"))[0]
    old, young = (folder / f"{number:020d}-0123456789ab-00000.parquet" for number in (1, 2))
    for path in (old, young):
        path.write_bytes(shard.read_bytes())
    eight_days_ago = time.time() - 8 * 24 * 3600
    os.utime(old, (eight_days_ago, eight_days_ago))

    code, out, _ = command("verify", NAME)
    assert code == 0
    assert "2 files that no version needs" in out
    code, out, _ = command("vacuum")
    assert code == 0
    assert rows(out)[1][-1] == f"weights/{NAME}/{old.name}"
    assert "would delete 1 file, " in out
    assert old.exists()
    code, out, _ = command("vacuum", NAME, "--yes")
    assert "deleted 1 file, " in out
    assert (old.exists(), young.exists(), shard.exists()) == (False, True, True)
    _, out, _ = command("vacuum", "--yes")
    assert out.startswith("nothing to delete: no file that no version needs, older than 168 h, in ")
    command("vacuum", "--yes", "--retention-hours", "0")
    assert not young.exists()


@pytest.mark.parametrize(("argument", "path"), [(NAME, f"weights/{NAME}"), (LOGPS, LOGPS)])
def test_optimize_takes_names_and_tables_and_does_nothing_twice(command, small_store, argument, path):
    code, out, _ = command("optimize", argument)
    assert code == 0
    assert out.splitlines()[0] == f"{path}@1 -> @2 in {small_store.root}"
    assert out.splitlines()[1].startswith("  2 shards, ")
    assert " -> 1 shard, " in out
    code, out, _ = command("optimize", argument)
    assert code == 0
    assert out.startswith(f"{path}@2: nothing to do, 1 shard, ")
