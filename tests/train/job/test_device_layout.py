"""Packed attention that works where the model is loaded and fails where it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from train.job.job import run_job
from train.model.attention.packed import Packing


def history_of(folder: Path) -> list[dict]:
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [{name: log[name] for name in ("loss", "logps/chosen", "grad_norm")} for log in history if "loss" in log]


@pytest.mark.parametrize("loss", [{}, {"name": "tdpo1"}], ids=["alone", "with a reference model"])
def test_the_training_goes_on_with_padded_sequences(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loss: dict
) -> None:
    run_job(make_config(loss=loss, model={"packing": False}, output={"folder": str(tmp_path / "padded")}))
    ordinary = Packing.attend

    def attend(self: Packing, *inputs: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("no kernel for the backward pass")
        return ordinary(self, *inputs)

    monkeypatch.setattr(Packing, "attend", attend)
    run_job(make_config(loss=loss))
    assert (
        "two padded sequences per pair: its decoder does not run packed: no kernel for the backward pass" in caplog.text
    )
    padded = history_of(tmp_path / "padded")
    assert len(padded) == 5
    assert history_of(tmp_path / "out") == padded
