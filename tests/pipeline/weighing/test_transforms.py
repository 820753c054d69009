import math
from itertools import pairwise

import numpy as np
import pytest

from pipeline.weighing.transforms import (
    decay,
    divide_by_position,
    mean_one,
    position_sums,
    shrink,
    smooth,
    smooth_words,
)
from pipeline.weighing.words import WordStarts
from weights_store.errors import MismatchError


def _f(*values):
    return np.array(values, np.float32)


def test_mean_one_scales_each_response_by_itself_and_leaves_zeros():
    assert mean_one(_f(1, 3, 5, 0, 0), np.array([2, 1, 2])).tolist() == [0.5, 1.5, 1, 0, 0]


def test_decay_by_hand_starts_again_in_each_response():
    assert decay(_f(1, 2, 4, 8), np.array([3, 1]), 0.5).tolist() == [0.5, 0.5, 0.5, 4]
    assert decay(_f(1, 2, 4), np.array([3]), 1.0).tolist() == [1, 2, 4]


def test_smoothing_by_hand_stays_within_a_response():
    # (1+4)/2, (1+4+7)/3, (4+7)/2; a single token stays; (8+2)/2 twice
    weights = smooth(_f(1, 4, 7, 100, 8, 2), np.array([3, 1, 2]), 3)
    assert weights.tolist() == [2.5, 4, 5.5, 100, 5, 5]


def test_a_window_wider_than_the_responses_gives_their_means():
    assert smooth(_f(1, 4, 7, 8, 2), np.array([3, 2]), 9).tolist() == [4, 4, 4, 5, 5]


def test_smoothing_zeros_gives_zeros_behind_large_weights():
    assert smooth(_f(1e8, 0.1, 0, 0, 0), np.array([5]), 3).tolist()[3:] == [0, 0]


def test_a_word_has_the_mean_of_its_tokens():
    starts = np.array([True, False, True, True, False, False])
    assert smooth_words(_f(1, 3, 5, 2, 4, 9), starts).tolist() == [2, 2, 5, 5, 5, 5]


TOKENS = ["</s>", "ĠHe", "llo", ",", "ĠĠ", "Ċ", "A", "Ġ", "b"]


def _starts(tokens, ids, lengths, special=(0,)):
    table = WordStarts.of_vocabulary(tokens, set(special))
    return table.starts(np.array(ids, np.int32), np.array(lengths)).astype(int).tolist()


def test_words_stand_between_white_space_and_special_tokens_alone():
    # "llo" opens a response; " He" "llo" ","; newline; "A" behind the newline; end of turn.
    assert _starts(TOKENS, [2, 1, 2, 3, 5, 6, 8, 0], [1, 7]) == [1, 1, 0, 0, 1, 1, 0, 1]
    # Nothing goes on behind a special token, and a lone space belongs to what follows it.
    assert _starts(TOKENS, [6, 0, 8, 7, 8], [5]) == [1, 1, 1, 1, 0]


def test_sentencepiece_writes_its_spaces_otherwise():
    # "č" is a letter here, in byte-level vocabularies it is a carriage return.
    tokens = ["</s>", "▁po", "č", "asi", "<0x0A>", "▁", "月"]
    assert _starts(tokens, [1, 2, 3, 4, 3, 5, 6, 0], [8]) == [1, 0, 0, 1, 1, 1, 0, 1]


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(MismatchError, match="token id 9 is not in the tokenizer's vocabulary of 9"):
        _starts(TOKENS, [1, 9], [2])


def test_the_words_of_a_real_tokenizer_are_those_of_the_text(shared_folder):
    from transformers import AutoTokenizer

    folder = shared_folder / "models" / "tiny-chat"
    text = "Well, it's fine:\nbe  careful!\n\n- unbelievable señor"
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = WordStarts.of_folder(folder).starts(np.array(ids), np.array([len(ids)]))
    words = [tokenizer.decode(piece).strip() for piece in np.split(np.array(ids), np.flatnonzero(found)[1:])]
    assert [word for word in words if word] == text.split()


def test_shrinking_by_hand():
    # x = 1, 3, 1, 3: successive differences 2, so noise = 12 / (2 * 3) = 2; mean(x^2) = 5; factor 1 - 2 / 5.
    weights = shrink(np.exp(_f(1, 3, 1, 3)), np.array([4]))
    np.testing.assert_allclose(np.log(weights), [0.6, 1.8, 0.6, 1.8], rtol=1e-6)


def test_what_only_jumps_shrinks_to_one_and_what_is_level_stays():
    # 1, -1, 1, -1: noise 12 / 6 = 2 over mean(x^2) = 1. Level, and single, responses have no noise. log 1 = 0 stays.
    logs = _f(1, -1, 1, -1, 2, 2, 2, -3, 0, 0)
    weights = shrink(np.exp(logs), np.array([4, 3, 1, 2]))
    np.testing.assert_allclose(np.log(weights), [0, 0, 0, 0, 2, 2, 2, -3, 0, 0], atol=1e-6)


def test_responses_shrink_by_themselves():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, size=50)
    weights = np.exp(rng.normal(0.3, 0.5, size=lengths.sum())).astype(np.float32)
    together = np.split(shrink(weights, lengths), np.cumsum(lengths)[:-1])
    for found, own in zip(together, np.split(weights, np.cumsum(lengths)[:-1]), strict=True):
        logs = [math.log(w) for w in own]
        n = len(logs)
        noise = sum((b - a) ** 2 for a, b in pairwise(logs)) / (2 * (n - 1)) if n > 1 else 0.0
        factor = max(0.0, 1 - noise / (sum(x * x for x in logs) / n))
        np.testing.assert_allclose(found, [math.exp(factor * x) for x in logs], rtol=1e-5)


def test_shrinking_zeros_is_refused():
    with pytest.raises(
        ValueError, match="'shrink' takes the log .* 2 of 3 that are 0. Remove 'shrink' from weights.transforms"
    ):
        shrink(_f(0, 1, 0), np.array([3]))


def test_positions_are_relative_to_the_response_by_hand():
    # Two bins. Of 4 tokens two are in each; of 1 and the middle of 3, the middle lies in the second.
    sums, counts = position_sums(_f(1, 2, 3, 4, 5, 6, 7, 8), np.array([4, 1, 3]), 2)
    assert (sums.tolist(), counts.tolist()) == ([1 + 2 + 6, 3 + 4 + 5 + 7 + 8], [3, 5])


def test_dividing_by_the_means_leaves_mean_one_at_every_position():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, size=300)
    weights = rng.gamma(2.0, size=lengths.sum()).astype(np.float32)
    sums, counts = position_sums(weights, lengths, 7)
    flat, same = position_sums(divide_by_position(weights, lengths, sums / counts), lengths, 7)
    np.testing.assert_array_equal(counts, same)
    np.testing.assert_allclose(flat / counts, 1, rtol=1e-6)


def test_where_all_weights_are_zero_they_stay():
    assert divide_by_position(_f(0, 3), np.array([2]), np.array([0.0, 1.5])).tolist() == [0, 2]
