"""Count what a training step does on a card: a mode of torch that runs operations on tensors without data."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train.model.attention.packed
import train.model.elementwise
import train.model.logps
from train.model.attention.packed import Packing

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
    "log-softmax": {
        "_log_softmax", "logsumexp", "exp", "exp_", "compiled_selected_logps", "compiled_gradient_of_logits",
    },
    "casts and copies": {"_to_copy", "copy_", "clone", "cat", "slice_backward", "select_backward"},
    "gather and scatter": {
        "index", "index_select", "gather", "embedding", "index_put", "index_put_", "_index_put_impl_", "scatter_add_",
        "index_add", "index_add_", "embedding_dense_backward",
    },
    "multiplications": {"mul", "mul_"},
    "additions": {"add", "add_", "sub", "sub_"},
    "reductions": {"sum", "mean"},
    "fused": {
        "_fused_rms_norm", "_fused_rms_norm_backward", "fused_rotation", "fused_rotation_backward", "fused_gate",
        "fused_gate_backward",
    },
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
        formula = _varlen_flop if name.startswith("_varlen_attn") else flop_registry.get(func.overloadpacket)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        flop = formula(*args, **kwargs, out_val=result) if formula else 0
        wide = any(tensor.dtype == torch.float32 for tensor in inputs)
        largest = max((*inputs, *outputs), key=lambda tensor: tensor.numel() * tensor.element_size())
        shape = f"{list(largest.shape)} {str(largest.dtype).removeprefix('torch.')}"
        num_bytes = _bytes_of(name, inputs, outputs)
        rate = VARLEN if formula is _varlen_flop else FLOAT32_PRODUCTS if wide else PRODUCTS
        self.kernels.append(Kernel(name, self.phase, flop, rate, num_bytes, shape))

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
        """Count what is done, on the code path of CUDA and with stand-ins for what cannot run on tensors without data."""
        with (
            mock.patch.object(Tensor, "is_cuda", property(lambda _: True)),
            mock.patch.object(Packing, "block_mask", lambda packing, window: (packing.layout.positions(), window)),
            mock.patch.object(train.model.attention.packed, "flex_attention_forward", self._flex),
            mock.patch.object(train.model.logps, "compiled", self.compiled),
            mock.patch.object(train.model.elementwise, "compiled", self.compiled),
            mock.patch.object(F, "rms_norm", self._rms_norm),
            self,
        ):
            yield

    def _flex(self, _: Any, query: Tensor, key: Tensor, value: Tensor, seen: Any, **__: Any) -> tuple[Tensor, None]:
        positions, window = seen
        # A token sees all that come before it in its own sequence, wherever these are in the row.
        visible = int(np.minimum(positions + 1, window or len(positions)).sum())
        return _Flex.apply(query, key, value, self, visible), None

    def compiled(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts as one kernel, as a compiler makes it."""

        def call(*tensors: Tensor) -> Any:
            with self.uncounted():
                outputs = compute(*tensors)
            self.add(f"compiled_{compute.__name__}", 0, 1, sum(map(byte_size, (*tensors, *tree_leaves(outputs)))))
            return outputs

        return call

    def _rms_norm(self, hidden: Tensor, _shape: Any, weight: Tensor, _epsilon: float | None = None) -> Tensor:
        """On a card it is one kernel in each direction; on a CPU it has several parts."""
        return Fused.apply(self, "_fused_rms_norm", hidden, weight)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count neither kernels nor memory that is free again at the end."""
        num_kernels, peak_bytes = len(self.kernels), self.peak_bytes
        yield
        del self.kernels[num_kernels:]
        self.peak_bytes = max(peak_bytes, self.live_bytes)


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with masks as positions: how many there are cannot be known from shapes."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else [index]
    return found


def byte_size(tensor: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded counts once."""
    numel = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numel *= 1 if stride == 0 else length
    return numel * tensor.element_size()


def _bytes_of(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return what an operation reads and writes. What gathers reads only the rows that it takes; what fills only writes."""
    written = sum(map(byte_size, outputs))
    if name in ("index", "index_select", "gather", "embedding"):
        return 2 * written + sum(byte_size(tensor) for tensor in inputs[1:])
    if name in ("zeros", "ones", "full", "arange", "zeros_like", "new_zeros", "fill_", "zero_", "ones_like"):
        return written
    if name in (
        "scatter_add_",
        "index_add_",
        "index_put_",
        "_index_put_impl_",
    ):  # in place: only the rows that it changes
        return 3 * sum(byte_size(tensor) for tensor in inputs[1:])
    if name == "_fused_adamw_":
        return (
            2 * sum(map(byte_size, inputs)) - sum(map(byte_size, inputs)) // 4
        )  # the gradient, a quarter, is only read
    return sum(map(byte_size, inputs)) + written


def _varlen_flop(*args: Any, **_: Any) -> float:
    """Return the operations of `_varlen_attn` and its backward pass that a causal mask with a window lets through."""
    backward = len([arg for arg in args[:6] if isinstance(arg, Tensor) and arg.dtype.is_floating_point]) == 6
    query, ends = args[backward], args[6:8] if backward else args[3:5]
    windows = [arg for arg in args if isinstance(arg, list)]
    limit = windows[0][0] + 1 if windows and windows[0][0] >= 0 else 1 << 62
    visible = 0
    for queries, keys in zip(*(tensor.diff().tolist() for tensor in ends), strict=True):
        visible += sum(min(seen, limit) for seen in range(keys - queries + 1, keys + 1))
    return (10.0 if backward else 4.0) * query.shape[1] * query.shape[2] * visible


class Fused(torch.autograd.Function):
    """One kernel forward and one backward, over whatever goes in; the first input has the shape of what comes out."""

    @staticmethod
    def forward(ctx: Any, card: Card, name: str, *inputs: Tensor) -> Tensor:
        ctx.card, ctx.name = card, name
        ctx.save_for_backward(*inputs)
        output = torch.empty_like(inputs[0])
        card.add(name, 0, 1, sum(map(byte_size, (*inputs, output))))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        ctx.card.add(f"{ctx.name}_backward", 0, 1, 2 * sum(map(byte_size, inputs)) + byte_size(gradient))
        return (None, None, *map(torch.empty_like, inputs))


class _Flex(torch.autograd.Function):
    """Stand-in for flex attention: shapes, operations and bytes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, card: Card, visible: int) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2).contiguous())
        ctx.save_for_backward(query, key, value, output)
        ctx.card, ctx.flop = card, 4.0 * query.shape[1] * query.shape[3] * visible
        card.add("flex", ctx.flop, FLEX, sum(map(byte_size, (query, query, key, value))))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        ctx.card.add("flex_backward", 2.5 * ctx.flop, FLEX, 2 * sum(map(byte_size, (*tensors, gradient))))
        return (*map(torch.empty_like, tensors[:3]), None, None)
