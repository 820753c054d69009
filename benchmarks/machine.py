"""What a result file says of the machine it was measured on."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe(*packages: str) -> dict[str, Any]:
    """Return processor, cores, memory, graphics card, Python and the versions of `packages` (null if one is not there)."""
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kb / (1 << 20), 1),
        **_card(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _card() -> dict[str, Any]:
    """Return name and memory of the graphics card; nothing where there is none, or where torch was not loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    memory_gib = torch.cuda.get_device_properties(0).total_memory / (1 << 30)
    return {"gpu": torch.cuda.get_device_name(), "gpu_memory_gib": round(memory_gib, 1)}
