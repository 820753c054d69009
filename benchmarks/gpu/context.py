"""What a part is told, and how it keeps what it has measured: after each measurement, so that a killed part loses little."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    vocabulary: str
    """A key of `train_inputs.VOCABULARIES`."""
    pairs_per_step: int
    pairs_at_once: int
    warm_up: int
    steps: int
    """Steps of a contender that do not count, and that do."""
    larger_model: dict[str, int] | None
    """Of a second training, if the card has 100 GB."""
    long_row: int
    """Tokens of one pair that is trained on alone."""
    score_model: dict[str, int] | None
    """None for the small chat model."""
    amounts: dict[str, int]
    """See `score.AMOUNTS`."""
    parity_sequences: int
    attribute_pairs: int
    naive_pairs: int
    prompts: int
    new_tokens: int


CARD = Sizes(
    vocabulary="128k",
    pairs_per_step=32,
    pairs_at_once=16,
    warm_up=2,
    steps=5,
    larger_model={"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    long_row=65_536,
    score_model={"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28, "num_attention_heads": 16},
    amounts={"hh": 3500, "alpaca": 115, "long": 400},
    parity_sequences=32,
    attribute_pairs=400,
    naive_pairs=12,
    prompts=256,
    new_tokens=128,
)
"""0.8 and 3.3 billion parameters trained, 1.6 scored with, some 5,900 pairs scored."""
QUICK = Sizes(
    vocabulary="8k",
    pairs_per_step=4,
    pairs_at_once=4,
    warm_up=1,
    steps=2,
    larger_model={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    long_row=600,
    score_model=None,
    amounts={"hh": 16, "alpaca": 1, "long": 4},
    parity_sequences=8,
    attribute_pairs=16,
    naive_pairs=2,
    prompts=4,
    new_tokens=8,
)
"""To see that every line runs."""


@dataclass
class Context:
    """One part's view of the run."""

    device: str
    quick: bool
    shared: Path
    work: Path
    out: Path
    deadline: float
    """By `time.time()`, when the part will be killed."""
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else CARD

    @property
    def left_s(self) -> float:
        return self.deadline - time.time()

    def record(self, **results: Any) -> None:
        """Add to the results of this part, and write them."""
        self.found |= results
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.found))
        partial.replace(self.out)

    def attempt(self, name: str, measure: Callable[[Callable[..., None]], None], least_s: float = 0.0) -> None:
        """Call `measure` with a function that records under `name`; record an error too, so that what follows goes on.

        With less than `least_s` seconds left it is not begun.
        """
        started = time.perf_counter()

        def record(**results: Any) -> None:
            self.record(**{name: {**self.found.get(name, {}), **results}})

        if self.left_s < least_s:
            record(error=f"not begun: {self.left_s:.0f} s were left, {least_s:.0f} are needed")
            return
        try:
            measure(record)
            record(took_s=round(time.perf_counter() - started, 1))
        except Exception as error:  # noqa: BLE001 - whatever goes wrong on a card is a result
            record(error=f"{type(error).__name__}: {str(error)[:600]}")
        finally:
            forget_memory()


def forget_memory() -> None:
    """Free what the last measurement left on the card."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for(device: str) -> None:
    """Wait until the card has done what it was asked for."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, run: Callable[[], Any]) -> float:
    """Return the seconds of a call, kernels included."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started
