"""Kills writers, stages and whole builds at random moments, lets them run to their end, and counts what was lost.

Most kills hit children of a fork server, which has imported everything and started no thread: a kill costs some milliseconds.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.losses import Loss
from tests.torture.results import Result, aligned
from weights_store import WeightStore
from weights_store.checks.verify import verify

_PATIENCE_S = 600


@dataclass
class Counts:
    """What came of the rounds of one kind."""

    kills: int = 0
    """Or, where nothing is killed, builds."""
    rounds: int = 0
    loss: Loss = field(default_factory=Loss)
    findings: int = 0
    """Of `verify`, after the work came to its end."""
    orphans: int = 0
    """Processes and temporary files that were there two seconds after a kill."""
    problems: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, loss: Loss, root: Path) -> None:
        """Count one round, whose work has come to its end in the store at `root`."""
        findings = [str(finding) for finding in verify(WeightStore(root), rows=True) if not finding.is_note]
        self.rounds += 1
        self.loss += loss
        self.findings += len(findings)
        if loss or findings:
            self.problems.append((number, f"{loss}; {'; '.join(findings[:3]) or 'verify finds nothing'}"))


@dataclass(frozen=True)
class Work:
    """How many kills of one kind, in which folder, from which seed on; `alone` is the number of the only round."""

    server: "ForkServer"
    folder: Path
    seed: int
    num_kills: int
    alone: int | None = None

    def rounds(self, counts: Counts) -> Iterator[tuple[int, Path, random.Random]]:
        """Yield the number, the folder and the random numbers of each round, until there were enough kills."""
        while counts.kills < self.num_kills and (self.alone is None or counts.rounds == 0):
            number = counts.rounds if self.alone is None else self.alone
            root = self.folder / str(number)
            yield number, root, random.Random(f"{self.seed}-{number}")
            shutil.rmtree(root)


class ForkServer:
    """Starts children that have everything imported, and kills them."""

    def __init__(self, *modules: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(modules))

    def start(self, target: Callable[..., None], *arguments: Any) -> Any:
        """Start `target(*arguments)`, return the process."""
        process = self._context.Process(target=target, args=arguments)
        process.start()
        return process

    def start_and_wait(self, target: Callable[..., None], root: Path, *arguments: Any) -> Any:
        """Start `target(root, connection, *arguments)`, wait until it says that it has started, return the process."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self.start(target, str(root), sender, *arguments)
        assert receiver.poll(_PATIENCE_S), "a child did not start"
        return process


def end(process: Any, kill: bool) -> bool:
    """Kill a child, or wait for its end; return whether it was killed before it was through."""
    if kill:
        process.kill()  # SIGKILL; nothing where it has ended by itself
    process.join(_PATIENCE_S)
    assert process.exitcode in (0, -signal.SIGKILL), f"a child ended with {process.exitcode}"
    return process.exitcode != 0


def kill_one_writer(work: Work) -> Counts:
    """Kill a writer that appends, replaces and optimizes, again and again, and look at every version that it made."""
    from tests.torture.writers import loss_of_plan, work_off

    counts = Counts()
    for number, root, draw in work.rounds(counts):
        num_versions, loss, was_killed, longest_s = 0, Loss(), True, 0.2
        while was_killed:
            child = work.server.start_and_wait(work_off, root)
            time.sleep(draw.uniform(0.0, longest_s))
            longest_s *= 1.1  # on a busy machine, too, the plan comes to its end
            was_killed = end(child, kill=True)
            counts.kills += was_killed
            more, num_versions = loss_of_plan(root, num_versions, is_over=not was_killed)
            loss += more
        counts.add(number, loss, root)
    return counts


def kill_many_writers(work: Work) -> Counts:
    """Kill three writers of the same rows in one table, each at a moment of its own, then let one come to its end."""
    from tests.torture.writers import append_all, loss_of_appends

    counts = Counts()
    for number, root, draw in work.rounds(counts):
        for _ in range(3):
            children = [work.server.start_and_wait(append_all, root, index) for index in range(3)]
            for child in children:
                time.sleep(draw.uniform(0.0, 0.2))
                counts.kills += end(child, kill=True)
        end(work.server.start_and_wait(append_all, root, 3), kill=False)
        counts.add(number, loss_of_appends(root), root)
    return counts


def kill_stages(work: Work) -> Counts:
    """Kill builds through the real stages with a made-up engine, let one come to its end, and compare every row."""
    from tests.torture.made_up_build import MadeUpBuild, loss_of_build, unreadable_versions

    counts, building = Counts(), MadeUpBuild.prepared(work.folder)
    end(building.start(work.server, work.folder / "warm-up"), kill=False)
    whole_s, expected = _undisturbed(work, building)
    for number, root, draw in work.rounds(counts):
        for _ in range(4):
            child = building.start(work.server, root)
            time.sleep(draw.uniform(0.02, whole_s))
            counts.kills += end(child, kill=True)
            if unreadable := unreadable_versions(root, draw):
                counts.problems.append((number, f"versions that are not whole: {unreadable}"))
        end(building.start(work.server, root), kill=False)
        counts.add(number, loss_of_build(root, expected), root)
    return counts


def kill_commands(work: Work) -> Counts:
    """Kill `tokenweights build` with Prefect's server and its scorer: alone or with its group, by SIGKILL or SIGTERM."""
    from tests.torture import orphans
    from tests.torture.made_up_build import loss_of_build, make_model, make_pairs, rows_of

    recipe = orphans.write_recipe(work.folder, make_model(work.folder / "model"), make_pairs(40))
    whole_s, counts = _run_command(recipe, work.folder / "undisturbed"), Counts()
    expected = rows_of(work.folder / "undisturbed" / "store")
    for number, root, draw in work.rounds(counts):
        for kind in draw.sample(list(orphans.KILLS), len(orphans.KILLS)):
            after_s = draw.uniform(0.2, 1.2 * whole_s)
            try:
                left = orphans.kill_build(recipe, root, kind, after_s)
            finally:  # if this very process is ended meanwhile
                orphans.kill_marked(f"{root.name}-{os.getpid()}")
            counts.kills += 1
            counts.orphans += len(left.processes) + len(left.files)
            if left:
                counts.problems.append((number, f"{kind} after {after_s:.1f} s left {left}"))
            shutil.rmtree(root / "tmp")
        _run_command(recipe, root)
        counts.add(number, loss_of_build(root / "store", expected), root / "store")
    return counts


def _run_command(recipe: Path, folder: Path) -> float:
    """Run a build to its end and return how long it took, in seconds."""
    from tests.torture import orphans

    started, mark = time.monotonic(), f"end-{folder.name}-{os.getpid()}"
    build = orphans.start(["build", str(recipe), "--store", str(folder / "store")], mark, folder)
    try:
        code = build.wait(_PATIENCE_S)
    finally:
        orphans.kill_marked(mark)  # nothing where it has ended by itself
    assert code == 0, (folder / "log").read_text(errors="replace")[-2000:]
    return time.monotonic() - started


def build_concurrently(work: Work) -> Counts:
    """Run three builds of one store at once beside `optimize` and `vacuum` in a loop, and compare every row."""
    from tests.torture.made_up_build import MadeUpBuild, loss_of_build, tidy

    counts, building = Counts(), MadeUpBuild.prepared(work.folder)
    _, expected = _undisturbed(work, building)
    for number, root, draw in work.rounds(counts):
        children = []
        tidying = work.server.start(tidy, str(root), str(building.problems))
        for _ in range(3):
            children.append(building.start(work.server, root))
            time.sleep(draw.uniform(0.0, 0.3))
        for child in children:
            child.join(_PATIENCE_S)
            counts.kills += 1
        tidying.kill()
        tidying.join(_PATIENCE_S)
        if building.problems.exists():
            counts.problems.append((number, building.problems.read_text()[-1500:]))
            building.problems.unlink()
        counts.add(number, loss_of_build(root, expected), root)
    return counts


def _undisturbed(work: Work, building: Any) -> tuple[float, Any]:
    """Return how long a build takes that nobody disturbs, in seconds, and its rows."""
    from tests.torture.made_up_build import rows_of

    started = time.monotonic()
    end(building.start(work.server, work.folder / "undisturbed"), kill=False)
    return time.monotonic() - started, rows_of(work.folder / "undisturbed")


KINDS: Mapping[str, Callable[[Work], Counts]] = {
    "one writer": kill_one_writer,
    "three writers": kill_many_writers,
    "stages": kill_stages,
    "commands": kill_commands,
    "concurrent builds": build_concurrently,
}
"""What is disturbed."""


def run_kills(num_kills: Mapping[str, int], seed: int, folder: Path, alone: tuple[str, int] | None = None) -> Result:
    """Run the rounds of every kind for as many kills as it says, or `alone` one round of one kind."""
    started = time.monotonic()
    server = ForkServer("tests.torture.writers", "tests.torture.made_up_build")
    counted = {}
    for kind, number in num_kills.items() if alone is None else [(alone[0], 1)]:
        if number:
            place = folder / kind.replace(" ", "-")
            place.mkdir(parents=True)
            counted[kind] = KINDS[kind](Work(server, place, seed, number, alone and alone[1]))
            print(f"{kind}: {counted[kind].kills} in {time.monotonic() - started:.0f} s", flush=True)
    rows = [
        (kind, c.kills, c.rounds, c.loss.lost, c.loss.doubled, c.loss.mixed, c.findings, c.orphans)
        for kind, c in counted.items()
    ]
    header = ("disturbed", "kills", "rounds", "lost", "doubled", "mixed", "findings", "orphans")
    failures = [(f"{kind}:{at}", text) for kind, counts in counted.items() for at, text in counts.problems]
    num = sum(counts.kills for counts in counted.values())
    return Result("kills", num, aligned(header, rows), failures, time.monotonic() - started)
