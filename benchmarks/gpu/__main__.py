"""`make gpu`, or `python -m benchmarks.gpu`: measure everything on one card in at most four minutes.

Checks first, then training, scoring, attribution and sampling beside their rivals, a profile, and the other way into vLLM. Each
part is a process with a limit; what it has measured is in the result file as soon as it ends, also when it fails or is killed.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import REPO
from benchmarks.gpu.figures import compute_figures, print_table
from benchmarks.gpu.runner import PARTS, Run, run_all


def main() -> int:
    """Run the parts, print the table, and return the exit code: 1 if a part did not end well."""
    options = _parsed()
    if options.show:
        print_table(json.loads(options.show.read_text()))
        return 0
    if not (options.shared / "data" / "alpaca_judged.parquet").is_file():
        raise SystemExit(f"{options.shared} has no data/alpaca_judged.parquet: give the folder with --shared")
    signal.signal(signal.SIGTERM, _interrupt)
    parts = [name for name in PARTS if name in options.only]
    run = Run(options.device, options.quick, options.shared, options.work, options.out, options.minutes, parts)
    results = run_all(run)
    print_table(results)
    print(f"\nwrote {options.out}")
    figures = compute_figures(results)
    is_well = all(part["status"] == "done" for part in results["parts"].values())
    return int(not is_well or figures.get("checks that failed", 0) > 0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--shared", type=Path, default=REPO.parent / "shared", help="folder with data/ and models/")
    parser.add_argument("--work", type=Path, default=REPO / "benchmarks" / "scratch" / "gpu", help="scratch folder")
    parser.add_argument(
        "--out", type=Path, help="result file (default: benchmarks/results/gpu.json; with --quick, in --work)"
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that every line runs")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print the table of a result file and measure nothing"
    )
    options = parser.parse_args()
    if options.out is None:
        options.out = options.work / "quick.json" if options.quick else REPO / "benchmarks" / "results" / "gpu.json"
    for name in ("shared", "work", "out"):
        setattr(options, name, getattr(options, name).absolute())
    return options


if __name__ == "__main__":
    sys.exit(main())
