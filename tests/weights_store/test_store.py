import polars as pl
import pyarrow as pa
import pytest

from weights_store import WeightStore, split_name
from weights_store.errors import NotFoundError, SettingsError
from weights_store.schemas import WEIGHTS


def weight_rows(*pair_ids):
    """Rows of a weight dataset: prompt [1, 2], chosen [3, 4, 9], rejected [5, 9]."""
    one = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4, 9],
        "rejected_ids": [5, 9],
        "chosen_token_weights": [1.0, 2.0, 0.5],
        "rejected_token_weights": [0.25, 1.0],
        "chosen_ref_logps": [-1.0, -2.0, -0.5],
        "rejected_ref_logps": [-3.0, -0.25],
        "pair_weight": 1.0,
        "anchor_ids": None,
        "anchor_ref_logps": None,
        "split": "train",
    }
    return pa.Table.from_pylist([{"pair_id": pair_id, **one} for pair_id in pair_ids], WEIGHTS)


def metadata(fingerprint="f" * 64, changes=()):
    return {
        "fingerprint": fingerprint,
        "identity": {"settings": {"weights": {"estimator": "tis"}, "contrast": {"method": "dpo"}}},
        "statistics": {"num_pairs": 2, "num_response_tokens": 10},
        "changes": list(changes),
    }


@pytest.fixture
def store(store_uri):
    store = WeightStore(store_uri)
    store.table("weights/hh/tis-dpo").append(weight_rows("a", "b"), metadata())
    store.table("weights/hh/tis-dpo").append(weight_rows("c"), metadata("e" * 64, ["weights.upper: 1.5 -> 2.0"]))
    return store


def test_scan_is_lazy_and_reads_any_version(store):
    assert isinstance(store.scan("hh/tis-dpo"), pl.LazyFrame)
    assert sorted(store.scan("hh/tis-dpo").collect()["pair_id"]) == ["a", "b", "c"]
    assert sorted(store.scan("hh/tis-dpo", 0).collect()["pair_id"]) == ["a", "b"]


def test_scan_gives_the_numbers_that_were_written(store):
    row = store.scan("hh/tis-dpo").filter(pl.col("pair_id") == "a").collect().row(0, named=True)
    assert row["chosen_token_weights"] == [1.0, 2.0, 0.5]
    assert row["rejected_ref_logps"] == [-3.0, -0.25]
    assert row["anchor_ids"] is None


def test_list_shows_the_newest_version_of_each_name(store):
    store.table("weights/hh/uniform").append(weight_rows("a"), metadata())
    listing = store.list()
    assert dict(zip(listing["name"], listing["version"], strict=True)) == {"hh/tis-dpo": 1, "hh/uniform": 0}


def test_history_says_what_changed(store):
    history = store.history("hh/tis-dpo")
    assert history["version"].to_list() == [1, 0]
    assert history["changes"].to_list() == ["weights.upper: 1.5 -> 2.0", ""]


def test_unknown_name_lists_the_known_ones(store):
    with pytest.raises(NotFoundError, match="no weight dataset 'hh/tis'.*there are: hh/tis-dpo"):
        store.scan("hh/tis")


def test_missing_store_is_named(store_uri):
    for use in (WeightStore.list, lambda store: store.scan("hh/x"), lambda store: store.history("hh/x")):
        with pytest.raises(NotFoundError, match=f"no store at {store_uri}: expected a folder"):
            use(WeightStore(store_uri))


def test_unknown_scheme_is_refused():
    with pytest.raises(SettingsError, match="a store cannot be at gopher://…: expected a folder"):
        _ = WeightStore("gopher://x").root


def test_names_with_versions():
    assert split_name("hh/tis-dpo@12") == ("hh/tis-dpo", 12)
    assert split_name("hh/tis-dpo") == ("hh/tis-dpo", None)


@pytest.mark.parametrize("text", ["../x", "/etc/passwd", "hh/../x", "HH", "hh//x", "hh@newest", "hh@", "a b", ""])
def test_bad_names_are_refused(text):
    with pytest.raises(SettingsError, match="bad (name|version)"):
        split_name(text)
