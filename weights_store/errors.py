"""Errors that tokenweights raises on purpose.

The tree::

    TokenweightsError(Exception)
    ├── SettingsError(ValueError)       a recipe, a training config or a flag is wrong
    ├── InputError(ValueError)          a model, a file or a dataset cannot be used
    ├── MissingExtraError(ImportError)  a command needs packages of an extra that is not installed
    ├── MismatchError(ValueError)       two things that must agree do not (tokenizer, vocabulary, ids)
    ├── ScoringError(RuntimeError)      the engine's reply breaks the scoring contract
    ├── StageError(RuntimeError)        a process that a stage started has failed
    │   ├── KilledError                 a signal ended it: out of memory, or a kill
    │   └── EngineError                 the scoring engine failed; a new one continues where it was
    │       ├── OutOfMemoryError        it ran out of memory: a smaller token budget may help
    │       └── SequenceLengthError     it was started for shorter sequences; one for the model's context takes them
    └── StoreError(RuntimeError)        the store cannot be read or written
        ├── NotFoundError(LookupError)  no such store, table or version
        ├── DamageError                 a file of the store is not what was committed
        └── ConflictError               other writers won the race for the next version every time

The message is one sentence: what is wrong, expected, got, where, what to do. Errors pickle, so they can cross processes. The
command line prints one line, without a traceback.
"""

from collections.abc import Iterator


class TokenweightsError(Exception):
    """Base of all errors raised on purpose."""


class SettingsError(TokenweightsError, ValueError):
    """A recipe, a training config or a flag is wrong."""


class InputError(TokenweightsError, ValueError):
    """A model, a file or a dataset cannot be used."""


class MissingExtraError(TokenweightsError, ImportError):
    """A command needs packages of an extra that is not installed."""


class MismatchError(TokenweightsError, ValueError):
    """Two things that must agree do not: tokenizer, vocabulary, ids, lengths."""


class ScoringError(TokenweightsError, RuntimeError):
    """The engine's reply breaks the scoring contract."""


class StageError(TokenweightsError, RuntimeError):
    """A process that a stage started has failed."""


class KilledError(StageError):
    """A signal ended a process that a stage started; a new one continues where it was."""


class EngineError(StageError):
    """The scoring engine failed; a new one continues where it was."""


class OutOfMemoryError(EngineError):
    """The scoring engine ran out of memory; one with a smaller token budget may work."""


class SequenceLengthError(EngineError):
    """A sequence is longer than the engine was started for; one that is started for the model's whole context takes it."""


class StoreError(TokenweightsError, RuntimeError):
    """The store cannot be read or written."""


class NotFoundError(StoreError, LookupError):
    """No such store, table or version."""


class DamageError(StoreError):
    """A file of the store is not what was committed: missing, truncated, exchanged, or bytes have flipped."""


class ConflictError(StoreError):
    """Other writers won the race for the next version every time."""


EXIT_CODES: dict[type[TokenweightsError], int] = {OutOfMemoryError: 76, SequenceLengthError: 77, EngineError: 75}
"""Exit codes of a child for errors after which its parent starts it again; the first match counts. Other errors give 1."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from or while handling, each once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__
