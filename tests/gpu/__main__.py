"""`python -m tests.gpu`: run the checks without pytest and print a line of JSON for each; exit code 1 if one failed."""

import argparse
import json
import sys
import time

import torch

from tests.gpu.checks import CHECKS, full_float32


def main() -> int:
    """Run them all, whatever fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), help="names of checks")
    options = parser.parse_args()
    num_failed = 0
    for name in options.only:
        started, error = time.perf_counter(), None
        try:
            with full_float32():
                CHECKS[name](options.device)
        except Exception as caught:  # noqa: BLE001 - the next check says something of its own
            error = f"{type(caught).__name__}: {str(caught)[:500]}"
            num_failed += 1
        found = {"check": name, "passed": error is None, "s": round(time.perf_counter() - started, 1)}
        print(json.dumps(found if error is None else found | {"error": error}), flush=True)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
