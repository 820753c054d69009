"""The counter behind `python -m benchmarks.roofline`: operations and bytes by hand."""

import pytest
import torch
from torch import Tensor, nn

import train.model.logps
from benchmarks.roofline.card import BYTES, FLOAT32_PRODUCTS, LAUNCH_S, PRODUCTS, Card, Kernel
from train.model.attention.groups import Scoring
from train.model.attention.layout import CHOSEN, REJECTED, Layout
from train.model.attention.packed import Packing


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


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, "_varlen_attn"), (torch.float32, "flex")])
@pytest.mark.parametrize(("window", "visible"), [(None, 19), (3, 15)])
def test_attention_of_a_packed_pair_counts_what_each_token_sees(dtype, kernel, window, visible) -> None:
    """Prompt of 3, chosen of 2, rejected of 1: 1 + 2 + 3, 4 + 5 and 4 keys; with a window of 3: 1 + 2 + 3 + 3 * 3."""
    card = Card()
    packing = Packing(Layout.of_tokens([0, 0, 0, CHOSEN, CHOSEN, REJECTED]), torch.device("cpu"))
    tensors = [make(card, 1, heads, 6, 16, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]
    with card.running():
        packing.attend(nn.Module(), *tensors, Scoring(window=window)).sum().backward()
    found = counted(card)
    assert found[kernel].flop == 4 * 4 * 16 * visible
    assert found[f"{kernel}_backward"].flop == 10 * 4 * 16 * visible


def test_what_is_compiled_is_one_kernel_without_tensors_between() -> None:
    card = Card()
    logits, ids = make(card, 8, 1000, dtype=torch.bfloat16).requires_grad_(), torch.arange(8)
    with card.running():
        logps = train.model.logps._SelectedLogps.apply(logits, ids)
        logps.sum().backward()
    found = counted(card)
    forward, backward = (found[f"compiled_{name}"] for name in ("selected_logps", "gradient_of_logits"))
    assert forward.num_bytes == 2 * 8 * 1000 + 8 * 8 + 2 * 4 * 8  # logits and ids in, two float32 a row out
    assert backward.num_bytes == 2 * 2 * 8 * 1000 + 8 * 8 + 4 * 8 + 4  # the gradient of a sum is one number
    # Never anything of that size in float32. The gradient is written over the logits; a leaf like these keeps a copy of it.
    assert card.peak_bytes < 2 * 2 * 8 * 1000 + 1000
