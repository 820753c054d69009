import pytest
from datasets import Dataset, DatasetDict

from pipeline.dataset_section import DatasetSection
from pipeline.source.load import open_source
from weights_store.errors import InputError
from weights_store.settings import parse_settings


def row(text):
    return {"prompt": f"question {text}", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def saved(tmp_path):
    """A dataset with two splits, as `save_to_disk` writes it."""
    splits = {"train": ["a", "b", "c"], "test": ["d", "e"]}
    folder = tmp_path / "saved"
    DatasetDict({name: Dataset.from_list(list(map(row, texts))) for name, texts in splits.items()}).save_to_disk(folder)
    return folder


def rows_of(source, **settings):
    section = DatasetSection(name="toy", source=str(source), **settings)
    return [(row.source_row, row.split, row.value["prompt"][-1]) for row in open_source(section).rows()]


def test_rows_of_several_splits_are_numbered_over_all_of_them(saved):
    expected = [(0, "train", "a"), (1, "train", "b"), (2, "train", "c"), (3, "test", "d"), (4, "test", "e")]
    assert rows_of(saved, split=["train", "test"]) == expected
    assert rows_of(saved, split=["test"]) == rows_of(saved, split="test") == [(0, "test", "d"), (1, "test", "e")]


def test_a_limit_counts_for_each_split(saved):
    assert rows_of(saved, split=["train", "test"], max_pairs=1) == [(0, "train", "a"), (1, "test", "d")]


def test_a_split_that_is_not_there_is_named(saved):
    with pytest.raises(InputError, match="has no split 'dev'; it has train, test"):
        rows_of(saved, split=["train", "dev"])


def test_a_file_has_one_split(tmp_path, write_jsonl):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [row("a")])
    assert rows_of(path, split="dev") == [(0, "dev", "a")]
    with pytest.raises(
        InputError, match=r"dataset.split names train, test, but .* is a file, .* in dataset.split_column"
    ):
        rows_of(path, split=["train", "test"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": []}, "dataset.split is .*, expected the name of a split"),
        ({"split": ["train", "train"]}, "expected the name of a split, or different names"),
        ({"split": ["train", "test"], "split_column": "fold"}, "dataset.split several: keep one"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(Exception, match=message):
        parse_settings(DatasetSection, {"name": "toy", "source": "x.jsonl", **settings}, "test")
