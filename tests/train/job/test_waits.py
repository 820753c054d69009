"""A step never waits for the device: a GPU that has to answer the host in between stands still meanwhile.

Run on a CPU, with attention as on a GPU; every operation that would have to be answered is noted.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.model.attention.plain_varlen import use_segments

ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "bincount"}
"""Operations whose result, or its size, the host must wait for; and indices that are masks."""


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        if name in ASKS or masks:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits() -> None:
    values = torch.arange(4.0)
    with Waits() as waits:
        values.sum().item()
        values[values > 1]
        bool(values.sum() > 3)
        values.where(values > 1, 0.0).sum()
    assert waits.seen == ["_local_scalar_dense", "index", "_local_scalar_dense"]


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "tis_dpo"},
        {"name": "sft", "beta": None},
        {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5},
        {"name": "tdpo2", "beta": 0.1, "alpha": 0.5},
    ],
    ids=lambda loss: loss["name"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_several_micro_batches_never_waits(make_trainer, monkeypatch, loss: dict, dtype: str) -> None:
    if loss["name"] == "tdpo2":  # the policy without its adapters is the reference
        trainer = make_trainer(loss=loss, model={"dtype": dtype}, lora={"rank": 2})
    else:
        trainer = make_trainer(loss=loss, model={"dtype": dtype})
    pairs = [trainer.train_dataset.pairs[row] for row in range(8)]
    trainer.budget.tokens = 40
    calls = use_segments(monkeypatch)
    step = trainer.cut_step(pairs, torch.device("cpu"))
    assert len(step.batches) > 2
    with Waits() as waits:
        trainer.training_step(trainer.model, step)
    assert len(calls) >= 2 * len(step.batches)
    assert waits.seen == []
