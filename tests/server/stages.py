"""When a stage of a run begins and ends, by what the run prints."""

from itertools import pairwise
from typing import Final, Protocol

from tests.server.stack import wait_until

ENDED_BEFORE: Final = {
    "prepare": ("find model", 1),
    "score": ("prepare toy", 1),
    "contrast": ("publish toy/uniform", 1),
    "attribute": ("score", 2),
    "anchors": ("attribute max_logit", 1),
    "publish": ("anchors", 1),
    "report": ("publish toy/all", 1),
}
"""For every stage the task that ends when it begins, and how many runs of it do until then."""
_LAST = ("report toy/all", 1)


class Prints(Protocol):
    """A run whose output can be read."""

    def printed(self) -> str:
        """Return what it has printed until now."""


def wait_for_stage(run: Prints, stage: str) -> None:
    """Wait until a stage begins."""
    wait_until(
        lambda: _has_ended(run, ENDED_BEFORE[stage]), f"begin of {stage}:\n{run.printed()[-3000:]}", every_s=0.01
    )


def has_ended(run: Prints, stage: str) -> bool:
    """Return whether a stage has come to its end."""
    following = dict(pairwise(ENDED_BEFORE)).get(stage)
    return _has_ended(run, ENDED_BEFORE[following] if following else _LAST)


def _has_ended(run: Prints, ended: tuple[str, int]) -> bool:
    task, number = ended
    return run.printed().count(f"Task run '{task}' - Finished in state Completed") >= number
