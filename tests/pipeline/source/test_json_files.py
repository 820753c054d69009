"""Text files of rows as people have them: encodings, nesting, compression, and JSON that is not an array of rows."""

import gzip
import json
import re

import pytest

from weights_store.errors import InputError

ROWS = [{"prompt": "Wie heißt du?", "chosen": "Zoë", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TEXTS = {".jsonl": LINES, ".json": json.dumps(ROWS, ensure_ascii=False)}


@pytest.fixture(params=sorted(TEXTS))
def ending(request):
    return request.param


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_and_without_a_byte_order_mark(tmp_path, read, ending, encoding):
    path = tmp_path / f"x{ending}"
    path.write_bytes(TEXTS[ending].encode(encoding))
    pairs, reasons = read(path)
    assert ([pair.chosen for pair in pairs.values()], reasons) == (["Zoë", "a"], {})


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16LE"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_another_encoding_of_the_whole_file_is_named_with_what_to_do(
    tmp_path, read, ending, encoding, name, is_compressed
):
    data = TEXTS[ending].encode(encoding)
    path = tmp_path / f"x{ending}{'.gz' if is_compressed else ''}"
    path.write_bytes(gzip.compress(data) if is_compressed else data)
    with pytest.raises(
        InputError, match=f"{re.escape(path.name)} is not UTF-8 but {name}; .* iconv -f {name} -t UTF-8"
    ):
        read(path)


def test_a_line_of_latin_1_goes_to_quarantine_and_a_whole_array_is_refused_with_the_byte(tmp_path, read):
    for ending, text in TEXTS.items():
        (tmp_path / f"x{ending}").write_bytes(text.encode("latin-1"))
    pairs, reasons = read(tmp_path / "x.jsonl")
    assert (list(pairs), reasons) == ([1], {"invalid_utf8": 1})
    # '[{"prompt": "Wie hei' are 20 bytes, then 0xdf, which is ß in Latin-1.
    with pytest.raises(InputError, match=r"byte 20 \(0xdf\) is not UTF-8.*convert it with iconv"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("depth", [1_500, 400_000])
def test_deep_nesting_is_one_line_for_an_array_and_a_reason_for_a_line(tmp_path, read, depth):
    (tmp_path / "x.json").write_text("[" * depth)
    with pytest.raises(InputError, match="nested too deeply"):
        read(tmp_path / "x.json")
    (tmp_path / "x.jsonl").write_text(LINES + '\n{"prompt": ' + "[" * depth + "]" * depth + "}\n")
    pairs, reasons = read(tmp_path / "x.jsonl")
    assert (len(pairs), reasons) == (2, {"unparsable_json": 1})


def test_nesting_in_a_column_that_is_not_read_does_no_harm(tmp_path, read):
    nested = "[" * 500 + "]" * 500
    (tmp_path / "x.jsonl").write_text(f'{{"prompt": "p", "chosen": "a", "rejected": "b", "extra": {nested}}}\n')
    assert len(read(tmp_path / "x.jsonl")[0]) == 1


def test_a_key_that_stands_twice_is_not_dropped_without_a_word(tmp_path, read):
    (tmp_path / "x.jsonl").write_text(LINES + '\n{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}\n')
    pairs, reasons = read(tmp_path / "x.jsonl")
    assert (len(pairs), reasons) == (2, {"unparsable_json": 1})


def test_a_number_too_long_for_python_spoils_no_row(tmp_path, read):
    (tmp_path / "x.jsonl").write_text(
        '{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": %s, "score_rejected": 1}\n' % ("9" * 5000)
    )
    pairs, _ = read(tmp_path / "x.jsonl")
    assert (pairs[0].chosen_score, pairs[0].rejected_score) == (None, 1.0)


@pytest.mark.parametrize("document", [ROWS, {"data": ROWS}, {"version": "1", "rows": ROWS, "splits": ["train"]}])
def test_the_rows_of_an_object_are_its_only_list_of_objects(tmp_path, read, document):
    (tmp_path / "x.json").write_text(json.dumps(document))
    assert list(read(tmp_path / "x.json")[0]) == [0, 1]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (ROWS[0], "got one object with the keys prompt, chosen, rejected"),
        ({"train": ROWS, "test": ROWS}, "got one object with the keys train, test"),
        ({"prompt": [{"role": "user", "content": "p"}], "chosen": "a"}, "got one object with the keys prompt, chosen"),
        (3, "got a int"),
    ],
)
def test_other_json_values_are_refused_in_one_line(tmp_path, read, document, problem):
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"x.json: expected a JSON array of rows, {problem}"):
        read(tmp_path / "x.json")


def test_lines_in_a_json_file_and_an_empty_one_say_so(tmp_path, read):
    (tmp_path / "x.json").write_text(LINES)
    with pytest.raises(InputError, match=r"x.json is not valid JSON: .*one object per line needs the ending .jsonl"):
        read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("")
    with pytest.raises(InputError, match="x.json is not valid JSON: it is empty"):
        read(tmp_path / "x.json")


def test_gzip_is_read_and_a_cut_file_names_the_row(tmp_path, read):
    whole = gzip.compress(LINES.encode(), mtime=0)
    (tmp_path / "x.jsonl.gz").write_bytes(whole)
    (tmp_path / "x.JSON.GZ").write_bytes(gzip.compress(TEXTS[".json"].encode()))
    assert read(tmp_path / "x.jsonl.gz") == read(tmp_path / "x.JSON.GZ")
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"x.jsonl.gz is damaged after row \d: .*copy or download it again"):
        read(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"x.jsonl.gz is damaged after row 0"):
        read(tmp_path / "x.jsonl.gz")
