"""The checks by pytest: on the CPU, so that they are known to run, and with `-m gpu` on a card."""

import pytest
import torch

from tests.gpu.checks import CHECKS, SLOW_ON_CPUS, full_float32

torch.set_num_threads(1)
ON_A_CARD = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in CHECKS if name not in SLOW_ON_CPUS]
    + [pytest.param(name, "cuda", marks=ON_A_CARD) for name in CHECKS],
)
def test_what_a_device_computes_is_right(name: str, device: str) -> None:
    with full_float32():
        CHECKS[name](device)
