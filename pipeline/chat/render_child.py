"""Runs chat templates in a process of its own, within limits of time and memory.

A template is code of somebody else: `{{ 'x' * 10**10 }}` or a loop that never ends would take the build with it, and nothing
inside a Python process can stop it in the middle of one long operation. The kernel can. So each job gets `CPU_S` seconds of CPU
time and the process `MEMORY_BYTES`; a job that takes more ends this process, and `render_process.py` starts another one.

A script of its own, which imports nothing of ours: it starts in the time of `import transformers`. Jobs come as lines of JSON on
standard input, replies go to standard output.
"""

import datetime
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

CPU_S = 5
"""CPU time for one job; a usual one takes less than a millisecond."""
MEMORY_BYTES = 1 << 30
"""Address space for all that a job needs: a row of 16 MiB takes half of it."""
MAX_CHARACTERS = 100_000_000
"""Longest text of one chat. It must be shorter than what fits the memory, for it is sent to the parent."""
READY = b"ready\n"


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

    The fields of a job are those of `render_process.Job`.
    """
    turns, tools, arguments = job["turns"], job["tools"], job["arguments"]
    if job["watch"]:
        turns, tools, arguments = watched([list(turns.values()), tools, arguments])
        turns = dict(zip(job["turns"], turns, strict=True))
    variables = {**job["variables"], "tools": tools, **(arguments or {})}
    if job["date"] is not None:
        variables["strftime_now"] = datetime.date.fromisoformat(job["date"]).strftime
    texts = []
    for names, add_generation_prompt in job["chats"]:
        chat = [message for name in names for message in turns[name]]
        template = job["templates"][variables["tools"] is not None]
        texts.append(_render(template, chat, {**variables, "add_generation_prompt": add_generation_prompt}))
    return {"texts": texts, "unread": list(_unread_in(turns, tools))}


def _unread_in(turns: dict[str, list[dict[str, Any]]], tools: object) -> Iterator[tuple[str, str]]:
    """Yield path and role of every key that was not read, but for role and content: whether these are printed shows the text."""
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
    except Exception as error:  # whatever the template's code raises
        return _failure(error)
    if len(texts[0]) > MAX_CHARACTERS:
        return {"kind": "limit", "text": f"it makes {len(texts[0]):,} characters of one chat"}
    return texts[0]


def _failure(error: Exception) -> dict[str, Any]:
    """Return what the parent must know of an error."""
    from jinja2 import TemplateSyntaxError, UndefinedError

    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    text = text.replace(f"{WatchedDict.__module__}.", "").replace(WatchedDict.__name__, "dict")
    if isinstance(error, TemplateSyntaxError):
        return {"kind": "syntax", "text": f"line {error.lineno}: {text}"}
    if isinstance(error, MemoryError):
        return {"kind": "limit", "text": f"it takes more than {MEMORY_BYTES >> 20:,} MiB of memory"}
    if isinstance(error, OverflowError | RecursionError):
        return {"kind": "overflow", "text": text}
    return {"kind": "type" if isinstance(error, TypeError | UndefinedError) else "other", "text": text}


def main() -> None:
    """Answer jobs until the parent closes the pipe or is gone."""
    import transformers.utils.chat_template_utils  # noqa: F401 - before memory is limited

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # only Linux says how much there is, and keeps the limit
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, used_bytes + MEMORY_BYTES)
    replies.write(READY)
    replies.flush()
    for line in sys.stdin.buffer:
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + CPU_S)  # whole seconds, the first of which may be over
        try:
            reply = json.dumps(answer(json.loads(line))).encode()
        except MemoryError as error:
            reply = json.dumps(_failure(error)).encode()
        replies.write(reply + b"\n")
        replies.flush()


def _limit(what: int, value: int) -> None:
    """Set a limit of this process, unless a lower one stands."""
    _, highest = resource.getrlimit(what)
    resource.setrlimit(what, (value if highest == resource.RLIM_INFINITY else min(value, highest), highest))


if __name__ == "__main__":
    main()
