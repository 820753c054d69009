"""A close look at a few families: what the papers plot, beside reward at equal KL.

The rewards of chosen and rejected responses during a training, and how often the policy's response beats DPO's by the true
reward, by sampling temperature. A family's first setting is trained once more for it. The lines go into the files of the other
runs.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks.quality.methods import DPO, FAMILIES, ORACLE
from benchmarks.quality.runs import Line, Log, measured, settle_process, train_setting
from benchmarks.quality.scores import Scorers, logps_of, sequences
from benchmarks.quality.summary import interval
from benchmarks.quality.worlds import Row, World
from pipeline.toy.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES_SHOWN = (DPO, ORACLE, "head", "TIS-DPO (D), paper", "head on other pairs")
TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.25)
NUM_STEPS, NUM_PAIRS, NUM_RESPONSES = 8, 256, 512


def run_job(path: Path, make: Callable[[], World]) -> str:
    """Look at the families of one world and seed in a process of its own, and return its name."""
    settle_process()
    run_close_looks(make, Log(path))
    return f"{path.stem}, close look"


def run_close_looks(make: Callable[[], World], log: Log) -> None:
    """Look at every family that was not looked at in this world and seed; DPO first, since the others are compared with it."""
    families = [family for name in FAMILIES_SHOWN for family in FAMILIES if family.name == name]
    if all(log.has(kind="close_look", family=family.name) for family in families):
        return
    world = make()
    scorers = Scorers(world)
    for index, family in enumerate(families):
        if log.has(kind="close_look", family=family.name):
            continue
        started, setting = time.monotonic(), family.settings[0]
        look = CloseLook(scorers, beta=float(str(setting.loss["beta"])))
        scores = family.scores(scorers) if family.scores else None
        train_setting(scorers, setting, scores, steps_of(world), look)
        line: Line = {"setting": setting.name, "beta": look.beta, "points": look.points}
        if look.at_middle is not None:
            # Seeds of their own: with the same noise, two policies that are alike would write the same responses.
            line |= _sampled(world, look.at_middle, seed=100 * index)
            if family.name != DPO:
                line |= _contest(line.pop("rewards"), log)
        line["wall_s"] = round(time.monotonic() - started, 1)
        log.add(kind="close_look", family=family.name, **line)


def steps_of(world: World) -> list[int]:
    """Return the steps of a close look, denser at first, where rewards change most."""
    return [
        *dict.fromkeys(np.geomspace(world.steps[0] / 2, 0.75 * world.steps[-1], NUM_STEPS).round().astype(int).tolist())
    ]


class CloseLook:
    """What is seen of a policy while it is trained: call it after a step.

    Attributes:
        points: Of each step the KL in nats, and the mean implicit rewards, beta (log pi - log ref), of chosen and rejected
            responses, on pairs of the training and on others. The first one is the starting model, whose rewards are 0.
        at_middle: The policy at the middle KL of its world, None until it has come so far. Its parameters lie between those of
            the measured steps before and after, where sqrt(KL) is that KL's: a step alone may miss it by a factor of two.
    """

    def __init__(self, scorers: Scorers, beta: float) -> None:
        self.beta, self.points = beta, list[Line]()
        self.at_middle: PreTrainedModel | None = None
        self._world = _small(scorers.world)
        base, num = self._world.base, min(NUM_PAIRS, len(self._world.rows))
        self._pairs: dict[str, tuple[list[Row], list[np.ndarray]]] = {
            "train": (self._world.rows[:num], scorers.ref_logps[: 2 * num])
        }
        others = self._world.other[:NUM_PAIRS]
        self._pairs["unseen"] = others, logps_of(base, base.plain, *sequences(others))
        self._before = base.plain
        self(0, base.plain)

    def __call__(self, step: int, model: nn.Module) -> None:
        """Measure the policy."""
        plain = self._world.base.plain_copy(model)
        point = {"step": step, "kl": measured(self._world, plain, step)["kl"]}
        for name, (rows, ref_logps) in self._pairs.items():
            logps = logps_of(self._world.base, plain, *sequences(rows))
            rewards = [
                self.beta * float((of_policy - of_ref).sum())
                for of_policy, of_ref in zip(logps, ref_logps, strict=True)
            ]
            point[name] = [round(float(np.mean(rewards[side::2])), 4) for side in range(2)]
        self.points.append(point)
        middle = self._world.kls[1]
        if self.at_middle is None and point["kl"] >= middle:
            before, after = (math.sqrt(max(each["kl"], 0.0)) for each in self.points[-2:])
            self.at_middle = _between(self._world, self._before, plain, (math.sqrt(middle) - before) / (after - before))
        self._before = plain


def _small(world: World) -> World:
    return replace(world, prompts=world.prompts[:NUM_RESPONSES])


def _between(world: World, before: nn.Module, after: nn.Module, share: float) -> "PreTrainedModel":
    """Return the policy whose parameters have gone this share of the way."""
    model = world.base.plain_copy(after)
    with torch.no_grad():
        for ours, start in zip(model.parameters(), before.parameters(), strict=True):
            ours.lerp_(start, 1 - share)
    return model


def _sampled(world: World, model: "PreTrainedModel", *, seed: int) -> Line:
    """Return the KL of a policy, and the true rewards of its responses by temperature."""
    small, rewards = _small(world), dict[str, list[float]]()
    for number, temperature in enumerate(TEMPERATURES):
        responses = sample(world.base, model, small.prompts, world.num_new, seed=seed + number, temperature=temperature)
        pairs = zip(small.prompts, responses, strict=True)
        rewards[f"{temperature:g}"] = [round(float(world.rewards.of(*each).sum()), 2) for each in pairs]
    means = {temperature: float(np.mean(values)) for temperature, values in rewards.items()}
    return {"kl": measured(small, model, 0)["kl"], "mean_rewards": means, "rewards": rewards}


def _contest(rewards: dict[str, list[float]], log: Log) -> Line:
    """Return the win rates against DPO by temperature; nothing if DPO's policy has not come to the middle KL."""
    of_dpo = next(line for line in log.lines if line["kind"] == "close_look" and line["family"] == DPO)
    if "rewards" not in of_dpo:
        return {}
    return {"wins": {name: win_rate(values, of_dpo["rewards"][name]) for name, values in rewards.items()}}


def win_rate(rewards: Sequence[float], opponents: Sequence[float]) -> float:
    """Return the share of responses that beat the opponent's response to the same prompt; a tie counts half."""
    margins = np.array(rewards) - np.array(opponents)
    return float(((np.sign(margins) + 1) / 2).mean())


def summarise_close_looks(paths: Sequence[Path]) -> dict[str, Any]:
    """Return means and half widths of 95 % intervals over the seeds of a world, by family; empty without close looks."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for line in (json.loads(text) for path in paths for text in path.read_text().splitlines()):
        if line["kind"] == "close_look":
            lines[line["family"]].append(line)
    return {family: _mean_look(of_family) for family, of_family in lines.items()}


def _mean_look(lines: Sequence[Line]) -> dict[str, Any]:
    rewards = {
        name: {
            side: [
                _rounded_interval([line["points"][step][name][column] for line in lines])
                for step in range(len(lines[0]["points"]))
            ]
            for column, side in enumerate(("chosen", "rejected"))
        }
        for name in ("train", "unseen")
    }
    at_middle = [line for line in lines if "kl" in line]
    return {
        "setting": lines[0]["setting"],
        "beta": lines[0]["beta"],
        "num_seeds": len(lines),
        "steps": [point["step"] for point in lines[0]["points"]],
        "rewards": rewards,
        "kls": [line["kl"] for line in at_middle],
        **{
            name: {
                temperature: _rounded_interval([line[name][temperature] for line in of_name])
                for temperature in of_name[0][name]
            }
            for name in ("mean_rewards", "wins")
            if (of_name := [line for line in at_middle if name in line])
        },
    }


def _rounded_interval(values: Sequence[float]) -> tuple[float, float]:
    mean, half = interval(values)
    return round(mean, 4), round(half, 4)
