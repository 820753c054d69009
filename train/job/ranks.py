"""The processes of one training job, as torchrun or accelerate started them."""

from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn


def join_ranks() -> PartialState:
    """Return which of the processes this one is; the first call joins the others.

    On a machine without an accelerator it has to be said that the CPU is meant, else every process believes itself alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def shard_on_cpus(accelerator: Accelerator, plugin_settings: dict[str, Any]) -> None:
    """Make accelerate cut a model up (FSDP2) on CPUs too, where it would copy it to every process without a word.

    Args:
        accelerator: Of the training, its model not prepared yet.
        plugin_settings: Arguments of accelerate's FSDP plugin.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**plugin_settings)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def gather_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters of a model that is cut up, whole and on the CPU: on the first process; the others get none."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return whole  # type: ignore[no-any-return]
