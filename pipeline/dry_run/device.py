"""The GPUs of this machine, and its memory: of its smallest GPU, or its RAM. Nothing heavy is imported: a plan stays quick."""

import os
import shutil
import subprocess
from dataclasses import dataclass

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
    try:
        found = [
            Device(f"{name} (memory of the machine: it reports none of its own)", ram_bytes, is_gpu=True)
            if mebibytes == _NO_MEMORY
            else Device(name, int(mebibytes) << 20, is_gpu=True)
            for mebibytes, name in _ask("memory.total,name")
        ]
    except ValueError:
        found = []
    if found:
        return min(found, key=lambda device: device.num_bytes)
    return Device("this machine, without a GPU", ram_bytes, is_gpu=False)


def visible_gpus() -> list[str]:
    """Return the numbers of the GPUs that CUDA shows to a process, in its order, as the driver counts them.

    `CUDA_VISIBLE_DEVICES` names them by number or by the beginning of their UUID; from the first unknown one on it shows none.
    """
    numbers = {index: uuid for index, uuid in _ask("index,uuid")}  # noqa: C416  (dict() would not know that there are two)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(numbers)
    found = []
    for name in map(str.strip, wanted.split(",")):
        same = [index for index, uuid in numbers.items() if name and (name == index or uuid.startswith(name))]
        if len(same) != 1:
            break
        found += same
    return found


def _ask(fields: str) -> list[list[str]]:
    """Return what the driver says about each GPU; nothing if there is none, it does not answer, or CUDA shows none."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    # A driver without a GPU says so in a sentence, and may call that a success.
    return [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
