"""The command: `python -m tests.torture --minutes 30 --seed 7`, or one case again: `--case damages:123 --sound FOLDER`.

It prints its seed first, a table for each part last, and for each failure how to repeat it. Exit code 1 if a case failed.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.torture.damage_part import run_damages
from tests.torture.kill_part import run_kills
from tests.torture.results import Result

_IN_30_MINUTES = {
    "damages": 10_000,
    "one writer": 500,
    "three writers": 320,
    "stages": 160,
    "commands": 20,
    "concurrent builds": 40,
}
"""How much of everything there is on two cores: damages, kills and builds."""
_SHOWN_FAILURES = 20


def main() -> int:
    """Run the torture and return its exit code."""
    options = _parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whoever ends this ends its children too
    print(f"seed {options.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    sound = options.sound or folder / "sound"
    results = list(_results(options, sound, folder))
    for result in results:
        print(f"\n{result.part}: {result.num_cases} in {result.wall_s:.0f} s")
        print("\n".join(result.table))
    for result in results:
        _print_failures(result, options.seed, sound)
    failed = any(result.failures for result in results)
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="about how long, on two cores (default: 30)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="default: any")
    parser.add_argument("--part", choices=tuple(_IN_30_MINUTES), help="run one part alone")
    parser.add_argument("--case", metavar="PART:NUMBER", help="run one case alone, for example damages:123")
    parser.add_argument("--sound", type=Path, help="folder of the sound store; made there if it is empty")
    parser.add_argument("--processes", type=int, default=2, help="for damages (default: 2)")
    return parser.parse_args()


def _results(options: argparse.Namespace, sound: Path, folder: Path) -> Iterator[Result]:
    part, _, number = (options.case or f"{options.part or ''}:").partition(":")
    amounts = {
        name: max(part != "", round(amount * options.minutes / 30))
        for name, amount in _IN_30_MINUTES.items()
        if part in ("", name)
    }
    num_damages = amounts.pop("damages", 0)
    if num_damages:
        cases = [int(number)] if number else range(num_damages)
        yield run_damages(cases, options.seed, sound, folder, min(options.processes, len(cases)))
    if amounts:
        yield run_kills(amounts, options.seed, folder, (part, int(number)) if number else None)


def _print_failures(result: Result, seed: int, sound: Path) -> None:
    if not result.failures:
        return
    print(f"\n{result.part}: {len(result.failures)} cases failed; the first {_SHOWN_FAILURES}, one alone with")
    print(f"  {sys.executable} -m tests.torture --seed {seed} --sound {sound} --case '{result.failures[0][0]}'")
    for case, text in result.failures[:_SHOWN_FAILURES]:
        print(f"{case:<16}  {text}")


if __name__ == "__main__":
    sys.exit(main())
