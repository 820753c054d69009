"""The three policies of the demo: how they are trained, and the table that compares them by true reward at equal KL.

`compare.py` trains them in a process of its own; nothing here needs torch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Points = Sequence[Mapping[str, float]]
"""A policy during its training, the starting model first: `reward`, `reward_se` and `kl`, means over sampled responses."""
DPO, PUBLISHED, ORACLE = "DPO", "published weights", "oracle weights"
SETTINGS: dict[str, Any] = {
    "beta": {DPO: 0.1, PUBLISHED: 0.3, ORACLE: 0.3},
    "learning_rate": 1.5e-4,
    "pairs_per_step": 32,
    "steps": [6, 13, 20, 30, 44, 60],
    "num_samples": 1000,
    "max_new_tokens": 48,
}
"""Of all three policies, which are measured after each of `steps`, on `num_samples` sampled responses. Each has the beta that
suits it best, see docs/quality.md: DPO was tried with betas from 0.03 to 1 and with half and twice the learning rate.
"""
KLS = (1.0, 2.0)
"""At which policies are compared, nats; a training ends when it has passed the last."""


def reward_at_kl(points: Points, kl: float) -> float:
    """Return the reward at a KL, linear in sqrt(KL) between the points of a training; nan beyond the last.

    A small step away from a model costs KL by its square, so rewards grow about like sqrt(KL).
    """
    found = sorted((point["kl"], point["reward"]) for point in points)
    kls, rewards = (np.array(values) for values in zip(*found, strict=True))
    return float(np.interp(math.sqrt(kl), np.sqrt(np.maximum(kls, 0)), rewards)) if kl <= kls[-1] else math.nan


def policy_lines(policies: Mapping[str, Points]) -> list[str]:
    """Return the table of policies: true rewards at KLs that all of them reach, and where their trainings ended."""
    furthest = min(max(point["kl"] for point in points) for points in policies.values())
    kls = [kl for kl in KLS if kl <= furthest] or [furthest]
    start = next(iter(policies.values()))[0]
    width = max(map(len, policies))
    error = max(point["reward_se"] for points in policies.values() for point in points)
    columns = "".join(f"{f'KL {kl:.3g}':>9}" for kl in kls)
    lines = [
        f"  true reward of a response (± {error:.2f}) at equal KL to the starting model, whose reward is "
        f"{start['reward']:.2f}:",
        f"  {'':<{width}}{columns}   at the end of its training",
    ]
    for name, points in policies.items():
        rewards = "".join(f"{reward_at_kl(points, kl):>9.2f}" for kl in kls)
        lines.append(f"  {name:<{width}}{rewards}   {points[-1]['reward']:.2f} at a KL of {points[-1]['kl']:.2f} nats")
    dpo, weights, oracle = ([reward_at_kl(policies[name], kl) for kl in kls] for name in (DPO, PUBLISHED, ORACLE))
    closed = [100 * (w - d) / (o - d) for d, w, o in zip(dpo, weights, oracle, strict=True)]
    shares = " and ".join(f"{share:.0f} %" for share in closed)
    betas = f"β is {SETTINGS['beta'][DPO]} for {DPO} and {SETTINGS['beta'][PUBLISHED]} with weights"
    lines.append(f"  so the {PUBLISHED} close {shares} of the gap from {DPO} to {ORACLE} (one run; {betas})")
    return lines
