"""The processes of one training job, as torchrun or accelerate started them."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from weights_store.errors import TokenweightsError

T = TypeVar("T")

_PATIENCE = timedelta(hours=4)
"""How long a process waits for another one. The first one reads and writes whole models while the others wait, which can take
longer than the 10 minutes that torch allows on GPUs. A process that dies is noticed at once, by torchrun.
"""


def join_ranks() -> PartialState:
    """Return which of the processes this is; the first call joins the others.

    Without `cpu=True`, the processes on a machine without an accelerator would not find each other.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def of_first(compute: Callable[[], T]) -> T:
    """Return what `compute` returns on the first process, the only one that calls it. It has to be something to pickle.

    Raises:
        TokenweightsError: The first process raised it.
    """
    outcome: list[T | TokenweightsError | None] = [None]
    if join_ranks().is_main_process:
        try:
            outcome = [compute()]
        except TokenweightsError as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], TokenweightsError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]  # only the others had None


def shard(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Split a model over the processes (FSDP2), with its optimizer. Parameters become those of the first process.

    The other processes need memory for whole parameters, but no values, see `load_skeleton`. Buffers are each process's own.
    In bfloat16 parameters are gathered rounded, gradients are summed in float32, and what the model returns is not rounded,
    which accelerate's setting would do to log-probs.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = (
        True  # here, not in the environment, where transformers would see it for every model
    )
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # accelerate sends everything that a state dict holds, and cannot send buffers.
    stored = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    _register(model, stored, persistent=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    _register(model, stored, persistent=True)
    return model, optimizer


def _register(model: nn.Module, buffers: list[str], *, persistent: bool) -> None:
    for buffer in buffers:
        owner, _, name = buffer.rpartition(".")
        model.get_submodule(owner).register_buffer(name, model.get_buffer(buffer), persistent=persistent)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass has left whole on every process; do nothing for other models."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_on_cpus(accelerator: Accelerator, plugin_settings: dict[str, object]) -> None:
    """Make accelerate shard a model (FSDP2) on CPUs, where it would silently copy it to every process.

    Call it before the model is prepared.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_settings)


def gather_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters of a sharded model, whole and on the CPU, on the first process; an empty dict on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]  # a model's values are tensors
