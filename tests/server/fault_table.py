"""Kill real builds at random moments of each stage, start them again, and print what it cost.

    python -m tests.server.fault_table [--kills 20] [--minutes 30] [--seed 1]

The builds report to a Prefect server on PostgreSQL, as those of the tests do, but no worker starts them: they are children of
a fork server that has everything imported, so that a start costs a second. In each round a build is killed once in every
stage, and goes on from there; then its store is compared, row by row, with that of a build that nobody disturbed.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.server.postgres import Postgres, programs
from tests.server.stack import Stack, environment, wait_until
from tests.server.stages import ENDED_BEFORE, has_ended, wait_for_stage
from tests.server.worlds import loss_of_store, values, write_world
from tests.torture import orphans
from tests.torture.losses import Loss
from tests.torture.results import aligned
from weights_store import WeightStore
from weights_store.checks.verify import verify

PRELOADED = ("flows.build", "transformers", "pipeline.stages.prepare", "weights_store.tables.shards")


def build(recipe: str, store: str, folder: str, mark: str) -> None:
    """Run the flow in this process, which has a mark, a temporary folder and a log of its own."""
    os.environ |= {orphans.MARK: mark, "TMPDIR": f"{folder}/tmp"}
    tempfile.tempdir = None
    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setsid()
    from flows.build import build_weights
    from pipeline.recipe import load_recipe
    from weights_store.processes.guard import guard

    guard().mark_environment()
    build_weights(load_recipe(recipe, store=store))
    guard().close()
    os._exit(0)


class ForkedRun:
    """One process that builds."""

    def __init__(self, context: Any, recipe: Path, store: Path, folder: Path) -> None:
        """Start it; `folder` is for its log and temporary files."""
        self.tmp, self._log, self._mark = folder / "tmp", folder / "log", f"{folder.name}-{os.getpid()}"
        self.tmp.mkdir(parents=True)
        self._process = context.Process(target=build, args=(str(recipe), str(store), str(folder), self._mark))
        self._process.start()
        self.started = time.monotonic()

    def printed(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def end(self) -> None:
        """Wait for its end."""
        self._process.join(600)
        assert self._process.exitcode == 0, f"code {self._process.exitcode}: {self.printed()[-3000:]}"

    def kill(self) -> int:
        """Kill it, and return how many processes and files are left of it after two seconds."""
        self._process.kill()  # which may have come to its end by itself
        self._process.join()
        deadline = time.monotonic() + orphans.PATIENCE_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.clear()
        return len(left.processes) + len(left.files)

    def clear(self) -> None:
        """End what is left of it, of which its own process has no mark."""
        self._process.kill()
        orphans.kill_marked(self._mark)

    def _left(self) -> orphans.Left:
        return orphans.count_left(self._mark, self.tmp)


@dataclass
class Counts:
    """What came of the kills in one stage."""

    kills: int = 0
    loss: Loss = field(default_factory=Loss)
    findings: int = 0
    """Of `verify`, and processes and files that were there two seconds after a kill."""
    recovered_s: list[float] = field(default_factory=list)
    """From the next start until the stage was done."""


class Table:
    """Rounds of kills."""

    def __init__(self, recipe: Path, folder: Path, seed: int) -> None:
        """Build twice without a kill, to know what a store must hold and how long each stage takes."""
        self._recipe, self._folder, self._seed = recipe, folder, seed
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self.counts = {stage: Counts() for stage in ENDED_BEFORE}
        self._start("warm-up").end()
        run, moments = self._start("undisturbed"), list[float]()
        for stage in ENDED_BEFORE:
            wait_for_stage(run, stage)
            moments.append(time.monotonic())
        wait_until(lambda: has_ended(run, "report"), "end of report", every_s=0.01)
        moments.append(time.monotonic())
        run.end()
        lasts = [end - begin for begin, end in pairwise(moments)]
        self._lasts_s = dict(zip(ENDED_BEFORE, lasts, strict=True))
        self._expected = values(folder / "undisturbed")

    def run_round(self, number: int) -> None:
        """Kill a build once in each stage, let it come to its end, and look at its store."""
        draw, store, hit = random.Random(f"{self._seed}-{number}"), self._folder / f"round-{number}", None
        run = self._start(store.name)
        try:
            for stage in ENDED_BEFORE:
                wait_for_stage(run, stage)
                self._recovered(hit, run)
                time.sleep(draw.uniform(0, self._lasts_s[stage]))
                left = run.kill()
                hit = None if has_ended(run, stage) else stage
                if hit:
                    found = loss_of_store(store, self._expected) if store.exists() else Loss()
                    self._count(hit, Loss(0, found.doubled, found.mixed), left, kills=1)
                run = self._start(store.name)
            run.end()
            self._recovered(hit, run)
        finally:
            run.clear()
        findings = [finding for finding in verify(WeightStore(store), rows=True) if not finding.is_note]
        for stage in ENDED_BEFORE:  # what is missing in the end may be so by any of the kills
            self._count(stage, loss_of_store(store, self._expected), len(findings))
        shutil.rmtree(store)

    def _start(self, name: str) -> ForkedRun:
        number = sum(1 for _ in self._folder.glob(f"run-{name}-*"))
        return ForkedRun(self._context, self._recipe, self._folder / name, self._folder / f"run-{name}-{number}")

    def _recovered(self, stage: str | None, run: ForkedRun) -> None:
        if stage:
            self.counts[stage].recovered_s.append(time.monotonic() - run.started)

    def _count(self, stage: str, loss: Loss, findings: int, kills: int = 0) -> None:
        counts = self.counts[stage]
        counts.kills += kills
        counts.loss += loss
        counts.findings += findings

    def lines(self) -> list[str]:
        """Return the table as text."""
        header = ("killed in", "kills", "lost", "doubled", "mixed", "findings", "median s to recover")
        rows = [
            (
                stage,
                c.kills,
                c.loss.lost,
                c.loss.doubled,
                c.loss.mixed,
                c.findings,
                f"{median(c.recovered_s or [0]):.1f}",
            )
            for stage, c in self.counts.items()
        ]
        return aligned(header, rows)


def main() -> None:
    """Run rounds until every stage has had its kills or the time is over, and print the table after each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes of a build share few cores
    from pipeline.toy.language import ToyLanguage
    from pipeline.toy.model_maker import make_chat_model

    parser = argparse.ArgumentParser(prog="python -m tests.server.fault_table", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="in every stage (default: 20)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no round after so long (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="for the moments (default: 1)")
    options = parser.parse_args()
    place, language = programs(), ToyLanguage()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_chat_model(language.sample_conversations(200, seed=1), folder / "model", steps=20)
        recipe = write_world(folder / "world", folder / "model", language.sample_pairs(24, seed=2))
        database = Postgres(place, environment(folder)) if place else None
        stack = Stack(database, folder, with_worker=False)
        try:
            os.environ.update(stack.environment)  # before the fork server imports Prefect
            table, started, number = Table(recipe, folder, options.seed), time.monotonic(), 0
            while min(c.kills for c in table.counts.values()) < options.kills:
                if time.monotonic() - started > 60 * options.minutes:
                    break
                table.run_round(number)
                number += 1
                print(f"round {number}, {time.monotonic() - started:.0f} s", *table.lines(), sep="\n", flush=True)
        finally:
            stack.close()
            if database:
                database.close()


if __name__ == "__main__":
    main()
