"""Outputs that are computed again in the backward pass instead of being kept for it, because that is cheap.

Autograd keeps what goes into a matrix product: the output of a norm, the product of a gate, a weight rounded to bfloat16. Each
is an elementwise function of tensors that are in memory anyway. `cheap` marks such an output. Inside `recomputing`, autograd
keeps how to compute it instead of the output itself. Gradients are the same to the bit. Not here: which outputs those are
(`elementwise.py`), and layers that are computed again as a whole, matrix products too (`policy.enable_checkpointing`, inside
which marks have no effect).
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _Recipe:
    """How to compute an output again. All operations that need it share one copy, which goes when the last has had it."""

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.compute, self.inputs = compute, [_Kept(tensor.detach(), tensor._version) for tensor in inputs]
        self.version = output._version
        self.num_keepers = self.num_waiting = 0
        self.output: Tensor | None = None

    def take(self) -> Tensor:
        if self.output is None:
            self.num_waiting = self.num_keepers
            with torch.no_grad():
                self.output = self.compute(*(kept.take() for kept in self.inputs))
        self.num_waiting -= 1
        output = self.output
        if self.num_waiting == 0:
            self.output = None
        return output


class _Kept(NamedTuple):
    """A tensor that is kept as it is. Autograd does not check versions where it has hooks, so this does."""

    tensor: Tensor
    version: int

    def take(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor {tuple(self.tensor.shape)} that the backward pass needs was changed in place: it is at version "
                f"{self.tensor._version}, expected {self.version}"
            )
        return self.tensor


class _View(NamedTuple):
    """The view of an output that was to be kept."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def take(self) -> Tensor:
        return self.recipe.take().as_strided(self.size, self.stride, self.offset)


# Found by the memory of the output. A recipe lives as long as its output, or as long as a view of it that autograd needs.
_Marked = MutableMapping[StorageWeakRef, _Recipe]
_marked: ContextVar[_Marked | None] = ContextVar("_marked", default=None)


@contextmanager
def recomputing() -> Iterator[None]:
    """Let autograd keep no outputs of `cheap` in a forward pass."""
    token = _marked.set(WeakValueDictionary())
    try:
        with saved_tensors_hooks(_keep, lambda kept: kept.take()):
            yield
    finally:
        _marked.reset(token)


def cheap(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `compute(*inputs)`, a new tensor that may be computed again from inputs which stay in memory."""
    output = compute(*inputs)
    marked = None if torch.compiler.is_compiling() else _marked.get()  # a compiler decides itself what is kept
    if marked is not None:
        recipe = _Recipe(compute, inputs, output)
        output._recipe = recipe  # type: ignore[attr-defined]
        marked[StorageWeakRef(output.untyped_storage())] = recipe
    return output


def _keep(tensor: Tensor) -> _Kept | _View:
    marked = _marked.get()
    recipe = marked.get(StorageWeakRef(tensor.untyped_storage())) if marked else None
    if recipe is None or tensor._version != recipe.version:  # not marked, or no longer what `compute` made
        return _Kept(tensor, tensor._version)
    recipe.num_keepers += 1
    return _View(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())
