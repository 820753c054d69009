"""Errors that tokenweights raises on purpose.

The tree::

    TokenweightsError(Exception)
    ├── SettingsError(ValueError)       a recipe, a training config or a flag is wrong
    ├── InputError(ValueError)          a model, a file or a dataset cannot be used
    ├── MissingExtraError(ImportError)  a command needs packages of an extra that is not installed
    ├── MismatchError(ValueError)       two things that must agree do not (tokenizer, vocabulary, ids)
    ├── ScoringError(RuntimeError)      the engine's reply breaks the scoring contract
    ├── StageError(RuntimeError)        a process that a stage started has failed
    │   ├── KilledError                 it died by a signal: out of memory, or somebody's kill
    │   └── EngineError                 the scoring engine failed; starting it again goes on where it was
    │       └── OutOfMemoryError        for want of memory: a smaller token budget may do
    └── StoreError(RuntimeError)        the store cannot be read or written
        ├── NotFoundError(LookupError)  no such store, table or version
        ├── DamageError                 a file of the store is not what was committed
        └── ConflictError               other writers kept winning the race for the next version

Everything here carries one human sentence (what – expected – got – where – what to do) and pickles, so that it
survives the way from a task, a worker or a child process. The command line prints it as one line, without a traceback.
"""


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
    """A process that a stage started died by a signal; starting it again goes on where it was."""


class EngineError(StageError):
    """The scoring engine failed in the middle; a new one goes on where it was."""


class OutOfMemoryError(EngineError):
    """The scoring engine ran out of memory; one with a smaller token budget may do."""


class StoreError(TokenweightsError, RuntimeError):
    """The store cannot be read or written."""


class NotFoundError(StoreError, LookupError):
    """No such store, table or version."""


class DamageError(StoreError):
    """A file of the store is not what was committed: missing, truncated, exchanged, or bytes have flipped."""


class ConflictError(StoreError):
    """Other writers kept winning the race for the next version."""


EXIT_CODES: dict[type[TokenweightsError], int] = {OutOfMemoryError: 76, EngineError: 75}
"""Of a child process, for the errors after which its parent starts it again; 1 for every other. The first match counts."""
