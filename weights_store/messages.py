"""What a run tells people: log records and progress, on a terminal, from a child process to its parent, and in Prefect.

Every module logs through `logger(__name__)`, below the one logger `tokenweights`. Progress is a log record too: it carries a
`Progress`, and each handler decides what to make of it. So no function takes a callback for lines, and none for progress.

* `show_on_terminal` prints records; progress becomes a bar on a terminal and a line every ten seconds elsewhere.
* `send_to_parent` writes records to standard output as JSON lines; the parent's `receive` logs them again.
* `flows/run_logs.py` shows them in Prefect's runs.
"""

import errno
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

ROOT = "tokenweights"
PREFIX = "TOKENWEIGHTS "
"""Begins every line that a child sends to its parent; one JSON object follows."""
LINE_EVERY_S = 10.0
"""Seconds between two lines of the same progress."""
_SEND_EVERY_S = 0.5
_TERMINAL = "tokenweights terminal"
_MIN_SHARE, _MIN_WALL_S = 0.02, 5.0
"""No time left is shown earlier than this: the first batch is the slowest, so an estimate from it would mislead."""


@dataclass(frozen=True)
class Progress:
    """How far some work has come."""

    name: str
    """The work, for example `score ref`."""
    done: int
    total: int
    wall_s: float
    """Seconds since the work began."""
    unit: str = "tokens"

    @property
    def percent(self) -> float:
        """Share done, 0 to 100."""
        return 100 * self.done / self.total if self.total else 100.0

    def __str__(self) -> str:
        if not self.done:
            return f"{self.name}: {self.total:,} {self.unit} to do"
        rate = self.done / max(self.wall_s, 1e-9)
        text = f"{self.name}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f} {self.unit}/s"
        is_early = self.wall_s < _MIN_WALL_S or self.done < _MIN_SHARE * self.total
        if is_early or self.done >= self.total:
            return text
        return f"{text}, {duration((self.total - self.done) / rate)} left"


def logger(module: str) -> logging.Logger:
    """Return the logger of a module, called with its `__name__`."""
    return logging.getLogger(f"{ROOT}.{module}")


def show(progress: Progress) -> None:
    """Log how far some work has come."""
    logging.getLogger(f"{ROOT}.progress").info("%s", progress, extra={"progress": progress})


def progress_of(record: logging.LogRecord) -> Progress | None:
    """Return the progress that a record carries, or None if it is a line of text."""
    progress = getattr(record, "progress", None)
    return progress if isinstance(progress, Progress) else None


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_CREDENTIALS = re.compile(r"[^\s/'\"@:]+:(?!/)[^\s'\"@]+@")


def hide_credentials(text: str) -> str:
    """Return a text in which nothing reads `user:secret@`: errors quote what a user has typed, also as a name or a path."""
    return _CREDENTIALS.sub("***@", text)


_MAKE_ROOM = "make room and run again"
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
}


def remedy_of(error: BaseException) -> str:
    """Return what to do about an error of the operating system, with `; ` before it; empty if nothing is known.

    Libraries that are not written in Python keep only its text.
    """
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if "No space left on device" in str(error):
        remedy = _MAKE_ROOM
    return f"; {remedy}" if remedy else ""


def describe_os_error(error: OSError) -> str:
    """Return one line for an error of the operating system: what is wrong, with which files, and what to do."""
    files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    text = " ".join((error.strerror or str(error)).split()) or type(error).__name__
    return f"{files}: {text}{remedy_of(error)}" if files else f"{text}{remedy_of(error)}"


def duration(seconds: float) -> str:
    """Return seconds as people read them: `<1 s`, `12 s`, `3 min 05 s`, `1,204 h 07 min`."""
    if seconds < 1:
        return "<1 s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {rest_min:02d} min"
    return f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"


class ProgressEvery(logging.Filter):
    """Passes every line of text. Of the same progress it passes the first record, the last, and one every few seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._passed: dict[str, tuple[float, int]] = {}
        """When the last record of each progress passed, and what it had done."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may be shown."""
        progress = progress_of(record)
        if progress is None:
            return True
        passed_at, done = self._passed.get(progress.name, (float("-inf"), -1))
        is_due = time.monotonic() - passed_at >= self._seconds or progress.done in (0, progress.total)
        if not is_due or progress.done == done:
            return False
        self._passed[progress.name] = time.monotonic(), progress.done
        return True


@contextmanager
def handled_by(handler: logging.Handler) -> Iterator[None]:
    """Give a handler everything that is logged while inside; close it at the end."""
    root = logging.getLogger(ROOT)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


# --- on a terminal -----------------------------------------------------------------------------------------------------


@contextmanager
def show_on_terminal(stream: TextIO | None = None) -> Iterator[None]:
    """Print what is logged while inside, to standard error by default. Inside another `show_on_terminal` it does nothing."""
    root = logging.getLogger(ROOT)
    if any(handler.name == _TERMINAL for handler in root.handlers):
        yield
        return
    propagate = root.propagate
    root.propagate = False  # Prefect's handler on Python's root logger would print every line a second time
    try:
        with handled_by(_terminal_handler(stream or sys.stderr)):
            yield
    finally:
        root.propagate = propagate


def _terminal_handler(stream: TextIO) -> logging.Handler:
    handler: logging.Handler
    if stream.isatty() and find_spec("tqdm") is not None:
        handler = _BarHandler(stream)
    else:
        handler = logging.StreamHandler(stream)
        handler.addFilter(ProgressEvery(LINE_EVERY_S))
    handler.name = _TERMINAL
    return handler


class _BarHandler(logging.Handler):
    """Shows progress as bars, and prints lines of text above them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._bars: dict[str, tqdm] = {}

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        progress = progress_of(record)
        if progress is None:
            tqdm.write(record.getMessage(), file=self._stream)
        elif progress.done:  # before that, the engine starts and may print lines
            self._move_bar(progress)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
        super().close()

    def _move_bar(self, progress: Progress) -> None:
        from tqdm import tqdm

        if progress.name not in self._bars:
            settings = {"unit": f" {progress.unit}", "unit_scale": True, "dynamic_ncols": True, "file": self._stream}
            self._bars[progress.name] = tqdm(total=progress.total, desc=progress.name, **settings)
        bar = self._bars[progress.name]
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            self._bars.pop(progress.name).close()


# --- from a child to its parent ----------------------------------------------------------------------------------------


@contextmanager
def send_to_parent() -> Iterator[None]:
    """Send what is logged while inside to the process that started this one."""
    handler = _ParentHandler()
    handler.addFilter(ProgressEvery(_SEND_EVERY_S))
    with handled_by(handler):
        yield


class _ParentHandler(logging.Handler):
    """Writes each record to standard output as one JSON line."""

    def emit(self, record: logging.LogRecord) -> None:
        progress = progress_of(record)
        what = {"progress": asdict(progress)} if progress else {"text": record.getMessage()}
        line = json.dumps({"name": record.name, "level": record.levelno, **what})
        # One write, and a line break before it: Ray and vLLM write to the same stream from other threads and processes.
        sys.stdout.write(f"\n{PREFIX}{line}\n")
        sys.stdout.flush()


def receive(line: str, heard: Callable[[Progress], None] = lambda progress: None) -> None:
    """Log what a child has logged.

    Args:
        line: What the child has written, without `PREFIX`.
        heard: Called with each progress before it is logged.
    """
    message = json.loads(line)
    if "progress" in message:
        progress = Progress(**message["progress"])
        heard(progress)
        show(progress)
    else:
        logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])


def collect_lines(lines: list[str]) -> None:
    """Append every line of text that is logged from now on. An actor on Ray hands these lines to its driver."""
    root = logging.getLogger(ROOT)
    root.addHandler(_ListHandler(lines))
    root.setLevel(logging.INFO)


class _ListHandler(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if progress_of(record) is None:
            self._lines.append(record.getMessage())
