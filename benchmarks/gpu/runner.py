"""Run the parts one after the other, each in a process of its own with a limit, and keep whatever they have measured."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import REPO

PARTS = {"checks": 40, "train": 110, "score": 75, "attribute": 20, "profile": 15, "generate": 20, "ways": 20}
"""In this order, with their share of the time: what a part leaves goes to those after it."""
LEAST_S = 5.0
"""With less left, a part is not begun."""
GRACE_S = 3.0
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "0", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is run, and where its results go."""

    device: str
    quick: bool
    shared: Path
    work: Path
    out: Path
    minutes: float
    parts: Sequence[str]


def run_all(run: Run) -> dict[str, Any]:
    """Run the parts and return the results, which are in the file after each part; Ctrl-C ends the run and keeps them."""
    run.work.mkdir(parents=True, exist_ok=True)
    run.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.time() + 60 * run.minutes
    results: dict[str, Any] = {
        "device": run.device,
        "quick": run.quick,
        "minutes": run.minutes,
        "machine": None,
        "parts": {},
    }
    _write(run.out, results)
    for index, name in enumerate(run.parts):
        shares = [PARTS[part] for part in run.parts[index:]]
        limit_s = (end - time.time()) * shares[0] / sum(shares)
        try:
            results["parts"][name] = run_part(run, name, limit_s)
        except KeyboardInterrupt:
            results["parts"][name] = {"status": "interrupted", **_found(run, name)}
            break
        finally:
            machine = results["parts"].get(name, {}).get("results", {}).pop("machine", None)
            results["machine"] = results["machine"] or machine
            _write(run.out, results)
        _say(name, results["parts"][name])
    return results


def run_part(run: Run, name: str, limit_s: float) -> dict[str, Any]:
    """Run one part; return its status, its reason if it is not `done`, and what it has recorded."""
    if limit_s < LEAST_S:
        return {"status": "left out", "reason": f"{limit_s:.0f} s were left for it"}
    started = time.time()
    _result_file(run, name).unlink(missing_ok=True)
    log = run.work / f"{name}.log"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if run.device == "cpu" else {}
    with log.open("w") as lines:
        process = subprocess.Popen(
            child_command(run, name, started + limit_s - GRACE_S),
            cwd=REPO,
            env={**os.environ, **QUIET, **hidden, "TORCHINDUCTOR_CACHE_DIR": str(run.work / "compiled")},
            stdout=lines,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    took = {"took_s": round(time.time() - started, 1), "limit_s": round(limit_s, 1)}
    if code == 0:
        return {"status": "done", **took, **_found(run, name)}
    status = "killed" if code is None else "failed"
    reason = f"it took longer than its {limit_s:.0f} s" if code is None else f"exit code {code}"
    return {"status": status, **took, "reason": f"{reason}: {_tail(log)}", **_found(run, name)}


def child_command(run: Run, name: str, deadline: float) -> list[str]:
    """Return the command of a part, which knows by when it should have ended."""
    command = [sys.executable, "-m", "benchmarks.gpu.child", name, "--device", run.device, "--deadline", str(deadline)]
    command += ["--shared", str(run.shared), "--work", str(run.work), "--out", str(_result_file(run, name))]
    return [*command, *(["--quick"] if run.quick else [])]


def _end(process: subprocess.Popen) -> None:
    """Kill the part with all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _result_file(run: Run, name: str) -> Path:
    return run.work / f"{name}.json"


def _found(run: Run, name: str) -> dict[str, Any]:
    path = _result_file(run, name)
    return {"results": json.loads(path.read_text()) if path.exists() else {}}


def _tail(log: Path, num_chars: int = 1500) -> str:
    return log.read_text(errors="replace")[-num_chars:].strip()


def _write(path: Path, results: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)


def _say(name: str, part: dict[str, Any]) -> None:
    print(f"{name:<12}{part['status']:<10}{part.get('took_s', 0):>6.0f} s  {part.get('reason', '')[:200]}", flush=True)
