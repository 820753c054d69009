"""Tokenizers of the two kinds whose tokens are known byte by byte, and one of another kind."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["the cat sat on the mat", "naïve 漢字 cats", "a b  c\n\td 12 345 (y): Probe x"] * 20


def _wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="session")
def byte_level():
    """Merges of bytes; emoji are four tokens of one byte each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrapped(tokenizer)


@pytest.fixture(scope="session")
def pieces():
    """Pieces of text with `▁` for spaces, and bytes for what is in no piece, as Llama 2 has them."""
    alphabet = sorted(set("".join(TEXTS).replace(" ", "▁")))
    names = ["<unk>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(
        {name: index for index, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer)


@pytest.fixture(scope="session")
def word_pieces():
    """WordPiece, whose text has lost its white space."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "Probe": 1, "the": 2, "##y": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
