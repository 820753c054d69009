import numpy as np
import pytest
import torch
from torch import nn

from tests.train.model.attention.plain_varlen import plain_varlen, use_segments
from tests.train.model.test_packing import build, check_packed_equals_separate, random_pairs
from train.model.attention.groups import Scoring
from train.model.attention.layout import Layout
from train.model.attention.packed import Packing, way_of
from train.model.attention.segments import Segments
from train.model.attribution import attribute_tokens
from train.model.collate import PairCollator
from train.model.packing import enable_packing

CPU = torch.device("cpu")
LENGTHS = [(7, 9, 6, 8), (1, 1, 12, 2), (11, 3, 1, 7), (4, 8, 8, 1)]  # longer than the windows of 5


def test_segments_by_hand() -> None:
    # pair 0: prompt a b, chosen c, rejected d e; pair 1: prompt f, chosen g
    segments = Segments.of(Layout.of_tokens([0, 0, 1, 2, 2, 4, 5]), CPU)
    # queries a b | c | d e | f | g; keys a b | a b c | a b d e | f | f g
    assert segments.query_ends.tolist() == [0, 2, 3, 5, 6, 7]
    assert segments.key_ends.tolist() == [0, 2, 5, 9, 10, 12]
    assert (segments.max_queries, segments.max_keys) == (2, 4)
    assert segments.key_places.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6]
    assert segments.own_keys.tolist() == [0, 1, 4, 7, 8, 9, 11]
    chosen, rejected = segments.repeats
    assert [each.tolist() for each in chosen] == [[0, 1, 5], [2, 3, 10]]
    assert [each.tolist() for each in rejected] == [[0, 1], [5, 6]]


def test_segments_of_responses_behind_a_row_of_prompts_by_hand() -> None:
    # prompts a b, f; responses g of pair 1, then d e and c of pair 0
    row, prompts = Layout.of([(5, 1), (2, 2), (1, 1)]), Layout.of([(0, 2), (4, 1)])
    segments = Segments.of(row, CPU, prompts)
    # places: a 0, b 1, f 2, then g 3, d 4, e 5, c 6; keys f g | a b d e | a b c
    assert segments.key_places.tolist() == [2, 3, 0, 1, 4, 5, 0, 1, 6]
    assert segments.own_keys.tolist() == [1, 4, 5, 8]
    assert segments.repeats == ()
    assert row.before(prompts)[1].tolist() == [1, 2, 2]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("num_keys_heads", [4, 2, 1])
def test_segments_and_a_dense_mask_agree_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, window: int | None, num_keys_heads: int
) -> None:
    """Float64, so that nothing but the layout can differ; four heads of queries."""
    batch = PairCollator(with_anchors=True)(random_pairs(LENGTHS, vocab_size=96))
    packing = Packing(batch["layout"], CPU)
    num_tokens = packing.layout.num_tokens
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, num_tokens, 8) for heads in (4, num_keys_heads, num_keys_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    weights = torch.randn(1, num_tokens, 4, 8, dtype=torch.float64, generator=generator)
    calls = use_segments(monkeypatch)
    got = packing.attend(nn.Module(), *inputs, Scoring(0.3, window))
    assert calls == [num_tokens]
    gradients = torch.autograd.grad((got * weights).sum(), inputs)

    places = torch.arange(num_tokens)
    query, key, value = (tensor.repeat_interleave(4 // tensor.shape[1], dim=1) for tensor in inputs)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(
        ~packing.sees(places[:, None], places[None], window), -torch.inf
    )
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2-window", "qwen3", "gemma3-window"])
@pytest.mark.parametrize("share_beginnings", [True, False])
def test_whole_models_compute_the_same_by_segments(
    monkeypatch: pytest.MonkeyPatch, family: str, share_beginnings: bool
) -> None:
    calls = use_segments(monkeypatch)
    pairs = random_pairs(LENGTHS, vocab_size=96)
    check_packed_equals_separate(build(family), pairs, with_anchors=True, share_beginnings=share_beginnings)
    assert len(calls) >= 3  # one for each layer


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3-window"])
@pytest.mark.parametrize("target", ["max_logit", "gold_logps"])
def test_attributions_are_the_same_by_segments(monkeypatch: pytest.MonkeyPatch, family: str, target: str) -> None:
    model, pairs = build(family), random_pairs([length[:3] for length in LENGTHS], vocab_size=96)
    assert enable_packing(model, attributions=True) is None
    batch = PairCollator(share_beginnings=False)(pairs)
    expected = attribute_tokens(model, batch, target).attributions
    calls = use_segments(monkeypatch)
    got = attribute_tokens(model, batch, target).attributions
    assert sorted(set(calls)) == sorted({23, sum(sum(length[1:3]) for length in LENGTHS)})  # prompts, then responses
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    if target == "max_logit":
        return  # rounding may make another logit the largest one
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attribute_tokens(model, batch, target).attributions
    assert (rounded - expected).abs().mean() < 0.1 * expected.mean()


def test_the_plain_kernel_is_the_usual_attention_of_a_single_sequence() -> None:
    query, key, value = torch.randn(3, 5, 2, 4, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 5], dtype=torch.int32)
    got = plain_varlen(query, key, value, ends, ends, 5, 5, scale=None, window_size=(-1, 0), enable_gqa=True)
    parts = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    torch.testing.assert_close(got, expected[0].transpose(0, 1))


class OnGpu:
    """What `way_of` asks of a tensor."""

    is_cuda = True

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = torch.Size((1, 4, 10, size)), dtype


@pytest.mark.parametrize(
    ("query", "value", "scoring", "way"),
    [
        (OnGpu(64), OnGpu(64), Scoring(), "segments"),
        (OnGpu(256), OnGpu(256, torch.float16), Scoring(0.1, 4096), "segments"),
        (OnGpu(64), OnGpu(64, torch.float32), Scoring(), "blocks"),  # flash attention has half precision alone
        (OnGpu(64), OnGpu(64), Scoring(softcap=50.0), "blocks"),
        (OnGpu(64), OnGpu(64), Scoring(sinks=torch.zeros(4)), "blocks"),
        (OnGpu(192), OnGpu(128), Scoring(), "blocks"),  # DeepSeek: values are smaller than keys
        (OnGpu(20), OnGpu(20), Scoring(), "blocks"),
        (OnGpu(512), OnGpu(512), Scoring(), "blocks"),
        (torch.zeros(1, 4, 10, 64), torch.zeros(1, 4, 10, 64), Scoring(), "groups"),
    ],
)
def test_gpus_take_flash_attention_where_it_can(query, value, scoring, way) -> None:
    assert way_of(query, value, scoring) == way


def test_a_row_of_many_tokens_needs_little_memory_to_lay_out() -> None:
    """64 pairs of 1,024 tokens: a mask of single tokens would have 4 billion entries."""
    runs = [(4 * pair + branch, length) for pair in range(64) for branch, length in enumerate((512, 256, 256))]
    segments = Segments.of(Layout.of(runs), CPU)
    tensors = [segments.key_places, segments.own_keys, *(each for use in segments.repeats for each in use)]
    assert sum(tensor.nbytes for tensor in tensors) < 5e6
    assert np.array_equal(segments.key_ends.diff().numpy().reshape(64, 3), np.tile([512, 768, 768], (64, 1)))
