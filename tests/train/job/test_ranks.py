"""How a model is handed to accelerate to be split, without processes; those are in `test_parallel.py`."""

from types import SimpleNamespace

import torch
from torch import nn

from train.job.ranks import shard


class Counting(nn.Module):
    """A parameter, a buffer that is saved, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.register_buffer("bias_of_router", torch.tensor([1.0, 2.0]))
        self.inner.register_buffer("frequencies", torch.tensor([3.0]), persistent=False)


def test_saved_buffers_are_kept_from_accelerate_which_can_only_send_parameters() -> None:
    model, seen = Counting(), []
    before = list(model.state_dict())
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False, mixed_precision_policy="accelerate's")

    def prepare(model, optimizer):
        seen.extend(model.state_dict())
        return model, optimizer

    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", prepare=prepare)
    shard(accelerator, model, torch.optim.SGD(model.parameters()))
    assert seen == ["inner.weight", "inner.bias"]
    assert list(model.state_dict()) == before == ["inner.weight", "inner.bias", "inner.bias_of_router"]
    assert model.inner.bias_of_router.tolist() == [1.0, 2.0]
    assert plugin.cpu_ram_efficient_loading
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
