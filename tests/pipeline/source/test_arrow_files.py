"""Parquet and Arrow files, and saved datasets: types of columns, damage, and columns that nobody asked for."""

import resource
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dataset_section import DatasetSection
from pipeline.source.arrow_files import arrow, parquet
from pipeline.source.columns import check_source, resolve_columns
from pipeline.source.intake import pairs_of
from pipeline.source.load import open_source, streamed
from pipeline.source.rows import joined
from weights_store.errors import InputError

TEXTS = pa.table({"prompt": ["p", "q", "r"], "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]})
FAR = pa.array([2**60] * 3, pa.timestamp("ms"))
"""A time that Python's datetime cannot hold."""


def message(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture(params=["parquet", "arrow file", "arrow stream"])
def written(request, tmp_path):
    """Return a function that writes a table in each format, in small pieces, and returns the path."""

    def write(table):
        path = tmp_path / f"x.{request.param.split()[0]}"
        if path.suffix == ".parquet":
            pq.write_table(table, path, row_group_size=2)
            return path
        make = pa.ipc.new_file if request.param == "arrow file" else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return path

    return write


def as_type(kind):
    if kind == "dictionary":
        return pa.table({name: TEXTS[name].dictionary_encode() for name in TEXTS.column_names})
    return TEXTS.cast(pa.schema([(name, kind) for name in TEXTS.column_names]))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.large_binary(), "dictionary"], ids=str
)
def test_texts_of_every_type_are_read(written, read, kind):
    pairs, reasons = read(written(as_type(kind)))
    assert [(row, pair.prompt[0]["content"], pair.chosen, pair.rejected) for row, pair in pairs.items()] == [
        (0, "p", "a", "x"),
        (1, "q", "b", "y"),
        (2, "r", "c", "z"),
    ]
    assert reasons == {}


def test_chats_of_bytes_and_json_are_read(written, read):
    kind = pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())]))
    json_texts = pa.ExtensionArray.from_storage(
        pa.json_(), pa.array(['"b"', None, '[{"role": "assistant", "content": "c"}]'])
    )
    columns = {
        "prompt": pa.array([message(b"user", b"p")] * 3, kind),
        "chosen": pa.array([message(b"assistant", "é".encode())] * 3, kind),
        "rejected": json_texts,
    }
    pairs, reasons = read(written(pa.table(columns)))
    assert [(row, pair.chosen, pair.rejected) for row, pair in pairs.items()] == [(0, "é", "b"), (2, "é", "c")]
    assert reasons == {"missing_value": 1}


def test_bytes_that_are_no_text_spoil_their_own_row_and_name_the_column(written, read):
    table = TEXTS.set_column(1, "chosen", pa.array([b"a", b"\xff", b"c"]))
    pairs, reasons = read(written(table))
    assert (list(pairs), reasons) == ([0, 2], {"invalid_utf8": 1})


def test_scores_of_every_type_of_number_are_read(written, read):
    values = {
        pa.decimal128(3, 2): [Decimal("8.50"), None, Decimal("-1.25")],
        pa.int8(): [8, None, -1],
        pa.uint64(): [2**63, None, 1],
        pa.float16(): [8.5, None, -1.25],
        pa.string(): ["8.5", None, "-1.25"],
    }
    for kind, scores in values.items():
        table = TEXTS.append_column("score_chosen", pa.array(scores, kind)).append_column(
            "score_rejected", pa.array([1, 2, 3])
        )
        pairs, _ = read(written(table))
        found = [pair.chosen_score for pair in pairs.values()]
        assert found == [None if score is None else float(score) for score in scores], kind
        assert [pair.rejected_score for pair in pairs.values()] == [1.0, 2.0, 3.0]


def test_columns_that_nobody_asked_for_are_not_read(written, read):
    table = TEXTS.append_column("created", FAR)
    table = pa.Table.from_arrays([*table.columns, FAR, FAR], names=[*table.column_names, "twice", "twice"])
    pairs, reasons = read(written(table))
    assert (len(pairs), reasons) == (3, {})


def test_a_value_without_a_python_form_in_a_column_that_is_read_goes_to_quarantine(written, read):
    table = TEXTS.append_column("score_chosen", FAR).append_column("score_rejected", FAR)
    assert read(written(table)) == ({}, {"not_text": 3})


def test_a_column_that_stands_twice_is_refused(written, read):
    table = pa.Table.from_arrays([*TEXTS.columns, TEXTS["chosen"]], names=[*TEXTS.column_names, "chosen"])
    with pytest.raises(InputError, match="has the column 'chosen' twice; rename one of them"):
        read(written(table))
    table = pa.Table.from_arrays([*TEXTS.columns, FAR, FAR], names=[*TEXTS.column_names, "w", "w"])
    dataset = DatasetSection(name="toy", source=str(written(table)))
    others = {"pair_weight_column": "w"}
    for check in (check_source, lambda dataset, others: resolve_columns(dataset, open_source(dataset), others)):
        with pytest.raises(InputError, match="has the column 'w' twice; rename one of them"):
            check(dataset, others)


def test_a_table_without_rows_has_no_pairs(written, read):
    assert read(written(TEXTS.slice(0, 0))) == ({}, {})


# --- damage ------------------------------------------------------------------------------------------------------------


def test_a_folder_may_have_more_files_than_a_process_may_open(written):
    path = written(TEXTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_allowed = max(int(opened.name) for opened in Path("/proc/self/fd").iterdir()) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_allowed, hard))
    try:
        source = joined(
            "folder", [(parquet if path.suffix == ".parquet" else arrow)(path) for _ in range(2 * num_allowed)]
        )
        num_rows = sum(1 for _ in source.rows())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert num_rows == 2 * num_allowed * 3


def damaged_parquet(path):
    """Write 4,000 rows in four row groups, and overwrite a page of the third."""
    rows = 4000
    table = pa.table({"prompt": [f"p{i}" for i in range(rows)], "chosen": ["a"] * rows, "rejected": ["b"] * rows})
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 24] = b"\xff" * 24
    path.write_bytes(data)


def test_a_damaged_page_is_named_by_file_and_row_group(tmp_path, read):
    damaged_parquet(tmp_path / "x.parquet")
    message = r"x.parquet: row group 2 \(rows 2000 to 2999\) is damaged, after row 2000: .*download the file again"
    with pytest.raises(InputError, match=message):
        read(tmp_path / "x.parquet")


def test_damage_after_the_rows_that_are_wanted_does_no_harm(tmp_path, read):
    damaged_parquet(tmp_path / "x.parquet")
    assert len(read(tmp_path / "x.parquet", max_pairs=1500)[0]) == 1500


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_cut_file_is_named(written, read, share):
    path = written(TEXTS)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(
        InputError, match=rf"{path.name} is not a whole|{path.name}: the stream is damaged, after row \d"
    ):
        read(path)


# --- saved datasets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    import datasets

    datasets.disable_progress_bars()

    def save_to_disk(dataset):
        dataset.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save_to_disk


def rows_of(**columns):
    import datasets

    return datasets.Dataset.from_dict({name: TEXTS[name].to_pylist() for name in TEXTS.column_names} | columns)


def test_images_and_sounds_of_a_saved_dataset_are_not_decoded(save, read):
    import datasets

    features = datasets.Features({name: datasets.Value("string") for name in TEXTS.column_names})
    storage = pa.array([{"bytes": b"no image"}] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = TEXTS.append_column("image", storage).append_column("audio", storage)
    info = datasets.DatasetInfo(
        features=datasets.Features({**features, "image": datasets.Image(), "audio": datasets.Audio()})
    )
    pairs, reasons = read(save(datasets.Dataset(table, info=info)))
    assert (len(pairs), reasons) == (3, {})


def test_the_format_and_the_order_of_a_saved_dataset(save, read):
    dataset = rows_of(score_chosen=[1, 2, 3], score_rejected=[0.5, 0.5, 0.5]).select([2, 0]).with_format("numpy")
    pairs, _ = read(save(dataset))
    assert [(pair.chosen, pair.chosen_score, pair.rejected_score) for pair in pairs.values()] == [
        ("c", 3.0, 0.5),
        ("a", 1.0, 0.5),
    ]


def test_splits_that_a_saved_dataset_has_are_listed(save, read):
    import datasets

    path = save(datasets.DatasetDict({"train_prefs": rows_of(), "test": rows_of()}))
    with pytest.raises(
        InputError, match=r"no split 'train'; it has train_prefs, test. Set dataset.split, .* 'train_prefs'"
    ):
        read(path)
    assert len(read(path, split="test")[0]) == 3


def test_rows_of_a_split_without_the_columns_that_are_read_keep_their_places(save):
    import datasets

    path = save(datasets.DatasetDict({"old": rows_of(), "new": rows_of(w=[1, 2, 3])}))
    rows = open_source(DatasetSection(name="toy", source=str(path), split=["old", "new"])).rows({"w"})
    assert [(row.source_row, row.value) for row in rows] == [
        *((place, {}) for place in range(3)),
        *((3 + place, {"w": 1 + place}) for place in range(3)),
    ]


def test_a_damaged_saved_dataset_is_named(save, read):
    path = save(rows_of())
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match="saved is no whole saved dataset: "):
        read(path)


@pytest.fixture(params=["its columns are known", "only the rows say"])
def stream(request):
    """Return a function that makes a stream, as a large hub dataset is read."""
    import datasets

    def make(table):
        if request.param == "only the rows say":
            return datasets.IterableDataset.from_generator(lambda: iter(table.to_pylist()))
        return datasets.Dataset(table).to_iterable_dataset()

    return make


def pairs_of_stream(*streams):
    source = joined("owner/name", [streamed(stream, "owner/name") for stream in streams])
    columns = resolve_columns(DatasetSection(name="x", source="owner/name"), source)
    return [found for _, found in pairs_of(source, columns)]


def test_a_stream_is_read_by_its_columns_also_if_it_does_not_know_them(stream):
    found = pairs_of_stream(stream(TEXTS.append_column("score", pa.array([1, 2, 3]))))
    assert [pair.chosen for pair in found] == ["a", "b", "c"]


def test_transcripts_in_a_stream_are_found_in_its_first_rows(stream):
    prompts = pa.array([f"\n\nHuman: {index}\n\nAssistant:" for index in range(3)])
    found = pairs_of_stream(stream(TEXTS.set_column(0, "prompt", prompts)))
    assert [pair.prompt for pair in found] == [message("user", str(index)) for index in range(3)]


def test_transcripts_in_the_streams_of_two_splits_are_found(stream):
    prompts = pa.array([f"\n\nHuman: {index}\n\nAssistant:" for index in range(3)])
    table = TEXTS.set_column(0, "prompt", prompts)
    found = pairs_of_stream(stream(table), stream(table))
    assert [pair.prompt for pair in found] == [message("user", str(index)) for index in (0, 1, 2) * 2]
