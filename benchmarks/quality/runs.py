"""Train and measure what is not done yet; every policy is one line of a file, so a killed run goes on where it stopped."""

import json
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from benchmarks.quality.methods import FAMILIES, Family, Setting
from benchmarks.quality.scores import PAIRS_PER_STEP, Scorers, Scores, as_pairs, describe, weight_term_ratio
from benchmarks.quality.worlds import World
from pipeline.toy.policies import Enough, train_policy
from pipeline.toy.sampling import measure

Line = dict[str, Any]


class Log:
    """The lines of one world and seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
        if whole != text:
            path.write_text(whole)
        self.lines: list[Line] = [json.loads(line) for line in whole.splitlines()]

    def has(self, **keys: object) -> bool:
        """Return whether a line has these values."""
        return any(all(line.get(key) == value for key, value in keys.items()) for line in self.lines)

    def add(self, **line: object) -> None:
        """Append a line."""
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run_job(
    path: Path, make: Callable[[], World], families: Mapping[str, int], only: Collection[str], seconds: float
) -> str:
    """Run one world and seed in a process of its own, and return its name; of the families only some, if `only` names any."""
    settle_process()
    wanted = {name: number for name, number in families.items() if not only or name in only}
    run_world(make, Log(path), wanted, time.monotonic() + seconds)
    return path.stem


def settle_process() -> None:
    """Give a process of the benchmark one thread, and no messages of libraries."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def run_world(make: Callable[[], World], log: Log, families: Mapping[str, int], until: float = float("inf")) -> None:
    """Train families, and of each so many settings, in one world and seed; begin nothing after `until` (`time.monotonic`)."""
    wanted = [
        replace(family, settings=family.settings[: families[family.name]])
        for family in FAMILIES
        if family.name in families
    ]
    if not any(_missing(family, log) for family in wanted):
        return
    world = make()
    has = {
        "": True,
        "other": bool(world.other),
        "prompts": world.behind is not None,
        "scorer": world.scorer is not None,
    }
    scorers = Scorers(world)
    if not log.has(kind="start"):
        log.add(kind="start", **measured(world, world.base.plain, 0))
    for family in wanted:
        if has[family.needs] and time.monotonic() < until:
            _run_family(world, scorers, family, log, until)


def _missing(family: Family, log: Log) -> list[Setting]:
    return [
        setting for setting in family.settings if not log.has(kind="policy", family=family.name, setting=setting.name)
    ]


def _run_family(world: World, scorers: Scorers, family: Family, log: Log, until: float) -> None:
    missing = _missing(family, log)
    if not missing:
        return
    scores = family.scores(scorers) if family.scores else None
    if scores is not None and not log.has(kind="scores", family=family.name):
        weights = family.settings[0].weights
        ratio = weight_term_ratio(world.base, world.rows, weights(scores)) if weights else 0.0
        log.add(
            kind="scores",
            family=family.name,
            in_sample=family.in_sample,
            weight_term_ratio=ratio,
            **describe(world, scores),
        )
    for setting in missing:
        if time.monotonic() < until:
            log.add(
                kind="policy", family=family.name, setting=setting.name, **_trained(world, scorers, setting, scores)
            )


def _trained(world: World, scorers: Scorers, setting: Setting, scores: Scores | None) -> Line:
    """Train one policy, and return its points and seconds."""
    started, points = time.monotonic(), list[Line]()

    def look(step: int, model: nn.Module) -> None:
        points.append(measured(world, world.base.plain_copy(model), step))
        if points[-1]["kl"] >= world.kls[-1]:
            raise Enough

    train_setting(scorers, setting, scores, world.steps, look)
    return {"points": points, "wall_s": round(time.monotonic() - started, 1)}


def train_setting(
    scorers: Scorers,
    setting: Setting,
    scores: Scores | None,
    steps: Sequence[int],
    look: Callable[[int, nn.Module], None],
) -> None:
    """Train a policy of a setting as far as the last of `steps`, and look at it after each of them."""
    world = scorers.world
    weights = setting.weights(scores) if setting.weights and scores is not None else None
    optim = {
        "learning_rate": setting.rate * world.learning_rate,
        "max_steps": steps[-1],
        "pairs_per_step": PAIRS_PER_STEP,
    }
    if setting.loss["name"] == "grpo":
        from benchmarks.quality.grpo import train_grpo  # it takes seconds, and only one family needs it

        train_grpo(world, setting.loss["beta"], optim, steps=steps, look=look)
        return
    pairs = as_pairs(world.rows, scorers.ref_logps, weights)
    if setting.pairs is not None:
        pairs = setting.pairs(scorers, pairs)
    train_policy(world.base, pairs, setting.loss, optim, steps=steps, look=look, recipe=setting.recipe)


def measured(world: World, model: nn.Module, step: int) -> Line:
    """Return the `Point` of a model with the forward pass of transformers, over the prompts of its world."""
    next_rewards = world.rewards.behind(world.prompts, world.base.device)
    return measure(world.base, model, world.prompts, next_rewards, num_new=world.num_new, step=step)._asdict()
