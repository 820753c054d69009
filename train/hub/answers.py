"""Turns what the hub answers, or fails to answer, into one line: what is wrong and what to do, without secrets."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from weights_store.errors import InputError, MissingExtraError
from weights_store.messages import hide_credentials, remedy_of
from weights_store.packages import how_to_install

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")
"""The query of a URL to upload to may be a signature."""
_AGAIN = "run again: what was transferred is not transferred again"
_REMEDIES = {
    400: "change what it refuses; licences have the hub's own names, such as mit, cc-by-4.0 or other",
    401: "check the name, and log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not do that: log in as somebody who may, and see whether the repository's page has terms to accept",
    404: "check the name; a private repository is only seen by those who are logged in and may read it",
    412: "somebody else changed the repository meanwhile; run again",
}
"""By status of the answer."""


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one line without secrets, which begins with `problem`.

    Raises:
        InputError: The hub refuses or cannot be reached.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP client, which has changed
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        package = "huggingface_hub"
        raise MissingExtraError(
            f"{problem}: this needs the package {package!r}, which is not installed; {how_to_install(package, 'hub')}"
        ) from error
    except ValueError as error:  # it looks at its environment when it is imported
        raise InputError(f"{problem}: HF_ENDPOINT is no address: {error}; expected one like https://hub.org") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    for handler in logging.getLogger("huggingface_hub").handlers:  # it logs the URL of every upload that it tries again
        handler.addFilter(_hide_secrets)
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        text = _public(_said(error))
        if token := get_token():
            text = text.replace(token, "***")
        raise InputError(f"{problem}: {text.rstrip('.')}; {_remedy(error)}") from None


def _hide_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = _public(record.getMessage()), ()
    return True


def _public(text: str) -> str:
    return hide_credentials(_QUERY.sub(r"\1", " ".join(text.split())))


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it was raised from."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _answer(error: BaseException) -> BaseException | None:
    """Return the cause that holds an answer of the hub, None if it did not answer."""
    return next((each for each in _causes(error) if getattr(each, "response", None) is not None), None)


def _said(error: BaseException) -> str:
    answer = _answer(error)
    if answer is None:
        return str(_causes(error)[-1]) or type(error).__name__
    if isinstance(error, ValueError):  # the list of what is wrong with the header of a card; the answer says less
        return str(error)
    return getattr(answer, "server_message", None) or str(answer)


def _remedy(error: BaseException) -> str:
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    response = getattr(_answer(error), "response", None)
    if response is not None and response.status_code == 429:
        wait_s = response.headers.get("Retry-After", "")
        return f"wait {f'{wait_s} s' if wait_s.isdecimal() else 'some minutes'} and {_AGAIN}"
    if response is not None and response.status_code >= 500:
        return f"the hub has a fault; wait and {_AGAIN}"
    if response is not None and response.status_code in _REMEDIES:
        return _REMEDIES[response.status_code]
    cause = _causes(error)[-1]
    match cause:
        case HFValidationError():
            return "choose another name"
        case OfflineModeIsEnabled():
            return "unset HF_HUB_OFFLINE and run again"
        case UnicodeEncodeError():
            return "see that the token is typed as the hub shows it: it has letters, digits and `_` only"
    return remedy_of(cause).removeprefix("; ") or f"check the connection, and {_AGAIN}"
