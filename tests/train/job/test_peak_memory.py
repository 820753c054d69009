"""With a vocabulary of 131,072 no tensor `[2 B, T, V]` exists at any time. Tensors are counted, not pages: none can flake."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from train.data.dataset import Pair, StoredResponse
from train.model.collate import Batch, PairCollator, model_inputs
from train.model.logps import CHUNK_ROWS, Divergence, per_token_logps
from train.model.packing import enable_packing

VOCAB_SIZE = 131_072
NUM_PAIRS, PROMPT, RESPONSE = 4, 60, 76  # 608 response tokens; padded, 8 sequences of 136 tokens
CPU_LOGITS = CHUNK_ROWS * VOCAB_SIZE
PADDED_LOGITS = 2 * NUM_PAIRS * (PROMPT + RESPONSE) * VOCAB_SIZE  # 143 M, 0.57 GB in float32


class TensorWatch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and the most bytes that live at a time beyond those at first."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.peak_bytes = self.live_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() <= storage.nbytes():  # an expanded tensor takes no room
            self.largest = max(self.largest, tensor.numel())
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes


@pytest.fixture(scope="module")
def wide_model() -> torch.nn.Module:
    """A body of next to nothing under a vocabulary of 128 k."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    assert enable_packing(model) is None
    return model


def pack(num_pairs: int) -> Batch:
    """Pairs in one packed row."""
    random = np.random.default_rng(0)

    def ids(length: int) -> Any:
        return random.integers(0, VOCAB_SIZE, length, np.int32)

    def response() -> StoredResponse:
        return StoredResponse(ids(RESPONSE), *(np.zeros(RESPONSE, np.float32),) * 2)

    return PairCollator()([Pair(str(i), ids(PROMPT), response(), response()) for i in range(num_pairs)])


@pytest.fixture
def watch() -> TensorWatch:
    return TensorWatch()


def test_the_watch_sees_whole_logits_where_they_are_made(wide_model, watch) -> None:
    weight = wide_model.get_output_embeddings().weight
    rows = torch.zeros(100, 16)
    with watch:
        loss = (rows @ weight.T).log_softmax(-1)[:, 0].sum()
        loss.backward()
    weight.grad = None
    assert watch.largest == 100 * VOCAB_SIZE
    assert watch.peak_bytes >= 2 * 4 * 100 * VOCAB_SIZE  # logits and their softmax


def test_log_probs_and_their_gradients_never_make_all_logits(wide_model, watch) -> None:
    batch = pack(NUM_PAIRS)
    assert int(batch["completion_mask"].sum()) == 608
    with watch:
        terms = per_token_logps(wide_model, **model_inputs(batch))
        terms.logps.sum().backward()
    assert all(parameter.grad is not None for parameter in wide_model.parameters())
    wide_model.zero_grad()
    assert CPU_LOGITS // 2 < watch.largest <= CPU_LOGITS < PADDED_LOGITS / 4
    # one chunk of logits and one of its gradient, and little beside them: 0.3 GB where [2 B, T, V] alone takes 0.57
    assert watch.peak_bytes < 0.6 * 4 * PADDED_LOGITS


def test_an_exact_kl_never_makes_all_logits_of_either_model(wide_model, watch) -> None:
    batch = pack(NUM_PAIRS // 2)
    with watch:
        divergence = Divergence("policy_ref", reference=wide_model)
        inputs = model_inputs(batch)
        terms = per_token_logps(wide_model, **inputs, divergence=divergence)
        assert terms.kls is not None
        (terms.logps.sum() + terms.kls.sum()).backward()
    wide_model.zero_grad()
    assert watch.largest <= CPU_LOGITS // 4 < PADDED_LOGITS // 2 / 8
    assert watch.peak_bytes < 4 * PADDED_LOGITS / 2
