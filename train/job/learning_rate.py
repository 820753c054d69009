"""The learning rate over a training: a linear warm-up, then `optim.schedule`."""

import math
from typing import Literal

Schedule = Literal["linear", "constant", "cosine"]


def learning_rate_share(step: int, schedule: Schedule, *, num_warmup: int, num_steps: int) -> float:
    """Return the learning rate of a step as a share of its peak, 0 to 1.

    As in transformers, except for the warm-up: there the first step has a learning rate of 0 and so changes nothing.

    Args:
        step: The first one is 0.
        schedule: After the warm-up; `linear` and `cosine` fall to 0 after the last step.
        num_warmup: Steps of the warm-up; the last one has the peak.
        num_steps: Of the whole training.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    if schedule == "linear":
        return max(0.0, 1 - done)
    return 1.0 if schedule == "constant" else max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
