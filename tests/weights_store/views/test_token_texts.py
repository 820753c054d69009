"""Texts of tokens within a sequence, against the decoder's own text of the whole sequence."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece

from weights_store.errors import MismatchError
from weights_store.views.token_texts import TokenTexts

SHARED = Path(__file__).resolve().parents[4] / "shared" / "models"
EURO, EMOJI = "€".encode(), "😀".encode()


def byte_level():
    """One id per byte, then a few merged ones, then an end of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = byte_letters()
    more = [b" sir", b" caf", b"x\xe2", b"\x82\xac\xe2", b"\x82\xac y", b"Yes"]
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary |= {"".join(shown[byte] for byte in text): 256 + number for number, text in enumerate(more)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def byte_letters():
    """GPT-2's letter for each byte, rebuilt from its rule: printable bytes stand for themselves, others for 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}


def ids_of(tokenizer, *pieces):
    """Return the ids of pieces, each the bytes of one token or the text of an added one."""
    shown = byte_letters()
    return [tokenizer.token_to_id(p if isinstance(p, str) else "".join(shown[byte] for byte in p)) for p in pieces]


def sentence_piece():
    """Like Llama's: a mark for spaces, bytes for what is not in the vocabulary, no space in front of a text."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁Hello", "▁wor", "ld", "Hello", ".", "▁▁▁", "é", "\n"]
    tokenizer = Tokenizer(BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def word_piece():
    words = ["[UNK]", "[SEP]", "don", "'", "t", "play", "##ing", "##s", ".", ",", "world", "n't", "é"]
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


BYTES, PIECES, WORDS = byte_level(), sentence_piece(), word_piece()


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"Yes", b" sir"], ["Yes", " sir"]),
        ([b" caf", b"\xc3", b"\xa9", b"Yes"], [" caf", "é", "", "Yes"]),
        ([EURO[:1], EURO[1:2], EURO[2:]], ["€", "", ""]),
        # A character that a token ends and another begins: each stands with the token that has its first byte.
        ([b"x\xe2", b"\x82\xac\xe2", b"\x82\xac y"], ["x€", "€", " y"]),
        ([*(bytes([byte]) for byte in EMOJI), "<|end|>"], ["😀", "", "", "", "<|end|>"]),
        # No character ever: U+FFFD, as the decoder writes it; bytes that could begin the same character share one.
        ([b"\xff", b"Yes", b"\x82"], ["\ufffd", "Yes", "\ufffd"]),
        ([b"\xe2", b"\x82", b"Yes"], ["\ufffd", "", "Yes"]),
        ([b"\xe2"], ["\ufffd"]),
        ([], []),
    ],
)
def test_a_character_of_several_tokens_stands_with_the_first(pieces, texts):
    ids = ids_of(BYTES, *pieces)
    assert TokenTexts(BYTES).split(ids) == texts
    assert "".join(texts) == BYTES.decode(ids, skip_special_tokens=False)


def test_a_token_of_sentence_piece_keeps_its_space_inside_a_text_only():
    words = ["▁Hello", "▁wor", "ld", "▁Hello", "▁", "Hello", "<0xE2>", "<0x82>", "<0xAC>", "</s>", "▁Hello"]
    texts = TokenTexts(PIECES).split([PIECES.token_to_id(word) for word in words])
    assert texts == ["Hello", " wor", "ld", " Hello", " ", "Hello", "€", "", "", "</s>", " Hello"]


def test_word_pieces_join_as_their_decoder_joins_them():
    words = ["don", "'", "t", "play", "##ing", ".", "world", "[SEP]"]
    ids = [WORDS.token_to_id(word) for word in words]
    texts = TokenTexts(WORDS).split(ids)
    assert "".join(texts) == WORDS.decode(ids, skip_special_tokens=False)
    assert texts[3:6] == [" play", "ing", "."]


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES, WORDS], ids=["byte-level", "sentence-piece", "word-piece"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_texts_of_any_ids_join_to_the_text_of_all(tokenizer, data):
    # Few ids, so that bytes of the same character meet.
    some = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), min_size=1, max_size=8))
    ids = data.draw(st.lists(st.sampled_from(some), max_size=40))
    texts = TokenTexts(tokenizer).split(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "sentence-piece"])
@given(text=st.text(st.sampled_from("a é€😀\u202e\n한"), max_size=12))
@settings(max_examples=40, deadline=None)
def test_characters_given_byte_by_byte_stand_with_their_first_byte(tokenizer, text):
    shown = byte_letters()
    name = "<0x{:02X}>".format if tokenizer is PIECES else shown.get
    ids = [tokenizer.token_to_id(name(byte)) for byte in text.encode()]
    expected = [part for letter in text for part in (letter, *[""] * (len(letter.encode()) - 1))]
    if tokenizer is PIECES and text.startswith(" "):
        expected[0] = ""  # its decoder strips it
    assert TokenTexts(tokenizer).split(ids) == expected


@pytest.mark.parametrize("model", ["tiny-chat", "smollm2"])
def test_texts_of_real_tokenizers_join_to_the_text_of_all(model):
    file = SHARED / model / "tokenizer.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    tokenizer = Tokenizer.from_file(str(file))
    text = "Où est <|assistant|>\n\n  le café à 3 € ? 😀👩‍👩‍👧 नमस्ते\u202e 한국어\x00</s>"
    ids = tokenizer.encode(text).ids
    texts = TokenTexts(tokenizer).split(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)
    assert {"é", "€", "😀", "한"} <= {letter for part in texts for letter in part}
    assert not any("\ufffd" in part for part in texts)


def test_transformers_tokenizers_split_as_the_fast_ones_they_wrap():
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=sentence_piece(), eos_token="</s>")
    ids = [PIECES.token_to_id(word) for word in ["▁Hello", "<0xE2>", "<0x82>", "<0xAC>", "▁wor", "ld", "</s>"]]
    texts = TokenTexts(wrapped)
    assert texts.split(ids) == ["Hello", "€", "", "", " wor", "ld", "</s>"]
    assert PIECES.token_to_id("</s>") in texts.special_ids


def test_added_tokens_are_special_only_if_they_are_marked():
    names = {BYTES.id_to_token(token_id) for token_id in TokenTexts(BYTES).special_ids}
    assert names == {"<|end|>"}
    assert TokenTexts({1: "Q"}).special_ids == frozenset()


def test_a_vocabulary_may_have_gaps():
    tokenizer = Tokenizer(BPE({"a": 0, "b": 5}, []))
    tokenizer.decoder = decoders.Fuse()
    texts = TokenTexts(tokenizer)
    assert (texts.text(5), texts.text(3), texts.join([0, 5])) == ("b", "", "ab")
    with pytest.raises(MismatchError, match="token id 6 is not in the tokenizer given, which has 6 ids"):
        texts.text(6)


def test_a_mapping_gives_each_id_its_text():
    assert TokenTexts({1: "Q", 9: "</s>"}).split([1, 9, 1]) == ["Q", "</s>", "Q"]
    with pytest.raises(MismatchError, match="token id 2 is not in the tokenizer given"):
        TokenTexts({1: "Q"}).split([1, 2])


@pytest.mark.parametrize("pieces", [[b"Yes", b" sir"], [b"\xff"], [b"\xe2"], [b"\xe2", b"\x82", b"\xac"]])
def test_time_grows_with_the_length_alone(pieces):
    """Tokens handed to the decoder, not seconds: eight times the length may cost ten times as many, not 64 times."""

    class Counting:
        num_tokens = 0

        def decode(self, ids, skip_special_tokens=False):
            self.num_tokens += len(ids)
            return BYTES.decode(ids, skip_special_tokens=skip_special_tokens)

    costs = []
    for length in (512, 4096):
        counting = Counting()
        TokenTexts(counting).split((ids_of(BYTES, *pieces) * length)[:length])
        costs.append(counting.num_tokens)
    assert costs[1] < 10 * costs[0]
