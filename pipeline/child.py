"""Start a stage's own process and watch it. The one place that starts processes."""

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from weights_store.errors import KilledError, MissingExtraError, StageError

_IS_CHILD = "TOKENWEIGHTS_CHILD"
_running: set["subprocess.Popen[str]"] = set()


def check_extra(package: str, remedy: str, python: str | None) -> None:
    """Check that this interpreter has what a child needs; another interpreter says it itself.

    Raises:
        MissingExtraError: It has not.
    """
    if python is None and find_spec(package) is None:
        raise MissingExtraError(f"this build needs the package {package!r}, which is not installed; {remedy}")


def run_child(
    command: Sequence[str],
    what: str,
    report: Callable[[str], None],
    prefix: str = "",
    failures: Mapping[int, type[StageError]] = {},
) -> None:
    """Run a child process to its end, pass its progress lines on, and stop it when we are stopped.

    Lines that start with `prefix` are progress and go to `report` without it. The child's standard input closes when we die.

    Args:
        command: The child's command line.
        what: What it does, for error messages.
        report: Gets its progress lines.
        prefix: How a progress line begins.
        failures: The error that an exit code stands for.

    Raises:
        KilledError: It died by a signal.
        StageError: It ended with a code other than 0; carries its last line or its own error message.
    """
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    tail: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path, _IS_CHILD: "1"},
    ) as child:
        assert child.stdout is not None
        _running.add(child)
        try:
            for line in child.stdout:
                if not line.strip():
                    continue
                tail = [*tail[-39:], line.rstrip()]
                if line.startswith(prefix):
                    report(line.removeprefix(prefix).rstrip())
        except BaseException:
            _stop(child)
            raise
        finally:
            _running.discard(child)
    if child.returncode < 0:
        raise KilledError(f"{what} was killed by signal {-child.returncode} (out of memory?); what it had done stays")
    if child.returncode:
        failure = failures.get(child.returncode, StageError)
        raise failure(f"{what} failed with exit code {child.returncode}: {_cause(tail)}")


def _cause(tail: list[str]) -> str:
    errors = [line for line in tail if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else "\n".join(tail[-15:]) or "it printed nothing"


def end_with_parent() -> None:
    """End this process, one that `run_child` has started, when its parent is gone without a word.

    The parent's end of our standard input closes then. A process started by hand or by a container is left alone.
    """
    if _IS_CHILD not in os.environ:
        return

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: its lock would be held while the interpreter shuts down
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def stop_children() -> None:
    """Stop every child that runs; for who must leave without unwinding the stack."""
    for child in list(_running):
        _stop(child)


def _stop(child: "subprocess.Popen[str]") -> None:
    """Let a child that the terminal has interrupted with us finish its step; end one that does not know of it or hangs."""
    asks: tuple[tuple[Callable[[], None] | None, float], ...] = ((None, 10), (child.terminate, 20), (child.kill, 20))
    for ask, patience_s in asks:
        if ask is not None:
            ask()
        try:
            child.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
