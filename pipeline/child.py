"""Start a child process of ours and watch it to its end. The one place that starts them.

No stranger's code runs: `python -P` and PYTHONSAFEPATH keep the current directory off `sys.path`, so that a user's own
`train.py` or `datasets/` in the folder where a build was started is never imported in place of ours, not even by processes
that a child starts. A child finds our packages as links in a folder of their own, so another interpreter (`score.python`)
gets them, but not the other packages of this one.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from weights_store.errors import EXIT_CODES, KilledError, MissingExtraError, StageError
from weights_store.messages import PREFIX, Progress, receive
from weights_store.packages import how_to_install
from weights_store.processes.guard import end_marked, guard, marked_environment
from weights_store.processes.process import CHILD

_ROOT = Path(__file__).resolve().parent.parent
_OURS = ("tokenweights.py", "pipeline", "train", "weights_store")
"""What a child may need of this distribution; `flows` never runs in one."""
_MISSING = re.compile(r"ModuleNotFoundError: (?:No module named '|import of )([\w.]+)")
_OF_RANK = re.compile(r"^\[rank\d+\]: ")
_RANK_ENDED = re.compile(r"^\s*exitcode\s*: (-?\d+) \(pid")
"""In what torchrun prints at its end about each process that failed, the first cause last."""
_KEPT_LINES = 99
"""Last lines that are kept of a child. When a process fails, torchrun prints about 50 after its error message."""
_running: set["subprocess.Popen[str]"] = set()
_leaving = threading.RLock()
"""Held by the thread that ends this process, for ever: other threads see our children die, and must not start them again."""


def check_extra(package: str, python: str | None) -> None:
    """Check that this interpreter has what a child needs; another interpreter is checked by running it.

    Raises:
        MissingExtraError: It has not.
    """
    if python is None and find_spec(package) is None:
        raise MissingExtraError(
            f"this build needs the package {package!r}, which is not installed; {how_to_install(package, 'train')}"
        )


_around_models: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar("around", default=nullcontext)


@contextmanager
def models_run_inside(around: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside, a stage enters `around()` before it starts a process that runs a model, and leaves it when that has ended.

    It holds a GPU, for example. A stage with nothing to compute never enters it.
    """
    token = _around_models.set(around)
    try:
        yield
    finally:
        _around_models.reset(token)


def running_model() -> AbstractContextManager[object]:
    """Return what is to be entered while a model runs, see `models_run_inside`."""
    return _around_models.get()()


def run_child(
    module: str,
    arguments: Sequence[str],
    what: str,
    python: str | None = None,
    heard: Callable[[Progress], None] = lambda progress: None,
    package: str = "torch",
    launcher: Sequence[str] = (),
) -> None:
    """Run `python -P -m MODULE ARGUMENTS` to its end, log what it logs, and stop it when we are stopped.

    The module is one of ours that runs in `run_main` (`weights_store/processes/process.py`); errors name `what` it does.
    `heard` gets its progress before that is logged. If its interpreter `python` (None: this one) lacks any package, the error
    says how to install `package`, the one that it needs most. `launcher` goes in front of `-m MODULE`: torchrun, which starts
    several processes. They write to the same pipe, and the error and exit code of the one that failed first count.

    Raises:
        KilledError: It died by a signal.
        StageError: It could not be started, or ended with a code other than 0; carries its error message or last lines. The
            exit code says which subclass (`weights_store.errors.EXIT_CODES`).
    """
    tail: list[str] = []
    with _started([python or sys.executable, "-P", *launcher, "-m", module, *arguments], what) as child:
        assert child.stdout is not None
        _running.add(child)
        try:
            for line in child.stdout:
                if line.startswith(PREFIX):
                    receive(line.removeprefix(PREFIX), heard)
                elif line.strip():
                    tail = [*tail[-_KEPT_LINES:], line.rstrip()]
        except BaseException as error:
            _stop(child, was_told=isinstance(error, KeyboardInterrupt))
            raise
        finally:
            _running.discard(child)
        with _leaving:
            pass
    code = (_code_of_rank(tail) if launcher else None) or child.returncode
    if code < 0:
        raise KilledError(f"{what} was killed by signal {-code} (out of memory?); what it had done stays")
    if code:
        where = f" in the interpreter {python}" if python else ""
        kind = next((kind for kind, known in EXIT_CODES.items() if known == code), StageError)
        failure = kind(f"{what}{where} failed with exit code {code}: {_cause(tail, package)}")
        failure.add_note("\n".join(["Its last lines:", *tail]))  # part of a traceback, which --debug shows
        raise failure


@contextmanager
def _started(command: Sequence[str], what: str) -> "Iterator[subprocess.Popen[str]]":
    """Yield a running child. It finds our packages first, as links in a folder of their own: the very code of its parent."""
    # A relative entry starts in the current directory; an empty one is the current directory.
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(entry).is_absolute()]
    with temporary_folder("child-") as folder:
        for name in _OURS:
            (folder / name).symlink_to(_ROOT / name)
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closes when we die, which the child sees
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={
                    **os.environ,
                    **marked_environment(folder),
                    CHILD: "1",
                    "PYTHONSAFEPATH": "1",
                    "PYTHONPATH": os.pathsep.join([str(folder), *path]),
                },
            )
        except OSError as error:
            raise StageError(f"{what}: cannot start the interpreter {command[0]}: {error}") from error
        with child, _ended_whole(child, folder):
            yield child


@contextmanager
def _ended_whole(child: "subprocess.Popen[str]", folder: Path) -> Iterator[None]:
    """End what a child has started as soon as it has ended itself: that may hold its pipe to us, and memory that we need."""

    def wait() -> None:
        child.wait()
        end_marked(folder)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        waiting.join()


def _code_of_rank(tail: list[str]) -> int | None:
    """Return the exit code of the process that failed first, as torchrun reports it; None if it reports none."""
    found = [match[1] for line in tail if (match := _RANK_ENDED.match(line))]
    return int(found[-1]) if found else None


def _cause(tail: list[str], package: str) -> str:
    """Return what went wrong according to the last lines of a child."""
    for line in reversed(tail):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        if missing := _MISSING.search(line):
            return f"it has no package {missing[1]!r}; in its environment, {how_to_install(package, 'train')}"
        if line.startswith("ImportError: "):
            return line
    # torchrun shows a rank's lines behind "[rank1]: ", and its own traceback, which says nothing, after them.
    plain = [_OF_RANK.sub("", line) for line in tail]
    starts = [index for index, line in enumerate(plain) if line.startswith("Traceback (most recent call last)")]
    ends = [
        next((line for line in plain[start + 1 :] if not line.startswith(" ")), plain[-1].strip()) for start in starts
    ]
    if own := [end for end in ends if not end.startswith("torch.distributed.elastic.")] or ends:
        return f"{own[-1]} (unexpected; --debug shows more)"
    return "\n".join(tail[-15:]) or "it printed nothing"


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a new folder that is gone afterwards, also if this process is killed meanwhile."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=guard().folder, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def leave(code: int, line: str, *, was_told: bool) -> NoReturn:
    """Print a line, stop every child and end this process, without unwinding the stack.

    Args:
        code: The exit code.
        line: For standard error.
        was_told: The children have got the same signal, and may finish what they do.
    """
    with _leaving:
        print(line, file=sys.stderr, flush=True)
        for child in list(_running):
            _stop(child, was_told)
        guard().close()
        os._exit(code)


def _stop(child: "subprocess.Popen[str]", was_told: bool) -> None:
    """Wait for a child that Ctrl-C reached too (`was_told`) to finish its step; then terminate it, then kill it.

    Whoever cancels a run wants the machine back within ten seconds. A training in a longer step has its last checkpoint.
    """
    for ask, patience_s in ((child.poll, 10 if was_told else 0), (child.terminate, 5), (child.kill, 20)):
        ask()
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
            return
