"""Damages one file after the other, and looks whether `verify` finds it and what every reader makes of it.

A damage must be found by `verify`, or have no effect on any reader. Found or not, no reader may return anything else than
before; it may raise one of our errors.
"""

import contextlib
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.torture.damages import Damage, draw_damage
from tests.torture.readers import Place, Reader, known_rows, readers_of, same
from tests.torture.sound_store import SoundStore, small_shards
from weights_store.checks.verify import verify
from weights_store.errors import TokenweightsError
from weights_store.tables.notes import NOT_A_VERSION, README

FOUND_SHARE = 0.15
"""Of the damages that `verify` finds: on how many all readers are tried too."""
_PATIENCE_S = 120
_MS_NS = 1_000_000


@dataclass
class Trial:
    """What came of one damage."""

    number: int
    what: str
    place: str
    found: bool = False
    refused: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    """Readers that returned something else, without a word."""
    raw: list[str] = field(default_factory=list)
    """Errors that are none of ours."""

    @property
    def outcome(self) -> str:
        """The worst that happened."""
        if self.silent:
            return "silent"
        if self.raw:
            return "raw error"
        if self.found:
            return "found"
        return "refused" if self.refused else "no effect"


class DamageTrials:
    """Trials over one store, in a copy that it may damage: `folder` is new."""

    def __init__(self, made: SoundStore, folder: Path, seed: int, found_share: float = FOUND_SHARE) -> None:
        shutil.copytree(made.folder, folder)
        self.made = SoundStore(folder)
        self.seed = seed
        self.found_share = found_share
        self._root = Path(self.made.uri)
        self._scratch = folder / "scratch"
        self._files = {str(path.relative_to(self._root)): path.read_bytes() for path in _walk(self._root)}
        self._stamps = {path: _stamp(self._root / path) for path in self._files}
        self._newest = max(self._stamps.values(), key=lambda stamp: stamp.time_ns)
        self._num_written = 0
        self._damaged: set[str] = set()
        self._rows = known_rows(self.made)
        self._sound: dict[tuple[str, str | None], object] = {}

    def try_one(self, number: int) -> Trial:
        """Make one damage, look what comes of it, and undo it."""
        rng = random.Random(f"{self.seed}-{number}")
        damage = draw_damage(rng, self._files)
        trial = Trial(number, damage.what, damage.place)
        look_closer = rng.random() < self.found_share
        with _bounded(), small_shards():
            try:
                self._write(damage)
                trial.found = self._is_found(damage, trial)
                if look_closer or not trial.found:
                    self._read_all(damage, trial)
            finally:
                self._restore()
        return trial

    def _is_found(self, damage: Damage, trial: Trial) -> bool:
        """Return whether `verify` reports it: first of the damaged table alone, which is faster and finds no more."""
        scopes = [None] if damage.table is None else [[damage.table], None]
        try:
            findings = (finding for tables in scopes for finding in verify(self.made.store, tables))
            return any(not finding.is_note for finding in findings)
        except TokenweightsError:
            return True
        except Exception as error:  # noqa: BLE001 - a raw error is what is looked for
            trial.raw.append(f"verify: {error!r}")
            return True

    def _read_all(self, damage: Damage, trial: Trial) -> None:
        readers = readers_of(damage.place.partition("/")[0])
        for reader in (reader for reader in readers if reader.is_ours or not trial.found):
            sound = self._sound_reading(reader, damage)
            try:
                is_same = same(self._read(reader, damage.table), sound)
            except TokenweightsError:
                trial.refused.append(reader.name)
            except Exception as error:  # noqa: BLE001 - a raw error is what is looked for
                trial.raw.append(f"{reader.name}: {error!r}")
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of Rust; no subclass of Exception
                    raise
                trial.raw.append(f"{reader.name}: {error!r}")
            else:
                if not is_same:
                    trial.silent.append(reader.name)
            self._restore()
            self._write(damage)

    def _sound_reading(self, reader: Reader, damage: Damage) -> object:
        """Return what a reader reads from the sound store."""
        key = (reader.name, damage.table)
        if key not in self._sound:
            self._restore()
            self._sound[key] = self._read(reader, damage.table)
            self._restore()
            self._write(damage)
        return self._sound[key]

    def _read(self, reader: Reader, table: str | None) -> object:
        self._scratch.mkdir()
        try:
            return reader.read(Place(self.made, table, self._scratch, self._rows, self._files.keys()))
        finally:
            shutil.rmtree(self._scratch)

    def _write(self, damage: Damage) -> None:
        for path, data in damage.change.items():
            self._damaged.add(path)
            if data is None:
                (self._root / path).unlink()
            else:
                (self._root / path).write_bytes(data)
                # A time of its own, in the millisecond of the sound file: digests are cached by time, and lineage shows it.
                self._num_written += 1
                stamp = self._stamps.get(path, self._newest)
                time_ns = stamp.time_ns // _MS_NS * _MS_NS + self._num_written % _MS_NS
                os.utime(self._root / path, ns=(time_ns, time_ns))

    def _restore(self) -> None:
        """Undo the damage and whatever readers have written."""
        found = {str(path.relative_to(self._root)): path for path in _walk(self._root)}
        for name in found.keys() - self._files.keys():
            found[name].unlink()
        for name, data in self._files.items():
            path, stamp = self._root / name, self._stamps[name]
            if name in self._damaged or name not in found or _stamp(path) != stamp:
                path.write_bytes(data)
                os.utime(path, ns=(stamp.time_ns, stamp.time_ns))
                self._stamps[name] = _stamp(path)
        self._damaged.clear()
        for folder in ("logps/new", "weights/again"):
            shutil.rmtree(self._root / folder, ignore_errors=True)


class _Stamp(NamedTuple):
    """What changes when a file is written."""

    inode: int
    size: int
    time_ns: int


def _stamp(path: Path) -> _Stamp:
    found = path.stat()
    return _Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a store without its notes, which no reader of ours opens."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if name not in (README, NOT_A_VERSION))


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise TimeoutError if a trial takes minutes: a damaged number may ask for any amount of work."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"took more than {_PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
