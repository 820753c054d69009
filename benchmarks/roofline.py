"""`python -m benchmarks.roofline`: predict a training step on an H200 from the operations that our code asks for; no GPU.

The step of `tokenweights train` (micro-batches, losses, clipping, AdamW) runs in its true sizes on tensors that have a shape
and no data (`FakeTensorMode`), on the code path of CUDA. Below autograd, every operation is counted: floating-point
operations of matrix products and attention, bytes that everything else reads and writes, memory that is live. A kernel takes
as long as the slower of the two says, and at least `LAUNCH_S`; a step takes the sum of its kernels, if the host keeps up with
launching them. All of that is a prediction; `MEASURED_MS` says how near it comes.

Not here: what a compiler fuses, and kernels written in Triton, each of which needs a stand-in like `_Flex`.
"""

import argparse
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

import train.model.attention
from benchmarks.train_inputs import BODIES, MAX_SIDE, VOCABULARIES, read_pairs
from train.data.dataset import Pair
from train.loss.config import LossSection
from train.loss.objective import compute_pair_losses
from train.model.attention import PACKED, Packing, Scoring
from train.model.collate import Batch, PairCollator, model_inputs
from train.model.logps import per_token_logps
from train.model.policy import switch_off_noise
from train.model.token_budget import cut_by_tokens

REPO = Path(__file__).resolve().parent.parent
PRODUCTS, BYTES, LAUNCH_S = 0.70 * 989e12, 0.67 * 4.8e12, 3e-6
"""Of an H200: bf16 products per second and bytes per second, as shares of the data sheet, and the shortest kernel. The shares
are those that reproduce `MEASURED_MS`; good kernels over large tensors reach 0.75 and 0.8."""
FLOAT32_PRODUCTS = 45e12
FLEX, VARLEN = 40e12, 55e12
"""Operations of attention per second, forward and backward together, that the mask lets through: from 1.7 and 1.2 ms measured
for a layer over rows of 32 short pairs. Longer pairs reach three times as much."""
MEASURED_MS = {
    "all": 237,
    "matrix products": 70,
    "casts and copies": 44,
    "multiplications": 32,
    "additions": 19,
    "attention backward": 13,
    "log-softmax": 8,
    "optimizer": 7,
}
"""Kernels of a step of 32 pairs on one H200, 26 November 2026, by the profiler: float32 parameters, autocast, flex."""
KINDS = {
    "attention backward": {"flex_backward", "_varlen_attn_backward"},
    "attention forward": {"flex", "_varlen_attn"},
    "optimizer": {"_fused_adamw_"},
    "clipping": {"_foreach_norm", "_foreach_mul_", "_foreach_mul", "linalg_vector_norm", "stack"},
    "log-softmax": {"_log_softmax", "logsumexp", "exp", "exp_"},
    "casts and copies": {"_to_copy", "copy_", "clone", "cat", "slice_backward", "select_backward"},
    "gather and scatter": {
        "index", "index_select", "gather", "embedding", "index_put", "index_put_", "_index_put_impl_", "scatter_add_",
        "index_add", "index_add_", "embedding_dense_backward",
    },
    "multiplications": {"mul", "mul_"},
    "additions": {"add", "add_", "sub", "sub_"},
    "reductions": {"sum", "mean"},
    "fused norms": {"_fused_rms_norm", "_fused_rms_norm_backward"},
}  # fmt: skip
"""Names of operations, for those that have no formula in torch's counter of products; what is in none is `other`."""

NO_KERNEL = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_local_scalar_dense",
}


# --- counting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One operation on the card: `flop` at `rate` per second, and bytes read and written."""

    name: str
    phase: str
    flop: float
    rate: float
    num_bytes: float
    shape: str = ""
    """Of the largest tensor."""

    @property
    def kind(self) -> str:
        """The class that the profile has it in."""
        named = [kind for kind, names in KINDS.items() if self.name in names]
        return named[0] if named else "matrix products" if self.flop else "other"

    @property
    def ms(self) -> float:
        return 1e3 * max(LAUNCH_S, self.flop / self.rate, self.num_bytes / BYTES)


@dataclass
class Card(TorchDispatchMode):
    """Run what is done under it on tensors without data, and count. Integer tensors that hold data keep it.

    What depends on data (the positions of response tokens, the lengths of pairs) is computed from those.
    """

    fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    kernels: list[Kernel] = field(default_factory=list)
    phase: str = "forward"
    live_bytes: int = 0
    peak_bytes: int = 0
    parameter_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            if func.overloadpacket is torch.ops.aten.index and len(args) > 1:
                args = (args[0], _without_masks(args[1]))
            with self.fake:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self.hold(tensor)
        name = func.overloadpacket.__name__
        if func.is_view or name in NO_KERNEL or not (outputs or name.startswith(("_foreach", "_fused"))):
            return
        formula = flop_registry.get(func.overloadpacket)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        flop = formula(*args, **kwargs, out_val=result) if formula else 0
        wide = any(tensor.dtype == torch.float32 for tensor in inputs)
        largest = max((*inputs, *outputs), key=lambda tensor: tensor.numel() * tensor.element_size())
        shape = f"{list(largest.shape)} {str(largest.dtype).removeprefix('torch.')}"
        num_bytes = _bytes_of(name, inputs, outputs)
        self.kernels.append(Kernel(name, self.phase, flop, FLOAT32_PRODUCTS if wide else PRODUCTS, num_bytes, shape))

    def add(self, name: str, flop: float, rate: float, num_bytes: float) -> None:
        """Count a kernel that has a stand-in."""
        self.kernels.append(Kernel(name, self.phase, flop, rate, num_bytes))

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until nobody has it any more."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, FakeTensor) or id(storage) in self._known:
            return
        self._known.add(id(storage))
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._free, id(storage), storage.nbytes())

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= num_bytes

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count, with branches on `is_cuda` taken as on a card and flex attention replaced by its stand-in."""
        with (
            mock.patch.object(Tensor, "is_cuda", property(lambda _: True)),
            mock.patch.object(Packing, "attend", _attend_as_on_a_card(self)),
            self,
        ):
            yield


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with masks as positions: how many there are cannot be known from shapes."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return found


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded counts once."""
    numel = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= 1 if stride == 0 else length
    return numel * tensor.element_size()


def _bytes_of(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return what an operation reads and writes. What gathers reads only the rows that it takes; what fills only writes."""
    written = sum(map(_size, outputs))
    if name in ("index", "index_select", "gather", "embedding"):
        return 2 * written + sum(_size(tensor) for tensor in inputs[1:])
    if name in ("zeros", "ones", "full", "arange", "zeros_like", "new_zeros", "fill_", "zero_", "ones_like"):
        return written
    if name in (
        "scatter_add_",
        "index_add_",
        "index_put_",
        "_index_put_impl_",
    ):  # in place: only the rows that it changes
        return 3 * sum(_size(tensor) for tensor in inputs[1:])
    if name == "_fused_adamw_":
        return 2 * sum(map(_size, inputs)) - sum(map(_size, inputs)) // 4  # the gradient, a quarter, is only read
    return sum(map(_size, inputs)) + written


def _attend_as_on_a_card(card: Card) -> Callable[..., Tensor]:
    """Return a `Packing.attend` that counts flex attention and its mask instead of running them."""
    ordinary = Packing.attend

    def attend(
        packing: Packing, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        if not hasattr(train.model.attention, "flex_attention_forward"):
            return ordinary(packing, module, query, key, value, scoring)
        window = scoring.window or int(packing.positions.max()) + 1
        visible = int((packing.positions + 1).clamp(max=window).sum())  # a token sees all before it in its sequence
        return _Flex.apply(query, key, value, card, visible)

    return attend


class _Flex(torch.autograd.Function):
    """Stand-in for flex attention: shapes, operations and bytes. Queries and keys are cast as transformers does it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, card: Card, visible: int) -> Tensor:
        ctx.dtypes = [tensor.dtype for tensor in (query, key, value)]
        query, key = query.to(value.dtype), key.to(value.dtype)
        output = torch.empty_like(query.transpose(1, 2).contiguous())
        ctx.save_for_backward(query, key, value, output)
        ctx.card, ctx.flop = card, 4.0 * query.shape[1] * query.shape[3] * visible
        card.add("flex", ctx.flop, FLEX, sum(map(_size, (query, query, key, value))))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        ctx.card.add("flex_backward", 2.5 * ctx.flop, FLEX, 2 * sum(map(_size, (*tensors, gradient))))
        gradients = (torch.empty_like(tensor).to(dtype) for tensor, dtype in zip(tensors[:3], ctx.dtypes, strict=True))
        return (*gradients, None, None)


# --- the step ----------------------------------------------------------------------------------------------------------


def build_model(card: Card, num_layers: int | None = None, **changes: Any) -> nn.Module:
    """Return the Llama of `make bench-train DEVICE=cuda` without data, in float32, with packed attention."""
    body: dict[str, Any] = {**BODIES["cuda"], **changes}
    config = LlamaConfig(
        **{**body, "num_hidden_layers": num_layers or body["num_hidden_layers"]},
        vocab_size=VOCABULARIES["128k"],
        num_key_value_heads=body["num_attention_heads"] // 2,
        tie_word_embeddings=True,
    )
    with card.fake:
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(PACKED)
    switch_off_noise(model)
    for tensor in (*model.parameters(), *model.buffers()):
        card.hold(tensor)
    card.parameter_bytes = card.live_bytes
    return model


def run_step(
    card: Card, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], *, autocast: bool = True
) -> None:
    """Run a step as `PairTrainer.training_step` does: losses of every micro-batch, backward, clipping, update."""
    settings: Any = TypeAdapter(LossSection).validate_python({"name": "tis_dpo", "beta": 0.1})
    collator = PairCollator()
    num_pairs = sum(len(batch["pair_weights"]) for batch in batches)
    with card.running():
        for batch in batches:
            card.phase = "forward"
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                chosen, rejected, _ = collator.split_sides(batch, per_token_logps(model, **model_inputs(batch)))
                result, _ = compute_pair_losses(settings, chosen, rejected)
                total = (result.losses * batch["pair_weights"]).sum() / num_pairs
            card.phase = "backward"
            total.backward()
        card.phase = "update"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()


def cut_step(pairs: Sequence[Pair], pairs_at_once: int) -> list[Batch]:
    """Return the micro-batches of a step, as the benchmark's trainer cuts it."""
    collator = PairCollator()
    sizes = [collator.num_tokens(pair) for pair in pairs]
    return [collator(part) for part in cut_by_tokens(pairs, sizes, 3 * MAX_SIDE * pairs_at_once)]


def predict(pairs: Sequence[Pair], pairs_at_once: int) -> Card:
    """Run two steps, and count the second."""
    card = Card()
    model = build_model(card)
    with card.fake:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = cut_step(pairs, pairs_at_once)
    run_step(card, model, optimizer, batches)
    card.kernels.clear()
    run_step(card, model, optimizer, batches)
    return card


def print_table(card: Card, top: int) -> None:
    """Print milliseconds by class and phase, beside what was measured, and the `top` most expensive operations."""
    phases = ("forward", "backward", "update")
    print(f"\n{'predicted ms':<22}" + "".join(f"{name:>10}" for name in (*phases, "all", "kernels", "measured")))
    totals: dict[str, float] = {}
    for kernel in card.kernels:
        totals[kernel.kind] = totals.get(kernel.kind, 0.0) + kernel.ms
    for kind in (*sorted(totals, key=lambda kind: -totals[kind]), "all"):
        of = [kernel for kernel in card.kernels if kind in (kernel.kind, "all")]
        cells = [sum(kernel.ms for kernel in of if kernel.phase == phase) for phase in phases]
        row = "".join(f"{ms:>10.1f}" for ms in (*cells, sum(cells)))
        print(f"{kind:<22}{row}{len(of):>10}{MEASURED_MS.get(kind, ''):>10}")
    print(f"\npeak of memory in tensors, without parameters: {(card.peak_bytes - card.parameter_bytes) / 1e9:.1f} GB")
    same: dict[tuple[str, str, str], list[float]] = {}
    for kernel in card.kernels:
        same.setdefault((kernel.phase, kernel.name, kernel.shape), []).append(kernel.ms)
    print(f"\n{'ms':>8}{'kernels':>9}   operation")
    for key, times in sorted(same.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(times):>8.1f}{len(times):>9}   " + "  ".join(key))


def main() -> None:
    """Predict a step and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument(
        "--work", type=Path, default=REPO / "benchmarks" / "scratch" / "roofline", help="scratch folder"
    )
    parser.add_argument("--pairs-at-once", type=int, default=16)
    parser.add_argument("--top", type=int, default=20, help="operations to list")
    options = parser.parse_args()
    pairs = read_pairs(options.work, options.shared, 32)
    print(json.dumps({"num_pairs": len(pairs), "num_tokens": sum(PairCollator().num_tokens(pair) for pair in pairs)}))
    print_table(predict(pairs, options.pairs_at_once), options.top)


if __name__ == "__main__":
    main()
