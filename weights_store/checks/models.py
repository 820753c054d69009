"""Compares the contrastive models of a store with their records, and weight datasets with the models that made them.

Every file is read once, as a stream. A folder without a record is an unfinished model: a running build trains it, or the next
one continues it, so it is no finding unless a weight dataset needs it.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from weights_store.checks.findings import Finding
from weights_store.checks.log import TableLog
from weights_store.checks.metadata import parent_problem, parents
from weights_store.checks.model_folders import MODELS, ModelRecord, check_files, is_weak, read_model_record, remedy
from weights_store.errors import DamageError
from weights_store.location import Location
from weights_store.messages import Progress, show
from weights_store.tables.metadata import Parent

_BYTES_PER_PROGRESS = 64 << 20
_TRAINED_ROLES = ("positive_logps", "negative_logps")


@dataclass
class ModelChecks:
    """The checks of one run of `verify`; each model is read once.

    Args:
        root: Of the store.
        find_log: Returns the log of a table by its path, None if the store has no such table.
    """

    root: Location
    find_log: Callable[[str], TableLog | None]
    _records: dict[str, ModelRecord | DamageError] | None = None
    _checked: set[str] = field(default_factory=set)

    def check_all(self) -> Iterator[Finding]:
        """Yield the findings of every finished model that was not checked yet."""
        for name in self.records():
            yield from self._check(name)

    def check_scorers(self, log: TableLog) -> Iterator[Finding]:
        """Yield the findings of the models that the newest version of a weight dataset was made with."""
        metadata = log.metadata(log.newest) or {}
        contrast = metadata.get("contrast")
        trained = bool(contrast) and not (isinstance(contrast, dict) and contrast.get("is_head"))
        for parent in parents(metadata) if trained else ():
            wanted = self._scorer(parent)
            if wanted is None:
                continue
            names = [name for name, record in self.records().items() if self._may_be(record, wanted)]
            for name in names:
                yield from self._check(name)
            if not names:
                problem = (
                    f"the {parent['role'].removesuffix('_logps')} model that scored for it, {wanted[:12]}…, is not in "
                    f"{MODELS}/; restore it from a copy: a build would train others, and score all pairs again"
                )
                yield Finding(log.table.path, problem, log.newest)

    def records(self) -> dict[str, ModelRecord | DamageError]:
        """Return the record of every finished model by its name, or what is wrong with it."""
        if self._records is None:
            found = {name: self._read(name) for name in (self.root / MODELS).folders() if not name.startswith(".")}
            self._records = {name: record for name, record in found.items() if record is not None}
        return self._records

    def _read(self, name: str) -> ModelRecord | DamageError | None:
        try:
            return read_model_record(self.root / MODELS / name)
        except DamageError as error:
            return error

    def _scorer(self, parent: Parent) -> str | None:
        """Return the fingerprint of the trained model behind a table of log-probs, None if it records none."""
        if parent.get("role") not in _TRAINED_ROLES:
            return None
        log = self.find_log(parent["table"])
        scorer = (log.metadata(parent["version"]) or {}).get("scorer") if log is not None else None
        model = scorer.get("model") if isinstance(scorer, dict) else None  # a damaged commit may hold anything
        return model if isinstance(model, str) else None

    @staticmethod
    def _may_be(record: ModelRecord | DamageError, fingerprint: str) -> bool:
        """Return whether a record is, or before it was damaged may have been, that of a model."""
        return isinstance(record, DamageError) or record.get("fingerprint", fingerprint) == fingerprint

    def _check(self, name: str) -> Iterator[Finding]:
        if name in self._checked:
            return
        self._checked.add(name)
        place, folder, record = f"{MODELS}/{name}", self.root / MODELS / name, self.records()[name]
        if isinstance(record, DamageError):
            yield Finding(place, str(record).removeprefix(f"{folder}/"))
            return
        for problem in check_files(folder, record, _Reader(folder, place)):
            yield Finding(place, f"{problem}; {remedy(folder)}")
        identity = record["identity"]
        data: Parent = {"table": identity["table"], "version": record["version"], "fingerprint": record["data"]}
        if problem_of_data := parent_problem(data, self.find_log):
            yield Finding(place, problem_of_data)
        if is_weak(record):
            covered = "only weights and config.json" if "fingerprint" in record else "no file"
            yield Finding(place, f"its record is of an earlier version and covers {covered}", is_note=True)


class _Reader:
    """Computes the SHA-256 of files of one model, in bounded memory, and shows how far it has come."""

    def __init__(self, folder: Location, place: str) -> None:
        self._place, self._started = place, time.monotonic()
        self._total = sum(info.size for info in folder.tree().values())
        self._done = self._shown = 0

    def __call__(self, folder: Location, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in folder.stream(name):
            digest.update(chunk)
            self._done += len(chunk)
            if self._done - self._shown >= _BYTES_PER_PROGRESS:
                self._shown = self._done
                wall_s = time.monotonic() - self._started
                show(Progress(f"verify {self._place}", self._done, self._total, wall_s, "bytes"))
        return digest.hexdigest()
