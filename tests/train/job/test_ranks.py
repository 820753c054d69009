"""How a model is handed to accelerate to be split, without processes; those are in `test_parallel.py`."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train.job.ranks
from train.job.ranks import join_ranks, shard


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


def test_processes_wait_while_the_first_one_reads_or_writes_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for 10 minutes on GPUs: 70 B parameters in bfloat16 are 140 GB, 23 minutes at 100 MB a second."""
    monkeypatch.setattr(train.job.ranks, "PartialState", lambda **options: options)
    assert join_ranks()["timeout"] > timedelta(minutes=2 * 23)
