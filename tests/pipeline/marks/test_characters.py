import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pipeline.marks.characters import Characters, Texts, Vocabulary, special_tokens
from weights_store.errors import InputError, MismatchError


def characters_of(tokenizer, *texts):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    vocabulary = Vocabulary.of_tokenizer(tokenizer, "made up")
    return ids, vocabulary.characters(np.concatenate(ids).astype(np.int64), np.array(list(map(len, ids))))


@pytest.mark.parametrize("kind", ["byte_level", "pieces"])
def test_the_characters_of_a_text_are_its_own(kind, request):
    texts = ["the cats", "漢字 🙂 naïve", "🙂", " the  the\n", "x<|end|>"]
    _, found = characters_of(request.getfixturevalue(kind), *texts)
    assert found.texts == texts
    assert found.starts.tolist() == [0, 8, 18, 19, 29, 37]


def test_each_token_has_its_characters_by_hand():
    # "aé🙂": a is one byte, é is two, 🙂 is four.
    parts = [b"a\xc3", b"\xa9", b"\xf0\x9f", b"\x99\x82", b"", b"</s>"]
    vocabulary = Vocabulary(
        np.frombuffer(b"".join(parts), np.uint8), np.cumsum(list(map(len, parts))), np.array([False] * 5 + [True])
    )
    found = vocabulary.characters(np.array([0, 1, 2, 3, 4, 5]), np.array([6]))
    assert found.texts == ["aé🙂</s>"]
    assert list(zip(found.first, found.last, strict=True))[:4] == [(0, 1), (1, 1), (2, 2), (2, 2)]
    # The first token has a and é: (8 + 2) / 2. The second is a part of é. The empty token has no character.
    means = found.means(np.array([8.0, 2.0, 3.0, 1.0, 0.0, 0.0, 1.0]), without_text=7.0)
    assert means.tolist() == [5.0, 2.0, 3.0, 3.0, 7.0, 0.5]


def test_a_response_that_ends_inside_of_a_character_has_its_bytes_one_by_one():
    parts = [b"\xf0\x9f\x99", b"x", b"\x82"]
    vocabulary = Vocabulary(np.frombuffer(b"".join(parts), np.uint8), np.array([3, 4, 5]), np.zeros(3, bool))
    found = vocabulary.characters(np.array([1, 0, 2, 1]), np.array([2, 2]))  # the second begins with a half character
    assert found.texts == ["x\udcf0\udc9f\udc99", "\udc82x"]
    assert found.means(np.arange(6.0)).tolist() == [0.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize("kind", ["byte_level", "pieces"])
def test_a_mean_over_all_characters_agrees_with_a_loop_over_bytes(kind, request):
    tokenizer = request.getfixturevalue(kind)
    texts = ["the naïve 漢字 🙂🙂 cats\n", "  the\tmat 12 ", "é"]
    ids, found = characters_of(tokenizer, *texts)
    values = np.random.default_rng(1).random(found.starts[-1])
    means = found.means(values)
    vocabulary, at = Vocabulary.of_tokenizer(tokenizer, "made up"), 0
    for number, of_text in enumerate(ids):
        owners = [place for place, each in enumerate(texts[number]) for _ in each.encode()]  # of each byte
        byte = 0
        for token in of_text:
            size = int(vocabulary.ends[token] - (vocabulary.ends[token - 1] if token else 0))
            covered = sorted(set(owners[byte : byte + size]))
            expected = np.mean([values[found.starts[number] + place] for place in covered])
            assert means[at] == pytest.approx(expected)
            byte, at = byte + size, at + 1
        assert byte == len(owners)


def test_equal_weights_stay_what_they_are():
    found = Characters(
        ["abc"], np.array([0, 3]), np.array([0, 1]), np.array([1, 2]), np.zeros(2, bool), np.ones(2, bool)
    )
    assert found.means(np.full(3, 0.1)).astype(np.float32).tolist() == [np.float32(0.1)] * 2


def test_pieces_that_were_added_are_pieces_and_ids_may_have_gaps():
    """As in Gemma, which lists runs of spaces and line ends among its added tokens."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "P", "x"]
    vocabulary = {name: 3 * index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "▁")], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids, found = characters_of(wrapped, "P  x é")
    assert vocabulary["▁▁"] in ids[0]
    assert found.texts == ["P  x é"]
    assert found.first.tolist() == [0, 1, 3, 4, 5, 5]
    assert len(special_tokens(wrapped)) == len(Vocabulary.of_tokenizer(wrapped, "made up").is_special)


def test_a_tokenizer_that_loses_white_space_is_refused(word_pieces):
    with pytest.raises(
        InputError, match=r"^model made up: its tokens are neither bytes nor pieces of text \(decoder WordPiece\)"
    ):
        Vocabulary.of_tokenizer(word_pieces, "made up")


def test_an_unknown_id_is_named(byte_level):
    vocabulary = Vocabulary.of_tokenizer(byte_level, "made up")
    with pytest.raises(MismatchError, match=r"^token id 5000 is not in the tokenizer's vocabulary of 295"):
        vocabulary.characters(np.array([5000]), np.array([1]))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 100])
def test_parts_of_any_size_are_the_whole_in_order(byte_level, num_tokens):
    ids, whole = characters_of(byte_level, "the", "cats 🙂", "x", "a b c d e", "y")
    texts = Texts(
        Vocabulary.of_tokenizer(byte_level, "made up"),
        np.concatenate(ids).astype(np.int64),
        np.array(list(map(len, ids))),
    )
    parts = list(texts.parts(num_tokens))
    assert [text for part in parts for text in part.texts] == whole.texts
    assert len(parts) == 1 if num_tokens == 100 else len(parts) > 1
    values = np.random.default_rng(0).random(whole.starts[-1])
    cuts = np.cumsum([part.starts[-1] for part in parts])[:-1]
    means = [part.means(of_part) for part, of_part in zip(parts, np.split(values, cuts), strict=True)]
    assert np.concatenate(means).tolist() == whole.means(values).tolist()
