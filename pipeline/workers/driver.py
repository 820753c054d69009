"""Runs a stage without a model on Ray: in a child process, which is Ray's driver.

A process of its own, as for stages that run a model: Ray puts threads, signal handlers and variables into its driver, and the
process of the flow needs none of its packages then. The child runs the very function of the stage, with Ray as its `Spread`.
"""

import pickle
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pipeline.child import check_extra, run_child, temporary_folder
from pipeline.recipe import ScoreSection
from pipeline.workers.ray_spread import ray_spread
from weights_store.errors import TokenweightsError
from weights_store.processes.process import run_main

_Result = TypeVar("_Result")


def drive(what: str, score: ScoreSection, stage: Callable[..., _Result], *arguments: object) -> _Result:
    """Return what `stage(*arguments, spread)` returns on the Ray that section [score] of a recipe names.

    It runs in this interpreter or, if that has no Ray, in `score.python`. `what` says in messages what the stage does.

    Raises:
        MissingExtraError: Neither has Ray.
        SettingsError: No cluster answers at `score.ray_address`.
        StageError: The child was killed, or Ray failed.
        TokenweightsError: The stage raised it.
    """
    python = None if find_spec("ray") is not None else score.python
    check_extra("ray", python)
    with temporary_folder("driver-") as folder:
        call, reply = folder / "call", folder / "reply"
        call.write_bytes(pickle.dumps((score.ray_address, stage, arguments)))
        run_child("pipeline.workers.driver", [str(call), str(reply)], f"{what} on Ray", python, package="ray")
        result: _Result | TokenweightsError = pickle.loads(reply.read_bytes())
    if isinstance(result, TokenweightsError):
        raise result
    return result


def _main(call: Path, reply: Path) -> None:
    address, stage, arguments = pickle.loads(call.read_bytes())
    result: Any
    try:
        with ray_spread(address) as spread:
            result = stage(*arguments, spread)
    except TokenweightsError as error:  # as itself, which an exit code would not tell
        result = error
    reply.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    sys.exit(run_main(lambda: _main(*map(Path, sys.argv[1:]))))
