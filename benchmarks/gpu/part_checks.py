"""Is what the card computes right? The checks of `tests/gpu`, without pytest."""

from collections.abc import Callable
from functools import partial

from benchmarks.gpu.context import Context
from tests.gpu.checks import CHECKS, full_float32

ORDER = ("bfloat16", "job", "losses", "packed", "attribution", "compile")
"""What training and scoring rest on comes first; float32 compiles kernels of its own, which takes longer."""


def run(ctx: Context) -> None:
    """Run them in turn."""
    for name in sorted(CHECKS, key=lambda name: [name.startswith(kind) for kind in ORDER].index(True)):
        if not (ctx.quick and name == "compile"):
            ctx.attempt(name, partial(_check, ctx.device, name))


def _check(device: str, name: str, record: Callable[..., None]) -> None:
    with full_float32():
        CHECKS[name](device)
    record(passed=True)
