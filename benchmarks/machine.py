"""What a result file says of the machine it was measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe(*packages: str) -> dict[str, Any]:
    """Return processor, cores, memory, Python and the versions of `packages`."""
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kb / (1 << 20), 1),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
