"""`python -m benchmarks.roofline`: predict a training step on an H200 from the operations that our code asks for; no GPU.

The step of `tokenweights train` (micro-batches, losses, clipping, AdamW) runs in its true sizes on tensors that have a shape
and no data (`FakeTensorMode`), on the code path of CUDA. Below autograd, every operation is counted: floating-point
operations of matrix products and attention, bytes that everything else reads and writes, memory that is live. A kernel takes
as long as the slower of the two says, and at least `LAUNCH_S`; a step takes the sum of its kernels, if the host keeps up with
launching them. All of that is a prediction; `MEASURED_MS` says how near it comes.

Not here: what a compiler fuses, and kernels written in Triton, each of which needs a stand-in like `_Flex`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.roofline.card import MEASURED_MS, Card
from benchmarks.roofline.changes import CHANGES
from benchmarks.roofline.step import predict
from benchmarks.train_inputs import read_pairs
from train.data.dataset import Pair
from train.model.collate import PairCollator

REPO = Path(__file__).resolve().parent.parent.parent


def print_changes(pairs: Sequence[Pair], pairs_at_once: int) -> None:
    """Print what every change makes of a step."""
    kinds = ("matrix products", "casts and copies", "multiplications", "additions", "log-softmax")
    print(f"\n{'predicted ms':<42}" + "".join(f"{kind[:12]:>14}" for kind in (*kinds, "all", "kernels", "GB peak")))
    for change in CHANGES:
        card = predict(pairs, pairs_at_once, change)
        cells = [sum(kernel.ms for kernel in card.kernels if kind in (kernel.kind, "all")) for kind in (*kinds, "all")]
        row = "".join(f"{ms:>14.1f}" for ms in cells)
        peak = (card.peak_bytes - card.parameter_bytes) / 1e9
        print(f"{change:<42}{row}{len(card.kernels):>14}{peak:>14.1f}")


def print_table(card: Card, top: int) -> None:
    """Print milliseconds by class and phase, beside `MEASURED_MS`, and the `top` most expensive operations."""
    phases = ("forward", "backward", "update")
    print(f"\n{'predicted ms':<22}" + "".join(f"{name:>10}" for name in (*phases, "all", "kernels", "26 Nov.")))
    totals: dict[str, float] = {}
    for kernel in card.kernels:
        totals[kernel.kind] = totals.get(kernel.kind, 0.0) + kernel.ms
    for kind in (*sorted(totals, key=lambda kind: -totals[kind]), "all"):
        of = [kernel for kernel in card.kernels if kind in (kernel.kind, "all")]
        cells = [sum(kernel.ms for kernel in of if kernel.phase == phase) for phase in phases]
        row = "".join(f"{ms:>10.1f}" for ms in (*cells, sum(cells)))
        print(f"{kind:<22}{row}{len(of):>10}{MEASURED_MS.get(kind, ''):>10}")
    print(f"\npeak of memory in tensors, without parameters: {(card.peak_bytes - card.parameter_bytes) / 1e9:.1f} GB")
    same: dict[tuple[str, str, str], list[float]] = {}
    for kernel in card.kernels:
        same.setdefault((kernel.phase, kernel.name, kernel.shape), []).append(kernel.ms)
    print(f"\n{'ms':>8}{'kernels':>9}   operation")
    for key, times in sorted(same.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"{sum(times):>8.1f}{len(times):>9}   " + "  ".join(key))


def main() -> None:
    """Predict a step and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument(
        "--work", type=Path, default=REPO / "benchmarks" / "scratch" / "roofline", help="scratch folder"
    )
    parser.add_argument("--pairs-at-once", type=int, default=16)
    parser.add_argument("--top", type=int, default=20, help="operations to list")
    parser.add_argument("--changes", action="store_true", help="predict what each of several changes would do instead")
    options = parser.parse_args()
    pairs = read_pairs(options.work, options.shared, 32)
    print(json.dumps({"num_pairs": len(pairs), "num_tokens": sum(PairCollator().num_tokens(pair) for pair in pairs)}))
    if options.changes:
        print_changes(pairs, options.pairs_at_once)
    else:
        print_table(predict(pairs, options.pairs_at_once), options.top)


if __name__ == "__main__":
    main()
