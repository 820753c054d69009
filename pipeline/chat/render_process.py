"""The process that renders chats: started once, asked for every row, replaced after a template that broke its limits.

Called by `template.py`. The other end, and why there is one, is in `render_child.py`.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

from pipeline.chat.render_child import CPU_S, MEMORY_BYTES, READY
from pipeline.source.messages import Message
from weights_store.errors import StageError

ErrorKind = Literal["syntax", "type", "limit", "overflow", "other"]


class RenderError(Exception):
    """A template did not render a chat.

    `kind` is `syntax` if it is no Jinja, `type` if it was given another type than it expects, `limit` if it took too much time
    or memory, `overflow` if Python or Jinja stopped it before that, and `other` for what it raises itself.
    """

    def __init__(self, kind: ErrorKind, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text


@dataclass(frozen=True, slots=True)
class Job:
    """Chats to render with one template, which share turns."""

    templates: tuple[str, str]
    """For chats without tools, and with tools."""
    variables: dict[str, Any]
    """Of the template: the tokenizer's special tokens."""
    date: str | None
    """What `strftime_now` prints, in ISO format."""
    turns: dict[str, list[Message]]
    """Parts of chats by name."""
    chats: tuple[tuple[tuple[str, ...], bool], ...]
    """For each chat the names of its parts, and whether it ends with the generation prompt."""
    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] | None = None
    watch: bool = False
    """Whether to say which keys no chat has read."""


class Rendered(NamedTuple):
    """What became of a job."""

    texts: list[str | RenderError]
    """Of each chat."""
    unread: list[tuple[str, str]]
    """Path and role of every key that no chat has read, if they were watched."""


class RenderProcess:
    """A child that renders one job after the other. One a process is enough, see `render`."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, job: Job) -> Rendered:
        """Return the texts of a job's chats.

        Raises:
            StageError: The process cannot be started.
        """
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(json.dumps({field.name: getattr(job, field.name) for field in fields(job)}, ensure_ascii=False).encode() + b"\n")
                child.stdin.flush()
                reply = child.stdout.readline()
            except BaseException as error:
                self.stop()  # half a job was sent, or half a reply read
                if not isinstance(error, BrokenPipeError):
                    raise
                reply = b""
            if not reply.endswith(b"\n"):
                failure = self._why_it_ended(child)
                return Rendered([failure] * len(job.chats), [])
        found = json.loads(reply)
        if "texts" not in found:
            return Rendered([RenderError(**found)] * len(job.chats), [])
        texts = [text if isinstance(text, str) else RenderError(**text) for text in found["texts"]]
        return Rendered(texts, [(path, role) for path, role in found["unread"]])

    def stop(self) -> None:
        """End the child, if there is one."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is None or self._owner != os.getpid():  # a fork must not talk on the pipe of its parent
            self._child, self._owner = _start(), os.getpid()
        return self._child

    def _why_it_ended(self, child: "subprocess.Popen[bytes]") -> RenderError:
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
        code = child.returncode
        self.stop()
        if code == -signal.SIGXCPU:
            return RenderError("limit", f"it runs for more than {CPU_S} s and goes on")
        return RenderError("limit", f"it ends the process that renders, which may take {MEMORY_BYTES >> 20:,} MiB")


def _start() -> "subprocess.Popen[bytes]":
    """Return a new child that is ready.

    Raises:
        StageError: It does not start.
    """
    script = Path(__file__).with_name("render_child.py")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "TRANSFORMERS_VERBOSITY": "error", "USE_TORCH": "0"}
    child = subprocess.Popen(
        [sys.executable, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert child.stdout is not None
    if child.stdout.readline() != READY:
        child.kill()
        child.communicate()
        raise StageError(f"the process that renders chat templates does not start: {sys.executable} -P {script} says why")
    return child


_process = RenderProcess()
atexit.register(_process.stop)


def render(job: Job) -> Rendered:
    """Return the texts of a job's chats, rendered in the one process of this program.

    Raises:
        StageError: That process cannot be started.
    """
    return _process.render(job)
