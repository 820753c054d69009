"""Reads the messages of a chat from one value of a raw row; also the error for a row that cannot be used.

Not here: which columns make a pair (`pairs.py`).
"""

from collections.abc import Mapping

from weights_store.schemas import Reason

Message = dict[str, str]

_KNOWN_ROLES = ("system", "user", "assistant", "tool")


class Unusable(Exception):  # noqa: N818 - describes a row, and never leaves the pipeline
    """A row that cannot be used, with the reason for quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def read_messages(value: object, column: str) -> list[Message]:
    """Return a list of messages as turns.

    Raises:
        Unusable: It is no list of messages; carries the reason for quarantine.
    """
    if not isinstance(value, list | tuple):
        raise Unusable(
            Reason.NOT_TEXT, f"column {column!r} is a {type(value).__name__}, expected text or a list of messages"
        )
    messages = []
    for index, message in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(message, Mapping) or message.get("role") not in _KNOWN_ROLES:
            raise Unusable(Reason.NOT_TEXT, f"{where} is no message with role and content: {str(message)[:80]}")
        content = message.get("content")
        if content is None:
            raise Unusable(Reason.MISSING_VALUE, f"{where} has no content")
        if not isinstance(content, str):
            raise Unusable(Reason.NOT_TEXT, f"{where}.content is a {type(content).__name__}, expected text")
        check_text(content, where)
        messages.append({"role": str(message["role"]), "content": content})
    return messages


def check_text(text: str, where: str) -> None:
    """Refuse text that is not valid Unicode.

    Raises:
        Unusable: It has lone surrogates.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(Reason.INVALID_UTF8, f"{where}: {error.reason} at character {error.start}") from error
