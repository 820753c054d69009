import pytest
import torch

from tests.train.model.test_packing import random_pairs
from train.model.attention.blocks import seen_blocks
from train.model.attention.layout import Layout
from train.model.attention.packed import Packing
from train.model.collate import PairCollator

LENGTHS = [(90, 150, 70), (9, 200, 3), (300, 40, 260), (5, 1, 1)]


@pytest.mark.parametrize("window", [None, 7])
def test_flex_attention_looks_at_every_block_in_which_somebody_sees_somebody(window: int | None) -> None:
    """Flex attention itself is not run: its mask function, and which blocks of 128 it would skip."""
    packing = Packing(PairCollator()(random_pairs(LENGTHS, vocab_size=96))["layout"], torch.device("cpu"))
    tokens = torch.arange(packing.layout.num_tokens)
    block_mask = packing.block_mask(window)
    expected = packing.sees(tokens[:, None], tokens[None], window)
    no_head = torch.zeros((), dtype=torch.long)
    assert torch.equal(block_mask.mask_mod(no_head, no_head, tokens[:, None], tokens[None]), expected)
    looked_at = block_mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert looked_at[: len(tokens), : len(tokens)][expected].all()
    assert not looked_at.all()  # pairs that share no block are skipped


def test_the_table_of_blocks_by_hand() -> None:
    # prompt 0..199, chosen 200..299, rejected 300..511: blocks 0 and 1, then 1 and 2, then 2 and 3
    table = seen_blocks(Layout.of([(0, 200), (1, 100), (2, 212)]))
    assert table.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    # two pairs of one block of prompt and one of chosen each
    table = seen_blocks(Layout.of([(0, 128), (1, 128), (4, 128), (5, 128)]))
    assert table.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_long_row_takes_a_table_of_blocks_not_of_tokens() -> None:
    """64 k tokens: the table has 512 x 512 entries, where a mask of tokens would have 4 billion."""
    runs = [(4 * pair + branch, length) for pair in range(64) for branch, length in enumerate((512, 256, 256))]
    packing = Packing(Layout.of(runs), torch.device("cpu"))
    block_mask = packing.block_mask(None)
    assert block_mask.kv_indices.shape == (1, 1, 512, 512)
    assert int(block_mask.kv_num_blocks.max()) == 6  # of the pair's eight: the prompt's four and two of a response
