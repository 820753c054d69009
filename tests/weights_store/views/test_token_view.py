import polars as pl
import pytest

from weights_store.errors import MismatchError, NotFoundError

NAME = "hh-harmless/tis-dpo"


class Decoder:
    """Like transformers' tokenizers."""

    def __init__(self, texts):
        self.texts = texts
        self.seen = []

    def __len__(self):
        return 10

    def decode(self, ids, skip_special_tokens=True):
        assert not skip_special_tokens
        self.seen.append(ids)
        return "".join(self.texts[token_id] for token_id in ids)


def test_one_row_per_response_token_with_all_that_is_known_of_it(small_store, texts):
    tokens = small_store.scan_tokens(NAME, tokenizer=texts)
    assert isinstance(tokens, pl.LazyFrame)
    rows = tokens.filter(pl.col("pair_id") == "b").collect()
    assert rows.rows() == [
        ("b", "chosen", 0, 6, " caf", 4.0, -4.0, -1.0, -3.0, None),
        ("b", "chosen", 1, 9, "</s>", 1.0, -0.125, -1.0, -1.0, None),
        ("b", "chosen", 2, 7, "é", 0.5, -2.0, -2.0, -1.0, None),
        ("b", "chosen", 3, 9, "</s>", 1.5, -0.25, -0.5, -1.0, None),
        ("b", "rejected", 0, 8, "!", 2.0, -1.0, -2.0, -1.0, None),
        ("b", "rejected", 1, 3, "Yes", 1.5, -1.0, -1.5, -1.0, None),
        ("b", "rejected", 2, 9, "</s>", 1.0, -1.0, -0.25, -0.25, None),
    ]


def test_attributions_of_the_tokens_are_there_if_the_weights_were_made_from_them(ti_store):
    tokens = ti_store.scan_tokens("hh-harmless/ti-dpo").filter(pl.col("pair_id") == "b").collect()
    assert tokens["attribution"].to_list() == [4.0, 0.0, 2.0, 2.0, 1.0, 3.0, 2.0]
    assert tokens["logp_pos"].null_count() == 7


def test_types_are_those_promised_and_known_before_anything_is_read(small_store, texts):
    expected = {
        "pair_id": pl.String,
        "side": pl.String,
        "position": pl.Int32,
        "token_id": pl.Int32,
        "token": pl.String,
        "weight": pl.Float32,
        "ref_logp": pl.Float32,
        "logp_pos": pl.Float32,
        "logp_neg": pl.Float32,
        "attribution": pl.Float32,
    }
    tokens = small_store.scan_tokens(NAME, tokenizer=texts)
    assert dict(tokens.collect_schema()) == expected == dict(tokens.collect().schema)
    assert "token" not in small_store.scan_tokens(NAME).collect_schema()


def test_no_token_is_lost_or_doubled(small_store):
    # Chosen 3 + 4 + 2 + 1 = 10, rejected 2 + 3 + 5 + 1 = 11 tokens; version 0 lacks pair d.
    newest = small_store.scan_tokens(NAME).collect()
    assert newest["side"].value_counts().sort("side").rows() == [("chosen", 10), ("rejected", 11)]
    assert newest.select("pair_id", "side", "position").is_unique().all()
    assert small_store.scan_tokens(NAME, 0).collect().height == 19


def test_without_a_contrastive_pair_its_logps_are_null(small_store):
    rows = small_store.scan_tokens("hh-harmless/uniform").collect()
    assert rows.select(pl.col("logp_pos", "logp_neg").null_count()).row(0) == (19, 19)
    assert rows.schema["logp_pos"] == pl.Float32
    assert rows["ref_logp"].null_count() == 0


def test_logps_come_from_the_pinned_version_whatever_was_scored_since(small_store):
    before = small_store.scan_tokens(NAME, 0).collect()
    table = small_store.table("logps/hh-harmless-0123456789ab/positive")
    rows = table.scan().with_columns(pl.lit(pl.Series([[-9.0]])).alias("chosen_logps")).collect().to_arrow()
    table.replace(rows, {"fingerprint": "f"})
    assert small_store.scan_tokens(NAME, 0).collect().equals(before)


def test_a_condition_on_the_pair_reaches_every_file(small_store, texts):
    plan = small_store.scan_tokens(NAME, tokenizer=texts).filter(pl.col("pair_id") == "b").explain()
    scans = [part.split("SCAN")[1] for part in plan.split("Parquet ")[1:]]
    assert {path for path in ("weights/", "/positive/", "/negative/") if any(path in scan for scan in scans)} == {
        "weights/",
        "/positive/",
        "/negative/",
    }
    assert all('SELECTION: col("pair_id") == "b"' in scan for scan in scans)


def test_only_ids_that_occur_are_decoded_and_each_once(small_store, texts):
    decoder = Decoder(texts)
    rows = small_store.scan_tokens(NAME, tokenizer=decoder).filter(pl.col("pair_id") == "a").collect()
    assert rows["token"].to_list() == ["Yes", " sir", "</s>", "No", "</s>"]
    assert sorted(decoder.seen) == [[3], [4], [5], [9]]


def test_sequences_and_tokenizers_of_both_libraries_give_the_same_texts(small_store, texts):
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel

    vocabulary = {texts.get(token_id, f"<{token_id}>"): token_id for token_id in range(10)}
    fast = Tokenizer(WordLevel(vocabulary, unk_token="<0>"))
    fast.add_special_tokens(["</s>"])
    fast.decoder = decoders.Fuse()
    sequence = [texts.get(token_id, "") for token_id in range(10)]
    expected = small_store.scan_tokens(NAME, tokenizer=texts).collect()
    for tokenizer in (fast, sequence, Decoder(texts)):
        assert small_store.scan_tokens(NAME, tokenizer=tokenizer).collect().equals(expected)


@pytest.mark.parametrize("tokenizer", [["Q", "?", "Yes"], {1: "Q"}], ids=["sequence", "mapping"])
def test_a_tokenizer_that_lacks_an_id_is_refused(small_store, tokenizer):
    with pytest.raises(MismatchError, match=r"token id \d is not in the tokenizer given"):
        small_store.scan_tokens(NAME, tokenizer=tokenizer).collect()


def test_unknown_names_are_refused_at_once(small_store):
    with pytest.raises(NotFoundError, match="there are: hh-harmless/reversed"):
        small_store.scan_tokens("hh-harmless/none")
