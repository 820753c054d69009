"""The process that renders chats: started once, asked for every row, replaced after a template that broke its limits.

Called by `template.py`. The other end, and why there is one, is in `render_child.py`.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

from pipeline.chat.render_child import DIED, MAX_BROKEN_LIMITS
from pipeline.source.messages import Message
from weights_store.errors import StageError

CPU_S = 5.0
"""CPU time for one job; a usual one takes less than a millisecond."""
MEMORY_BYTES = 1 << 30
"""Address space for all that a job needs: a row of 16 MiB takes half of it."""

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
    chats: Sequence[tuple[Sequence[str], bool]]
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


class Ticket:
    """Jobs that were submitted together."""

    def __init__(self, process: "RenderProcess", jobs: Sequence[Job]) -> None:
        self.process = process
        self.jobs = jobs
        self.replies: list[Rendered] | None = None


@dataclass(frozen=True, slots=True)
class Pending:
    """A job that was submitted."""

    ticket: Ticket
    place: int

    def result(self) -> Rendered:
        """Wait for the job, and return what became of it.

        Raises:
            StageError: The process fails by itself.
        """
        return self.ticket.process.collect(self.ticket)[self.place]


class RenderProcess:
    """A child that renders what is submitted, one ticket after the other, while its parent does something else.

    A ticket is sent after the reply to the one before was read, so that never both ends wait for room in a pipe.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._under_way: Ticket | None = None

    def submit(self, jobs: Sequence[Job]) -> list[Pending]:
        """Begin to render jobs.

        Raises:
            StageError: The process fails by itself.
        """
        ticket = Ticket(self, jobs)
        if jobs:
            with self._lock:
                self._finish()
                self._send(jobs)
                self._under_way = ticket
        return [Pending(ticket, place) for place in range(len(jobs))]

    def collect(self, ticket: Ticket) -> list[Rendered]:
        """Return what became of the jobs of a ticket.

        Raises:
            StageError: The process fails by itself.
        """
        with self._lock:
            if ticket.replies is None and self._under_way is not ticket:  # it was stopped
                self._send(ticket.jobs)
                self._under_way = ticket
            if ticket.replies is None:
                self._finish()
        assert ticket.replies is not None
        return ticket.replies

    def stop(self) -> None:
        """End the child, if there is one, with what is under way."""
        child, self._child, self._under_way = self._child, None, None
        if child is not None and self._owner == os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with its fork
            child.communicate()
            self._errors.close()

    def _finish(self) -> None:
        """Wait for the ticket that is under way. What follows a job that the child has died of is sent again."""
        ticket, self._under_way = self._under_way, None
        if ticket is None:
            return
        replies: list[Rendered] = []
        num_died = 0
        while len(replies) < len(ticket.jobs):
            job, reply = ticket.jobs[len(replies)], self._receive()
            has_died = reply.pop(DIED, False)
            replies.append(_rendered(reply, job))
            if not has_died:
                continue
            num_died += 1
            rest = ticket.jobs[len(replies) :]
            if num_died < MAX_BROKEN_LIMITS and rest:
                self._send(rest)
            else:
                replies += [_rendered(reply, other) for other in rest]
        ticket.replies = replies

    def _send(self, jobs: Sequence[Job]) -> None:
        if self._child is None or self._owner != os.getpid():  # a fork must not talk on the pipe of its parent
            self._child, self._owner = self._start(), os.getpid()
        assert self._child.stdin is not None
        values = [{field.name: getattr(job, field.name) for field in fields(job)} for job in jobs]
        with self._stopped_if_interrupted(), suppress(BrokenPipeError):  # why it is gone shows when the reply is read
            self._child.stdin.write(json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._child.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        """Return the child's reply to the next job."""
        child = self._child
        assert child is not None
        assert child.stdout is not None
        with self._stopped_if_interrupted():
            reply = child.stdout.readline()
            if reply.endswith(b"\n"):
                return json.loads(reply)  # type: ignore[no-any-return]
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            raise StageError(
                f"the process that renders chat templates has failed: {said[-1] if said else 'it says nothing'}"
            )

    def _start(self) -> "subprocess.Popen[bytes]":
        """Return a new child; the first reply waits for it."""
        if find_spec("jinja2") is None:  # the child's error would not say what to install
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        script = Path(__file__).with_name("render_child.py")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        return subprocess.Popen(
            [sys.executable, "-P", str(script), str(CPU_S), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "TRANSFORMERS_VERBOSITY": "error", "USE_TORCH": "0"},
        )

    @contextmanager
    def _stopped_if_interrupted(self) -> Iterator[None]:
        """Stop the child if this process is interrupted: half a job was sent, or half a reply read."""
        try:
            yield
        except BrokenPipeError:
            raise
        except BaseException:
            self.stop()
            raise


def _rendered(found: dict[str, Any], job: Job) -> Rendered:
    if "texts" not in found:  # not even the job could be read within the limits
        return Rendered([RenderError(**found)] * len(job.chats), [])
    texts = [text if isinstance(text, str) else RenderError(**text) for text in found["texts"]]
    return Rendered(texts, [(path, role) for path, role in found["unread"]])


RENDERER = RenderProcess()
"""The one of this process, shared by all templates."""
atexit.register(RENDERER.stop)
