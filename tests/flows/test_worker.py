"""What is different in a process that Prefect has started for one run."""

import os
import subprocess
import sys
from pathlib import Path

from weights_store.processes.guard import RUN

REPO = Path(__file__).resolve().parents[2]
_PROCESS = f"""
import os, sys, time
from pathlib import Path
from flows.worker import prepare_process
prepare_process()
print(os.environ.get("{RUN}", ""), flush=True)
sys.stdin.readline()
while Path("/proc/self/fd/1").resolve() != Path(os.devnull):
    time.sleep(0.01)
print("nobody reads this", flush=True)
print("nor this", file=sys.stderr, flush=True)
"""


def _start(tmp_path, **variables):
    environment = {name: value for name, value in os.environ.items() if name != RUN}
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS],
        cwd=REPO,
        env={**environment, "TMPDIR": str(tmp_path), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_is_guarded_and_outlives_the_reader_of_its_output(tmp_path):
    """A worker that is killed stops reading what its runs print."""
    with _start(tmp_path, PREFECT__FLOW_RUN_ID="one") as process:
        (folder,) = (Path(line) for line in process.stdout.readline().split())
        assert folder.parent == tmp_path
        process.stdout.close()
        process.stderr.close()
        process.stdin.write("the reader is gone\n")
        process.stdin.close()
        assert process.wait(60) == 0


def test_other_processes_are_left_alone(tmp_path):
    with _start(tmp_path) as process:
        assert process.stdout.readline() == "\n"
        process.kill()
