"""The demo's last step: three policies on the pairs of a published weight dataset, compared by true reward at equal KL.

`flows/demo.py` starts it as `python -P -m pipeline.toy.compare STORE NAME@VERSION MODEL OUTPUT`. The policies
differ in the weights alone: 1 (plain DPO), those that were published, and *oracle weights*, made of the true token rewards by
TIS-DPO's formula. After equal numbers of steps larger weights have led further away from the starting model, so rewards are
compared at equal KL to it.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from pipeline.toy.language import DEMO_LANGUAGE
from pipeline.toy.policies import Base, Enough, train_policy, weights_of_side
from pipeline.toy.policy_table import DPO, KLS, ORACLE, PUBLISHED, SETTINGS
from pipeline.toy.sampling import measure
from pipeline.toy.world import Rewards, SpokenLanguage
from train.config import DataConfig
from train.data.dataset import PairDataset, open_weights
from train.data.stored_pairs import Pair
from weights_store.location import write_whole
from weights_store.messages import logger
from weights_store.processes.process import run_main
from weights_store.schemas import SIDES

_log = logger(__name__)


def compare(store: str, weights: str, model: Path) -> dict[str, list[dict[str, float]]]:
    """Train and measure; return the points of each policy by its name, the starting model first.

    A point has the true reward, its standard error and the KL to the starting model in nats, means over sampled responses.

    Raises:
        NotFoundError: There is no such weight dataset.
    """
    base = Base(model)
    vocab_size = base.plain.config.vocab_size
    spoken = SpokenLanguage(DEMO_LANGUAGE, model, vocab_size)
    config = DataConfig(store=store, weights=weights)
    dataset = PairDataset(open_weights(config), config, vocab_size=vocab_size)
    pairs = [dataset[row] for row in range(len(dataset))]
    prompts = spoken.prompts * (SETTINGS["num_samples"] // len(spoken.prompts))
    next_rewards = spoken.rewards.behind(prompts, base.device)

    def point(policy: Any, step: int) -> dict[str, float]:
        num_new = SETTINGS["max_new_tokens"]
        return measure(base, policy, prompts, next_rewards, num_new=num_new, step=step)._asdict()

    start = point(base.plain, 0)
    found = {}
    for name, of_policy in ((DPO, pairs), (PUBLISHED, pairs), (ORACLE, with_oracle_weights(pairs, spoken.rewards))):
        loss = {"name": "dpo" if name == DPO else "tis_dpo", "beta": SETTINGS["beta"][name]}
        found[name] = [start, *_trained(base, of_policy, loss, point)]
        last = found[name][-1]
        _log.info(f"{name}: true reward {last['reward']:.2f} at a KL of {last['kl']:.2f} nats")
    return found


def with_oracle_weights(pairs: list[Pair], rewards: Rewards) -> list[Pair]:
    """Return pairs with the weights of TIS-DPO's formula, as the paper sets it, for their true token rewards."""
    sides = [
        weights_of_side(side, [rewards.of(pair.prompt_ids, getattr(pair, side).ids) for pair in pairs])
        for side in SIDES  # chosen, rejected
    ]
    return [pair.with_weights(*weights) for pair, *weights in zip(pairs, *sides, strict=True)]


def _trained(
    base: Base, pairs: list[Pair], loss: dict[str, object], point: Callable[[Any, int], dict[str, float]]
) -> list[dict[str, float]]:
    points: list[dict[str, float]] = []

    def look(step: int, model: nn.Module) -> None:
        points.append(point(base.plain_copy(model), step))
        if points[-1]["kl"] > KLS[-1]:
            raise Enough

    steps = SETTINGS["steps"]
    optim = {key: SETTINGS[key] for key in ("learning_rate", "pairs_per_step")} | {"max_steps": steps[-1]}
    train_policy(base, pairs, loss, optim, steps=steps, look=look)
    return points


def main() -> None:
    """Compare, and write the points to a file."""
    # With so small a model more threads mostly wait for each other, and far longer on a busy machine.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of trainers that save nothing
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store, weights, model, output = sys.argv[1:]
    write_whole(Path(output), json.dumps({"settings": SETTINGS, "policies": compare(store, weights, Path(model))}))


if __name__ == "__main__":
    sys.exit(run_main(main))
