"""The counter behind `python -m benchmarks.roofline`: operations and bytes by hand."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.roofline.card import BYTES, FLOAT32_PRODUCTS, LAUNCH_S, PRODUCTS, Card, Kernel
from benchmarks.roofline.changes import _segments, varlen_attention
from train.model.attention import CHOSEN, NUM_BRANCHES, REJECTED, Packing, Scoring


def make(card: Card, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with card.fake:
        return torch.empty(*shape, dtype=dtype)


def counted(card: Card) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in card.kernels}


def test_products_and_elementwise_work_are_counted_by_hand() -> None:
    card = Card()
    left, right = (make(card, 300, 400, dtype=torch.bfloat16), make(card, 400, 500, dtype=torch.bfloat16))
    wide, row = make(card, 300, 500), make(card, 500)
    with card.running():
        product = left @ right
        _ = product.view(500, 300).t()  # views cost nothing
        _ = wide * row.expand(300, 500)  # what is expanded is read once
        _ = product.float()
    found = counted(card)
    assert found.keys() == {"mm", "mul", "_to_copy"}
    assert found["mm"].flop == 2 * 300 * 400 * 500
    assert (found["mm"].kind, found["mm"].rate) == ("matrix products", PRODUCTS)
    assert found["mul"].num_bytes == 4 * (300 * 500 + 500 + 300 * 500)
    assert found["_to_copy"].num_bytes == (2 + 4) * 300 * 500
    assert found["mul"].ms == pytest.approx(1e3 * LAUNCH_S)  # 0.4 us of reading and writing: the launch takes longer


def test_a_kernel_takes_as_long_as_the_slower_of_products_and_memory() -> None:
    assert Kernel("mm", "forward", PRODUCTS, PRODUCTS, BYTES / 2).ms == 1000
    assert Kernel("mm", "forward", PRODUCTS / 4, PRODUCTS, BYTES / 2).ms == 500
    assert FLOAT32_PRODUCTS < PRODUCTS / 10


def test_memory_is_live_until_nobody_has_it() -> None:
    card = Card()
    with card.running():
        kept = make(card, 1000) * 1  # made outside, counted from the product on
        passing = kept * 2
        del passing
        _ = kept * 3
    assert (card.live_bytes, card.peak_bytes) == (8000, 8000)  # `kept` and the last one; never all three


def test_positions_that_data_decides_come_from_the_data() -> None:
    card = Card()
    states, mask = make(card, 4, 8), torch.tensor([True, False, True, True])
    with card.running():
        assert states[mask].shape == (3, 8)
        assert int(mask.sum()) == 3


def test_attention_of_a_packed_pair_counts_what_each_token_sees() -> None:
    """Prompt of 3, chosen of 2, rejected of 1: 1 + 2 + 3, 4 + 5 and 4 keys; with a window of 3: 1 + 2 + 3 + 3 * 3."""
    branches = torch.tensor([0, 0, 0, CHOSEN, CHOSEN, REJECTED])
    packing = Packing(branches, torch.tensor([0, 1, 2, 3, 4, 3]))
    for window, visible in ((None, 19), (3, 15)):
        card = Card()
        tensors = [make(card, 1, heads, 6, 16, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
        with card.with_flex(), card.running():
            packing.attend(nn.Module(), *tensors, Scoring(window=window)).sum().backward()
        with varlen_attention(card), card.running():
            packing.attend(nn.Module(), *tensors, Scoring(window=window)).sum().backward()
        found = counted(card)
        for forward, backward in (("flex", "flex_backward"), ("_varlen_attn", "_varlen_attn_backward")):
            assert found[forward].flop == 4 * 4 * 16 * visible
            assert found[backward].flop == 10 * 4 * 16 * visible
    index, of_queries, of_keys = _segments([*branches.tolist(), NUM_BRANCHES, NUM_BRANCHES + CHOSEN])
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 6, 7]
    assert of_queries.tolist() == [0, 3, 5, 6, 7, 8]
    assert of_keys.tolist() == [0, 3, 8, 12, 13, 15]
