import pytest

from pipeline.source.load import is_hub_id


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Anthropic/hh-rlhf", True),
        ("argilla/ultrafeedback-binarized.v2", True),
        ("pairs", False),
        ("data/pairs.jsonl", False),
        ("data/pairs.parquet", False),
        ("../data/pairs", False),
        ("/data/pairs", False),
        ("a/b/c", False),
    ],
)
def test_owner_and_name_is_on_the_hub_and_a_file_or_path_is_not(source, expected):
    assert is_hub_id(source) is expected


def test_a_folder_that_is_there_is_not_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")
