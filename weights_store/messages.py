"""What a run tells people: log records and progress, on a terminal, from a child process to its parent, and in Prefect.

Every module logs through `logger(__name__)`, below the one logger `tokenweights`. Progress is a log record too: it carries a
`Progress`, and each handler decides what to make of it. So no function takes a callback for lines, and none for progress.

* `show_on_terminal` prints records; progress becomes a bar on a terminal and a line every ten seconds elsewhere.
* `send_to_parent` writes records to standard output as JSON lines; the parent's `receive` logs them again.
* `flows/progress.py` shows them in Prefect's runs.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol, TextIO

ROOT = "tokenweights"
PREFIX = "TOKENWEIGHTS "
"""Begins every line that a child says to its parent: one JSON object."""
_LINE_EVERY_S = 10.0
_SEND_EVERY_S = 0.5
_MIN_SHARE, _MIN_WALL_S = 0.02, 5.0
"""An estimate of the time left before that would mislead: the first batch is the slowest."""


@dataclass(frozen=True)
class Progress:
    """How far some work is."""

    name: str
    """What is done, for example `score ref`."""
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
    """Log how far some work is."""
    logging.getLogger(f"{ROOT}.progress").info("%s", progress, extra={"progress": progress})


def progress_of(record: logging.LogRecord) -> Progress | None:
    """Return the progress that a record carries; None where it is a line for people."""
    progress = getattr(record, "progress", None)
    return progress if isinstance(progress, Progress) else None


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def duration(seconds: float) -> str:
    """Return seconds as people read them: `<1 s`, `12 s`, `3 min 05 s`, `1,204 h 07 min`."""
    if seconds < 1:
        return "<1 s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {rest_min:02d} min"
    return f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"


# --- on a terminal -----------------------------------------------------------------------------------------------------


@contextmanager
def show_on_terminal(stream: TextIO | None = None) -> Iterator[None]:
    """Print what is logged while inside, to standard error by default."""
    with _handling(_TerminalHandler(stream or sys.stderr)):
        yield


class _TerminalHandler(logging.Handler):
    """Prints lines; of progress one line every ten seconds, or a bar where the stream is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._said_at: dict[str, float] = {}
        self._bars: dict[str, _Bar] = {}

    def emit(self, record: logging.LogRecord) -> None:
        progress = progress_of(record)
        if progress is None:
            self._print(record.getMessage())
        elif self._stream.isatty():
            self._move_bar(progress)
        elif self._is_due(progress):
            self._print(str(progress))

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
        super().close()

    def _print(self, line: str) -> None:
        if self._bars:
            from tqdm import tqdm

            tqdm.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def _is_due(self, progress: Progress) -> bool:
        is_due = time.monotonic() - self._said_at.get(progress.name, -_LINE_EVERY_S) >= _LINE_EVERY_S
        if is_due or progress.done == progress.total:
            self._said_at[progress.name] = time.monotonic()
            return True
        return False

    def _move_bar(self, progress: Progress) -> None:
        if not progress.done:  # lines of the engine's start still come
            return
        if progress.name not in self._bars:
            from tqdm import tqdm

            settings = {"unit": f" {progress.unit}", "unit_scale": True, "dynamic_ncols": True, "file": self._stream}
            self._bars[progress.name] = tqdm(total=progress.total, desc=progress.name, **settings)
        bar = self._bars[progress.name]
        bar.update(progress.done - bar.n)
        if progress.done == progress.total:
            self._bars.pop(progress.name).close()


class _Bar(Protocol):
    """What is used of a tqdm bar."""

    n: int

    def update(self, amount: int) -> object: ...

    def close(self) -> None: ...


# --- from a child to its parent ----------------------------------------------------------------------------------------


@contextmanager
def send_to_parent() -> Iterator[None]:
    """Send what is logged while inside to the process that started this one."""
    with _handling(_ParentHandler()):
        yield


class _ParentHandler(logging.Handler):
    """Writes records to standard output, each as one JSON line; of progress at most two a second."""

    def __init__(self) -> None:
        super().__init__()
        self._sent_at: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        progress = progress_of(record)
        if progress is not None and not self._is_due(progress):
            return
        what = {"progress": asdict(progress)} if progress else {"text": record.getMessage()}
        line = json.dumps({"name": record.name, "level": record.levelno, **what})
        # One write, on a line of its own: logs of Ray and vLLM go the same way, from other threads and processes.
        sys.stdout.write(f"\n{PREFIX}{line}\n")
        sys.stdout.flush()

    def _is_due(self, progress: Progress) -> bool:
        is_due = time.monotonic() - self._sent_at.get(progress.name, -_SEND_EVERY_S) >= _SEND_EVERY_S
        if is_due or progress.done in (0, progress.total):
            self._sent_at[progress.name] = time.monotonic()
            return True
        return False


def receive(line: str, heard: Callable[[Progress], None] = lambda progress: None) -> None:
    """Log again what a child has sent, without `PREFIX`; `heard` sees its progress first."""
    message = json.loads(line)
    if "progress" in message:
        progress = Progress(**message["progress"])
        heard(progress)
        show(progress)
    else:
        logging.getLogger(message["name"]).log(message["level"], "%s", message["text"])


def collect_lines(lines: list[str]) -> None:
    """Append every line for people that is logged from now on; for an actor on Ray, which hands them to its driver."""
    handler = _ListHandler()
    handler.lines = lines
    logging.getLogger(ROOT).addHandler(handler)
    logging.getLogger(ROOT).setLevel(logging.INFO)


class _ListHandler(logging.Handler):
    lines: list[str]

    def emit(self, record: logging.LogRecord) -> None:
        if progress_of(record) is None:
            self.lines.append(record.getMessage())


@contextmanager
def _handling(handler: logging.Handler) -> Iterator[None]:
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
