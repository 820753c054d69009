"""Runs many damage trials in a few processes, each with its own copy of one sound store."""

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.torture.results import Result, aligned

if TYPE_CHECKING:
    from tests.torture.damage_trials import DamageTrials, Trial

ONE_THREAD = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
"""Environment of a process that shares the cores with others of its kind."""
OUTCOMES = ("found", "refused", "no effect", "silent", "raw error")
_trials: "DamageTrials"  # of a child


def run_damages(cases: Sequence[int], seed: int, sound: Path, folder: Path, num_processes: int) -> Result:
    """Try the damages of some numbers on a copy of the store in `sound`, which is made if it is not there.

    `folder` is for the copies, and for what Rust prints when it panics.
    """
    started = time.monotonic()
    trials: list[Trial] = []
    with _environment(ONE_THREAD), _children(num_processes, sound, folder, seed) as pool:
        for trial in pool.map(_try_one, cases, chunksize=4):
            trials.append(trial)
            if len(trials) % 200 == 0:
                print(f"damages: {len(trials)} of {len(cases)}, {time.monotonic() - started:.0f} s", flush=True)
    failures = [
        (f"damages:{trial.number}", _text(trial)) for trial in trials if trial.outcome in ("silent", "raw error")
    ]
    return Result("damages", len(cases), _table(trials), failures, time.monotonic() - started)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let the processes that are started meanwhile find these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _children(num_processes: int, sound: Path, folder: Path, seed: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    if not (sound / "store").exists():
        sound.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, context, _quietly, (folder / "making.log",)) as maker:
            maker.submit(_make, sound).result()
    return ProcessPoolExecutor(num_processes, context, _start, (sound, folder, seed))


def _make(sound: Path) -> None:
    from tests.torture.sound_store import make_sound_store

    make_sound_store(sound)


def _start(sound: Path, folder: Path, seed: int) -> None:
    global _trials
    from tests.torture.damage_trials import DamageTrials
    from tests.torture.sound_store import SoundStore

    _quietly(folder / f"{os.getpid()}.log")
    _trials = DamageTrials(SoundStore(sound), folder / f"store-{os.getpid()}", seed)


def _quietly(log: Path) -> None:
    """Send what this process prints to a file: panics of Rust print a page each."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())


def _try_one(number: int) -> "Trial":
    return _trials.try_one(number)


def _text(trial: "Trial") -> str:
    silent = f"{', '.join(trial.silent)} read other values" if trial.silent else ""
    by = "verify finds it" if trial.found else "verify finds nothing"
    return f"{trial.what} ({trial.place}): {'; '.join(filter(None, [silent, *trial.raw]))}; {by}"


def _table(trials: "list[Trial]") -> list[str]:
    """Count the outcomes by kind of file, and by kind of damage."""
    lines = []
    for title, part in (("damaged file", 0), ("damage", 2)):
        names = [trial.what.partition(": ")[part] for trial in trials]
        rows = list(_rows(names, trials))
        lines += [*aligned((title, "tried", *OUTCOMES), rows), ""]
    return lines[:-1]


def _rows(names: list[str], trials: "list[Trial]") -> Iterator[list[object]]:
    counts = Counter(zip(names, (trial.outcome for trial in trials), strict=True))
    for name in sorted(set(names)):
        yield [name, names.count(name), *(counts[name, outcome] for outcome in OUTCOMES)]
    yield ["all", len(trials), *(sum(counts[name, outcome] for name in set(names)) for outcome in OUTCOMES)]
