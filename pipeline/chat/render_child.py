"""Runs chat templates in a process of its own, within limits of time and memory.

A template is code of somebody else: `{{ 'x' * 10**10 }}` or a loop that never ends would take the build with it, and nothing
inside a Python process can stop one long operation in the middle. The kernel can. So each job gets so many seconds of CPU time,
and the process so much memory, as its arguments say. A job that takes more ends it.

A script of its own, which imports nothing of ours: it starts in the time of `import transformers`. Lists of jobs come as lines
of JSON on standard input, an answer to each goes as a line to standard output.
"""

import datetime
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_CHARACTERS = 20_000_000
"""Longest text of one chat: it must fit the memory several times, and is sent to the parent."""
MAX_ERROR_CHARACTERS = 1000
"""Longest text of an error: a template can raise any, and each goes into the quarantine with its row."""
DIED = "died"
"""Key of the answer to a job that the process has died of: jobs after it must be sent again."""
MAX_BROKEN_LIMITS = 3
"""Jobs that may break the limits before others are not tried: each costs seconds."""


class WatchedDict(dict[str, Any]):
    """A dict of a chat that remembers which of its keys the template has read."""

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__({key: watched(inner) for key, inner in dict.items(value)})
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys. Python copies a dict that has its own iterator by `__getitem__`: a copy counts as read."""
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; the key counts as read."""
        self._read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        """Return all items; all keys count as read."""
        self._read.update(self)
        return super().items()

    def values(self) -> Any:
        """Return all values; all keys count as read."""
        self._read.update(self)
        return super().values()

    def unread(self, where: str) -> Iterator[str]:
        """Yield the path of every key that was not read and has a value."""
        for key, inner in dict.items(self):
            if key in self._read:
                yield from unread(inner, f"{where}.{key}")
            elif inner not in (None, "", [], {}):
                yield f"{where}.{key}"


def watched(value: Any) -> Any:
    """Return a JSON value whose objects remember which of their keys were read."""
    if isinstance(value, dict):
        return WatchedDict(value)
    return [watched(inner) for inner in value] if isinstance(value, list) else value


def unread(value: object, where: str) -> Iterator[str]:
    """Yield the path of every key of a watched value that was not read and has a value."""
    if isinstance(value, WatchedDict):
        yield from value.unread(where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unread(inner, f"{where}[{index}]")


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Render the chats of a job: `texts` (or what each failed with), and the paths of keys that no template has `unread`.

    If one of them breaks a limit, the answer is that failure alone. The fields of a job are those of `render_process.Job`.
    """
    turns, tools, arguments = job["turns"], job["tools"], job["arguments"]
    if job["watch"]:
        turns, tools, arguments = watched([list(turns.values()), tools, arguments])
        turns = dict(zip(job["turns"], turns, strict=True))
    variables = {**job["variables"], "tools": tools, **(arguments or {})}
    if job["date"] is not None:
        variables["strftime_now"] = datetime.date.fromisoformat(job["date"]).strftime
    template = job["templates"][variables["tools"] is not None]
    texts: list[str | dict[str, Any]] = []
    for names, add_generation_prompt in job["chats"]:
        chat = [message for name in names for message in turns[name]]
        text = _render(template, chat, {**variables, "add_generation_prompt": add_generation_prompt})
        if isinstance(text, dict) and text["kind"] == "limit":
            return text
        texts.append(text)
    return {"texts": texts, "unread": list(_unread_in(turns, tools))}


def _unread_in(turns: dict[str, list[dict[str, Any]]], tools: object) -> Iterator[tuple[str, Any]]:
    """Yield path and role of every key that was not read. Not of role and content: the text shows whether these are printed."""
    yield from ((path, "") for path in unread(tools, "tools"))
    for name, messages in turns.items():
        for index, message in enumerate(messages):
            for path in unread(message, where := f"{name}[{index}]"):
                if path not in (f"{where}.role", f"{where}.content"):
                    yield path, dict.get(message, "role")


def _render(template: str, chat: list[dict[str, Any]], variables: dict[str, Any]) -> str | dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(conversations=[chat], chat_template=template, **variables)
    except Exception as error:  # noqa: BLE001 - whatever the template's code raises
        return _failure(error)
    if len(texts[0]) > MAX_CHARACTERS:
        return {"kind": "limit", "text": f"it makes {len(texts[0]):,} characters of one chat"}
    return texts[0]


def _failure(error: Exception) -> dict[str, Any]:
    """Return what the parent must know of an error."""
    from jinja2 import TemplateSyntaxError, UndefinedError

    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = text.replace(f"{WatchedDict.__module__}.", "").replace(WatchedDict.__name__, "dict")
    if len(text) > MAX_ERROR_CHARACTERS:
        text = f"{text[:MAX_ERROR_CHARACTERS]}… ({len(text):,} characters)"
    if isinstance(error, TemplateSyntaxError):
        return {"kind": "syntax", "text": f"line {error.lineno}: {text}"}
    if isinstance(error, MemoryError):
        return {"kind": "limit", "text": "it takes too much memory"}
    if isinstance(error, OverflowError | RecursionError):
        return {"kind": "overflow", "text": text}
    return {"kind": "type" if isinstance(error, TypeError | UndefinedError) else "other", "text": text}


def main(cpu_s: float, memory_bytes: int) -> None:
    """Answer jobs until the parent closes the pipe or is gone.

    A fork does the work, so that one that dies of a job is replaced without importing anything again. This process stays
    single-threaded, and only waits.
    """
    import transformers.utils.chat_template_utils  # noqa: F401 - before memory is limited

    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while worker := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if code >= 0:
            sys.exit(code)
        text = f"it runs for more than {cpu_s:g} s and goes on"
        if code != -signal.SIGPROF:
            text = f"it ends the process that renders by signal {-code}"
        replies.write(json.dumps({"kind": "limit", "text": text, DIED: True}).encode() + b"\n")
        replies.flush()
    _limit_memory(memory_bytes)
    for line in sys.stdin.buffer:
        num_broken = 0
        for job in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # of CPU time; then its signal ends the process, whatever runs
            if num_broken < MAX_BROKEN_LIMITS:
                reply, is_broken = _reply(job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            num_broken += is_broken
            replies.write(reply + b"\n")
            replies.flush()  # before a job that may end this process


def _limit_memory(num_bytes: int) -> None:
    """Limit the address space of this process to so many more bytes."""
    with suppress(OSError, ValueError):  # only Linux says how much there is, and keeps the limit
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, highest = resource.getrlimit(resource.RLIMIT_AS)
        limit = used_bytes + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if highest < 0 else min(limit, highest), highest))


def _reply(job: dict[str, Any]) -> tuple[bytes, bool]:
    """Return the answer to a job, and whether it breaks a limit."""
    try:
        found = answer(job)
        return json.dumps(found).encode(), "texts" not in found
    except MemoryError as error:
        return json.dumps(_failure(error)).encode(), True


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
