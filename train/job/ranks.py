"""The processes of one training job, as torchrun or accelerate started them."""

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn


def join_ranks() -> PartialState:
    """Return which of the processes this is; the first call joins the others.

    Without `cpu=True`, the processes on a machine without an accelerator would not find each other.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def shard_on_cpus(accelerator: Accelerator, plugin_settings: dict[str, object]) -> None:
    """Make accelerate shard a model (FSDP2) on CPUs, where it would silently copy it to every process.

    Call it before the model is prepared.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**plugin_settings)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def gather_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters of a sharded model, whole and on the CPU, on the first process; an empty dict on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]  # a model's values are tensors
