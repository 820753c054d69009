"""The store's commands as a person meets them, on the small store."""

import json
import os
import re
import shutil
import time
from datetime import datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

import tokenweights
from weights_store.schemas import QUARANTINE

NAME = "hh-harmless/tis-dpo"
LOGPS = "logps/hh-harmless-0123456789ab/ref"


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_ls_has_one_aligned_line_per_dataset(command):
    code, out, _ = command("ls")
    head, *lines = out.splitlines()
    assert (code, [line.split()[:4] for line in lines]) == (
        0,
        [
            ["hh-harmless/reversed@0", "reversed", "(dpo)", "4"],
            ["hh-harmless/tis-dpo@1", "tis", "(dpo)", "4"],
            ["hh-harmless/uniform@0", "uniform", "3", "19"],
        ],
    )
    # Numbers and sizes end where their heading ends.
    assert [line[: head.index("pairs") + len("pairs")][-1] for line in lines] == ["4", "4", "3"]
    assert {line[: head.index("size") + len("size")][-3:] for line in lines} == {"KiB"}


def test_ls_shows_no_size_of_a_damaged_table(command, document, small_store):
    table = small_store.table(f"weights/{NAME}")
    (table.location.path / table.shards()[0]).unlink()
    assert command("ls")[0] == 0
    sizes = {row["name"]: row["num_bytes"] for row in document("ls")}
    other = small_store.files("hh-harmless/uniform")
    assert sizes["hh-harmless/uniform"] == sum(Path(file).stat().st_size for file in other)


def test_show_has_statistics_parents_versions_and_rows(command):
    code, out, _ = command("show", f"{NAME}@0")
    assert code == 0
    assert out.startswith(f"weights/{NAME}@0  fingerprint ")
    assert "  response tokens  19\n" in out
    assert "  weights          tis: k 1.0, mu 1.0, lower -0.5, upper 1.5\n" in out
    assert "  tokens          tokens/hh-harmless-0123456789ab@0  " in out
    # b: prompt 1, chosen 4, rejected 3 tokens; mean weights 7 / 4 and 4.5 / 3.
    assert ["train", "1", "4", "3", "1.7500", "1.5000", "b"] in rows(out)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ls"], ["own/made@0", "-", "4", "-"]),
        (["history", "own/made"], ["0", "4", "-", "f0"]),
        (["show", "own/made"], ["pairs", "4"]),
        (["diff", "own/made", NAME], ["4", "in", "both,", "0", "only", "in", "A,", "0", "only", "in", "B"]),
    ],
)
def test_weights_that_no_recipe_has_made_are_shown_with_what_is_known(command, small_store, arguments, line):
    small_store.table("weights/own/made").append(small_store.scan(NAME).collect().to_arrow(), {"fingerprint": "f0"})
    code, out, _ = command(*arguments)
    times = r" 20\d\d-\d\d-\d\d \d\d:\d\d| [\d.]+ KiB"
    assert (code, line in rows(re.sub(times, "", out))) == (0, True)


def test_history_gives_each_change_a_line_of_its_own(command):
    code, out, _ = command("history", NAME)
    assert code == 0
    newest, *more, oldest = rows(out)[1:]
    assert (newest[0], newest[6], oldest[0]) == ("1", "data.negative_logps:", "0")
    assert [line[0] for line in more] == ["data.positive_logps:", "data.ref_logps:", "data.tokens:"]


def test_lineage_is_indented_by_depth(command):
    code, out, _ = command("lineage", NAME)
    lines = out.splitlines()
    assert code == 0
    assert lines[1].startswith("weights  ")
    assert lines[2].startswith("  tokens  ")
    assert lines[3].startswith("    source  ")
    assert lines[3].endswith("  data/hh_harmless.jsonl")


def test_diff_says_settings_pairs_and_weights(command):
    code, out, _ = command("diff", NAME, "hh-harmless/reversed")
    assert code == 0
    assert '  settings.weights.estimator: "tis" -> "reversed"\n' in out
    assert "  4 in both, 0 only in A, 0 only in B\n" in out
    assert "other response tokens" not in out
    # 8 of 10 tokens differ; for the correlation see test_diff.py.
    assert ["chosen", "10", "80.0", "%", "1.3000", "1.1500", "1.1500", "3.7500", "-0.7967"] in rows(out)
    assert ["pair", "weights", "4", "0.0", "%", "1.0000", "1.0000", "0.0000", "0.0000", "-"] in rows(out)
    assert ["rejected", "0.6250", "2.5000", "1.8750", "3.7500", "a"] in rows(out)
    assert "anchors" not in out


def test_diff_counts_anchors_that_differ(ti_store, command):
    _, out, _ = command("diff", NAME, "hh-harmless/ti-dpo")
    assert "\nanchors: 4 pairs with another one or none\n" in out


def test_nothing_of_the_data_is_obeyed_by_the_terminal(small_store, command):
    evil = "\x1b[2J\u202e"
    metadata = small_store.metadata(NAME)
    statistics = {**metadata["statistics"], "num_pairs_by_split": {evil: 3, "test": 1}}
    identity = {**metadata["identity"], evil: evil}
    rows = small_store.scan(NAME).with_columns(pair_id=pl.col("pair_id") + evil, split=pl.lit(evil)).collect()
    table = small_store.table("weights/hh-harmless/evil")
    made = {**metadata, "statistics": statistics, "identity": identity}
    table.append(rows.to_arrow(), {**made, "changes": [evil]})
    halved = rows.with_columns(pl.col("chosen_token_weights") / 2)
    table.replace(halved.to_arrow(), {**metadata, "fingerprint": "other"})
    for arguments in (["show"], ["history"], ["lineage"], ["diff", "hh-harmless/evil@0"]):
        code, out, _ = command(*arguments, "hh-harmless/evil")
        assert code == 0
        assert not set(evil) & set(out) - set("[2J")
        assert "\\x1b[2J\\u202e" in out or arguments == ["lineage"]


def test_diff_of_the_same_has_no_largest_disagreements(command):
    _, out, _ = command("diff", NAME, NAME)
    assert "  no difference\n" in out
    assert "largest" not in out


def test_export_names_every_file(command, tmp_path):
    code, out, _ = command("export", f"{NAME}@0", str(tmp_path / "out"))
    assert code == 0
    assert [line[-1] for line in rows(out)] == [
        str(tmp_path / "out" / name) for name in ("data/train-00000-of-00001.parquet", "tokenweights.json")
    ]
    code, _, err = command("export", NAME, str(tmp_path / "out"))
    note, error = err.splitlines()
    assert (code, note[:21]) == (1, "ids instead of texts:")
    assert "not an empty folder" in error


def test_export_for_the_release_says_how_to_read_it_and_what_is_missing(command, tmp_path):
    code, out, _ = command("export", NAME, str(tmp_path / "ids"), "--format", "jsonl")
    assert code == 0
    assert "with transform.method=origin" in out
    assert "give --tokenizer" in out


def test_export_for_tinker_reads_no_tokenizer(command, tmp_path):
    code, _, err = command("export", NAME, str(tmp_path / "out"), "--format", "tinker")
    assert (code, "ids instead of texts" in err) == (0, False)


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
    checked = f"checked 8 tables in {small_store.root}: all as it was committed"
    code, out, _ = command("verify")
    assert (code, out) == (0, f"{checked}; --rows also checks the rules that rows must keep\n")
    code, out, _ = command("verify", "--rows")
    assert (code, out) == (0, f"{checked}\n")


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
    shard = Path(small_store.files(NAME)[0])
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
    code, _, err = command("vacuum", "--yes", "--retention-hours", "0")
    assert (code, young.exists()) == (1, True)
    assert "a running build has written and will commit later may be deleted" in err
    command("vacuum", "--yes", "--retention-hours", "0", "--risk-running-builds")
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


# --- --json ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def document(command):
    """Run a command with --json; standard output must be one JSON document and nothing else."""

    def run(*arguments, code=0):
        found, out, _ = command(*arguments, "--json")
        assert found == code
        return json.loads(out)

    return run


def test_ls_as_json(document):
    rows = document("ls")
    assert [(row["name"], row["version"], row["num_pairs"]) for row in rows] == [
        ("hh-harmless/reversed", 0, 4),
        (NAME, 1, 4),
        ("hh-harmless/uniform", 0, 3),
    ]
    assert rows[1].keys() == {
        "name",
        "version",
        "estimator",
        "contrast",
        "num_pairs",
        "num_response_tokens",
        "num_bytes",
        "fingerprint",
        "created",
    }
    assert datetime.fromisoformat(rows[1]["created"]).tzinfo is not None


def test_ls_of_an_empty_store_as_json_is_an_empty_list(small_store, capsys):
    shutil.rmtree(small_store.root.path / "weights")
    assert tokenweights.main(["ls", "--json", "--store", str(small_store.root)]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_show_as_json(document):
    shown = document("show", f"{NAME}@0")
    assert (shown["name"], shown["version"], len(shown["fingerprint"])) == (NAME, 0, 64)
    assert shown["statistics"] == {"num_pairs": 3, "num_response_tokens": 19}
    assert [parent["role"] for parent in shown["parents"]] == [
        "tokens",
        "ref_logps",
        "positive_logps",
        "negative_logps",
    ]
    assert [version["version"] for version in shown["versions"]] == [1, 0]
    assert {row["pair_id"]: row["chosen_mean_weight"] for row in shown["rows"]}["b"] == 1.75


def test_history_as_json_has_changes_as_a_list(document):
    newest, oldest = document("history", NAME)
    assert [change.partition(":")[0] for change in newest["changes"]] == [
        f"data.{role}" for role in ("negative_logps", "positive_logps", "ref_logps", "tokens")
    ]
    assert oldest["changes"] == []


def test_lineage_as_json_has_the_depth_as_a_number(document):
    rows = document("lineage", NAME)
    assert [(row["depth"], row["role"], row["kind"]) for row in rows[:3]] == [
        (0, "weights", "table"),
        (1, "tokens", "table"),
        (2, "source", "source"),
    ]
    assert rows[2]["created"] is None


def test_diff_as_json(document):
    diff = document("diff", NAME, "hh-harmless/reversed")
    assert (diff["a"], diff["num_common"], diff["num_only_in_b"]) == (f"weights/{NAME}@1", 4, 0)
    assert diff["chosen"] == {
        "num_tokens": 10,
        "num_tokens_changed": 8,
        "mean_abs_change": pytest.approx(1.15),
        "max_abs_change": 3.75,
        "mean_a": pytest.approx(1.3),
        "mean_b": pytest.approx(1.15),
        "correlation": pytest.approx(-0.7967, abs=1e-4),
    }
    assert diff["largest"][0].keys() == {
        "pair_id",
        "side",
        "mean_a",
        "mean_b",
        "mean_abs_change",
        "max_abs_change",
    }


def test_the_same_thing_has_the_same_name_in_every_document(document):
    shown, (listed, *_), ancestors = document("show", NAME), document("history", NAME), document("lineage", NAME)
    assert shown["fingerprint"] == listed["fingerprint"] == ancestors[0]["fingerprint"]
    assert shown["statistics"]["num_pairs"] == listed["num_pairs"] == ancestors[0]["num_rows"] == 4
    assert shown["versions"] == document("history", NAME)


def test_export_as_json(document, tmp_path):
    files = document("export", NAME, str(tmp_path / "out"), "--format", "jsonl")
    sizes = {
        path: (tmp_path / "out" / path).stat().st_size for path in ("test.jsonl", "train.jsonl", "tokenweights.json")
    }
    assert files == [{"path": str(tmp_path / "out" / path), "num_bytes": size} for path, size in sizes.items()]


def test_verify_as_json_has_findings_and_exit_code_1(document, small_store):
    sound = document("verify")
    assert sound == {"store": str(small_store.root), "num_tables": 8, "findings": [], "notes": [], "orphans": []}
    table = small_store.table(f"weights/{NAME}")
    (table.location.path / table.shards()[0]).unlink()
    (table.location.path / f"{1:020d}-0123456789ab-00000.parquet").write_bytes(b"x" * 321)
    found = document("verify", NAME, code=1)
    assert found["num_tables"] == 1
    (finding,) = found["findings"]
    assert (finding["table"], finding["version"], finding["shard"]) == (table.path, 0, table.shards()[0])
    assert finding.keys() == {"table", "problem", "version", "shard", "row_group", "pair_id", "file", "is_note"}
    (orphan,) = found["orphans"]
    assert (orphan["table"], orphan["num_bytes"]) == (table.path, 321)


def test_vacuum_as_json_says_whether_it_deleted(document, small_store):
    orphan = small_store.root.path / "weights" / NAME / f"{1:020d}-0123456789ab-00000.parquet"
    orphan.write_bytes(b"x" * 321)
    for deleted, options in ((False, ()), (True, ("--yes", "--risk-running-builds"))):
        found = document("vacuum", NAME, "--retention-hours", "0", *options)
        assert (found["deleted"], found["retention_hours"]) == (deleted, 0)
        assert [(file["name"], file["num_bytes"]) for file in found["files"]] == [(orphan.name, 321)]
        assert orphan.exists() != deleted


def test_progress_of_verify_goes_to_standard_error(command, monkeypatch):
    monkeypatch.setattr("weights_store.checks.files.BYTES_PER_PROGRESS", 1)
    _, out, err = command("verify", NAME)
    assert "bytes" not in out
    assert f"verify weights/{NAME}: " in err


# --- quarantine --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quarantine(small_store):
    """The quarantine of the small store with three more rows: two of one reason, and one with a line break in its text."""
    rows = [
        {"source_row": 9, "reason": "not_text", "detail": "column 'chosen' is a int", "raw": "[3]"},
        {"source_row": 7, "reason": "not_text", "detail": "column 'chosen' is a dict", "raw": "x" * 200},
        {"source_row": 2, "reason": "unparsable_json", "detail": "line\nbreak", "raw": "\x1b[31mred"},
    ]
    table = small_store.table("quarantine/hh-harmless-0123456789ab")
    table.append(pa.Table.from_pylist(rows, QUARANTINE), table.metadata())


@pytest.mark.usefixtures("quarantine")
@pytest.mark.parametrize("dataset", ["hh-harmless", "hh-harmless/tis-dpo", "quarantine/hh-harmless-0123456789ab"])
def test_quarantine_has_each_reason_with_its_rows_and_first_example(command, dataset):
    assert command("quarantine", dataset) == (
        0,
        "quarantine/hh-harmless-0123456789ab@1\n"
        "  2 rows not_text, for example row 7: column 'chosen' is a dict\n"
        f"    {'x' * 120}…\n"
        "  1 row no_prompt, for example row 4: has no prompt\n"
        "    {}\n"
        "  1 row unparsable_json, for example row 2: line\\nbreak\n"
        "    \\x1b[31mred\n",
        "",
    )


@pytest.mark.usefixtures("quarantine")
def test_quarantine_of_a_reason_lists_its_rows(command):
    _, out, _ = command("quarantine", "hh-harmless", "--reason", "not_text")
    assert [line.strip().split(":")[0] for line in out.splitlines()[1::2]] == ["row 7", "row 9"]
    _, out, _ = command("quarantine", "hh-harmless", "--reason", "not_text", "--limit", "1")
    assert out.endswith("the first 1 of 2 rows; --limit lists more\n")
    _, out, _ = command("quarantine", "hh-harmless", "--reason", "not_text", "--limit", "2")
    assert len(out.splitlines()) == 5  # the table and two lines of each of its two rows
    _, out, _ = command("quarantine", "hh-harmless", "--reason", "prompt_too_long")
    assert out.startswith("no row with reason prompt_too_long of hh-harmless is in quarantine in ")


@pytest.mark.usefixtures("quarantine")
def test_quarantine_as_json(document):
    found = document("quarantine", "hh-harmless")
    counts = [(row["reason"], row["num_rows"], row["source_row"]) for row in found]
    assert counts == [("not_text", 2, 7), ("no_prompt", 1, 4), ("unparsable_json", 1, 2)]
    found = document("quarantine", "hh-harmless", "--reason", "not_text")
    assert [(row["source_row"], len(row["raw"])) for row in found] == [(7, 200), (9, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "no quarantine of a dataset 'nobody' in {root}; it has datasets hh-harmless\n"),
        (
            ["hh-harmless", "--reason", "bad_mood"],
            "no reason 'bad_mood': expected one of unparsable_json, invalid_utf8, ",
        ),
        (["hh-harmless", "--reason", "no_prompt", "--limit", "0"], "--limit 0: expected at least 1"),
    ],
)
def test_quarantine_says_in_one_line_what_is_there(command, small_store, arguments, message):
    code, out, err = command("quarantine", *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message.format(root=small_store.root) in err
