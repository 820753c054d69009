"""What an interpreter has, seen from inside: the process that `interpreters.py` starts, as a stage would be started there."""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TypedDict

from weights_store.messages import first_line
from weights_store.packages import package_versions
from weights_store.processes.process import run_main


class Report(TypedDict):
    """What was found."""

    packages: dict[str, str]
    """Versions of the packages that are installed."""
    broken: dict[str, str]
    """Why modules cannot be imported."""
    gpus: str
    """Names of the GPUs that torch sees; empty if it sees none, or was not imported."""


def probe(packages: Sequence[str], modules: Sequence[str]) -> Report:
    """Look for packages, and import modules."""
    broken = {}
    for module in modules:
        try:
            import_module(module)
        except Exception as error:  # noqa: BLE001 - whatever a broken install raises is the answer
            broken[module] = f"{type(error).__name__}: {first_line(error)}"
    return {"packages": package_versions(packages), "broken": broken, "gpus": _gpus()}


def _gpus() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def main() -> None:
    """Write what was found to the file that is the first argument; the second is JSON: packages and modules."""
    packages, modules = json.loads(sys.argv[2])
    Path(sys.argv[1]).write_text(json.dumps(probe(packages, modules)), encoding="utf-8")


if __name__ == "__main__":  # REPORT '[[PACKAGE, …], [MODULE, …]]'
    sys.exit(run_main(main))
