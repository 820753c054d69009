"""The memory of this machine: of its smallest GPU, or its RAM. Nothing heavy is imported, so a plan stays quick."""

import os
import shutil
import subprocess
from dataclasses import dataclass

_QUERY = ("--query-gpu=memory.total,name", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30
_NO_MEMORY = "[N/A]"


@dataclass(frozen=True)
class Device:
    """Where a model would run."""

    name: str
    num_bytes: int
    is_gpu: bool


def find_device() -> Device:
    """Return the NVIDIA GPU with the least memory, or the RAM of a machine that has none, or hides it from CUDA.

    A GPU that shares the machine's memory (GB10) reports none of its own, and counts with that of the machine.
    """
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    program = shutil.which("nvidia-smi")
    if program is not None and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        try:
            done = subprocess.run(
                [program, *_QUERY],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=True,
            )
            gpus = [line.split(", ", 1) for line in done.stdout.splitlines()]
            found = [
                Device(f"{name} (memory of the machine: it reports none of its own)", ram_bytes, is_gpu=True)
                if mebibytes == _NO_MEMORY
                else Device(name, int(mebibytes) << 20, is_gpu=True)
                for mebibytes, name in gpus
            ]
            if found:
                return min(found, key=lambda device: device.num_bytes)
        except (OSError, subprocess.SubprocessError, ValueError):
            pass  # a driver that does not answer: no GPU that could be used
    return Device("this machine, without a GPU", ram_bytes, is_gpu=False)
