"""Kill real builds at random moments and count what they leave: processes, and files in the temporary folder.

    python -m tests.torture.orphans [--kills 30] [--seed 1]

A build is the command `tokenweights build` with Prefect's own server and a made-up scorer (`tests/pipeline/made_up_scorer.py`).
Every build has a mark in its environment, which all its descendants inherit, and a private temporary folder.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MARK = "TOKENWEIGHTS_TORTURE"
SCORER = REPO / "tests" / "pipeline" / "made_up_scorer.py"
_CACHES = ("torchinductor_", "runner_storage")
PATIENCE_S = 2.0
"""From the death of a build until nothing of it may be left."""


@dataclass(frozen=True)
class Left:
    """What is left of something that has ended: command lines of processes, and names in its temporary folder."""

    processes: tuple[str, ...]
    files: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.processes or self.files)


def count_left(mark: str, tmp: Path) -> Left:
    """Return what is left: processes with `MARK=mark` in their environment, and everything in the folder `tmp`.

    Caches of libraries do not count: they have one name for all runs.
    """
    names = sorted(path.name for path in tmp.iterdir())
    files = tuple(name for name in names if not name.startswith(_CACHES))
    return Left(tuple(command_line(pid) for pid in marked(mark)), files)


def marked(mark: str) -> list[int]:
    """Return the processes that were started with `MARK=mark` in their environment and still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:  # a zombie has no environment any more
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def command_line(pid: int) -> str:
    """Return the command line of a process, or what is known of it."""
    try:
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')}"
    except OSError:
        return f"{pid}: has just ended"


def kill_marked(mark: str) -> None:
    """Kill what is left, so that it does not disturb what comes next."""
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


KILLS: Mapping[str, Callable[[int], None]] = {
    "SIGKILL alone": lambda pid: os.kill(pid, signal.SIGKILL),
    "SIGKILL group": lambda pid: os.killpg(pid, signal.SIGKILL),
    "SIGTERM alone": lambda pid: os.kill(pid, signal.SIGTERM),
    "SIGTERM group": lambda pid: os.killpg(pid, signal.SIGTERM),
}
"""Each is called with the process id of a build, which leads its process group."""


def start(command: list[str], mark: str, folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start `python -m tokenweights COMMAND` in a group of its own, with a mark, `folder/tmp` and `folder/log`."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    without = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    settings = {MARK: mark, "TMPDIR": str(folder / "tmp"), "PREFECT_HOME": str(folder / "prefect"), **environment}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tokenweights", *command],
            cwd=REPO,
            env={**without, **settings},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def write_recipe(folder: Path, model: Path, pairs: list[dict[str, object]]) -> Path:
    """Write a recipe, its pairs and its scorer into `folder`, and return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    scorer = folder / "python"
    scorer.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SCORER}" "$@"\n', encoding="utf-8")
    scorer.chmod(0o755)
    sections = {
        "dataset": {"name": "toy", "source": str(folder / "pairs.jsonl")},
        "model": {"path": str(model)},
        "contrast": {"method": "prompt"},
        "score": {"python": str(scorer), "chunk_tokens": 256, "parity_pairs": 0},
        "weights": {"name": "toy/tis", "estimator": "tis"},
    }
    lines = [f"[{name}]\n{_lines(section)}" for name, section in sections.items()]
    (folder / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "recipe.toml"


def _lines(section: Mapping[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())


def kill_build(recipe: Path, folder: Path, kind: str, after_s: float) -> Left:
    """Start a build of `recipe` in `folder`, kill it after some seconds, wait, and return what is left of it."""
    mark, settings = f"{folder.name}-{os.getpid()}", json.dumps({"call_s": 0.5})
    build = start(["build", str(recipe), "--store", str(folder / "store")], mark, folder, MADE_UP=settings)
    time.sleep(after_s)
    if build.poll() is None:
        KILLS[kind](build.pid)
    build.wait()
    time.sleep(PATIENCE_S)
    left = count_left(mark, folder / "tmp")
    kill_marked(mark)
    return left


def main() -> None:
    """Kill builds in turn by every kind of signal, and print what each left."""
    from pipeline.toy.language import ToyLanguage
    from pipeline.toy.model_maker import make_chat_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many builds to kill (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="for the moments (default: 1)")
    parser.add_argument("--within-s", type=float, default=20.0, help="a build is killed before (default: 20 s)")
    options = parser.parse_args()
    draw, language = random.Random(options.seed), ToyLanguage()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        conversations = language.sample_conversations(200, seed=1)
        make_chat_model(conversations, root / "model", hidden_size=32, num_layers=1, steps=2)
        recipe = write_recipe(root, root / "model", language.sample_pairs(40, seed=2))
        totals = dict.fromkeys(KILLS, (0, 0, 0))
        for index in range(options.kills):
            kind, after_s = list(KILLS)[index % len(KILLS)], draw.uniform(0.2, options.within_s)
            left = kill_build(recipe, root / f"build-{index}", kind, after_s)
            print(f"{kind} after {after_s:.1f} s: {left if left else 'nothing left'}", flush=True)
            num, processes, files = totals[kind]
            totals[kind] = num + 1, processes + len(left.processes), files + len(left.files)
        for kind, (num, processes, files) in totals.items():
            print(f"{kind}: {num} builds, {processes} processes and {files} files left")


if __name__ == "__main__":
    main()
