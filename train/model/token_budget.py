"""Cut items into micro-batches by a token budget, for the trainer and for stages that run a model; find a trainer's budget.

It is what the config says, or as many tokens as the memory of a device holds, found by measuring.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from train.config import FIRST_TOKENS
from train.model.foreign import is_out_of_memory
from train.model.policy import enable_checkpointing
from weights_store.errors import SettingsError
from weights_store.messages import logger

_log = logger(__name__)
Item = TypeVar("Item")
_Result = TypeVar("_Result")

MOST_TOKENS = 65_536
"""More at a time save nothing."""
_SHARE = 0.8
"""Of the memory that is left, so much is planned for: the sizes of the next pairs are not known."""
_FROM_STEP = 1
"""The first step in which the optimizer has its state, counted from 0."""


def cut_by_tokens(items: Sequence[Item], sizes: Sequence[int], tokens_per_batch: int) -> list[list[Item]]:
    """Return the items in batches of at most `tokens_per_batch` tokens, the longest first; a longer item gets its own batch.

    Items of similar length end up together, which keeps padding small. `sizes` are the tokens of each item.
    """
    longest_first = sorted(range(len(items)), key=lambda index: sizes[index], reverse=True)
    batches: list[list[Item]] = []
    left = 0
    for index in longest_first:
        if not batches or sizes[index] > left:
            batches.append([])
            left = tokens_per_batch
        batches[-1].append(items[index])
        left -= sizes[index]
    return batches


class TokenBudget:
    """Tokens of a micro-batch on one device.

    Args:
        tokens: What the config says; None to measure, on GPUs.
        device: Where the model is.
        measures: Whether it may. Not with several processes, where one that runs out of memory ends the training.
    """

    def __init__(self, tokens: int | None, device: torch.device, *, measures: bool = True) -> None:
        self.tokens = tokens or FIRST_TOKENS
        self._device = device
        self._is_free = tokens is None and measures and device.type == "cuda"
        self._num_steps = 0

    def begin_step(self) -> None:
        """Forget the peak of memory before a step."""
        if self._is_free:
            torch.cuda.reset_peak_memory_stats(self._device)

    def end_step(self, num_tokens: int) -> None:
        """Size the micro-batches to come by what the largest one of this step took; it had `num_tokens` tokens.

        Called before the optimizer: gradients are in memory, and what the backward pass needed is not.
        """
        if self._is_free and self._num_steps == _FROM_STEP:
            kept, peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
            free, _ = torch.cuda.mem_get_info(self._device)
            reach = free + torch.cuda.memory_reserved(self._device)  # of all that others leave us
            self.tokens = fitting_tokens(num_tokens, kept, peak, reach)
            _log.info(
                f"micro-batches of up to {self.tokens:,} tokens: {num_tokens:,} took {(peak - kept) / 2**30:.1f} GiB beside "
                f"{kept / 2**30:.1f} GiB that stay, of {reach / 2**30:.0f} GiB"
            )
            self._is_free = False
        self._num_steps += 1

    def shrink(self, num_tokens: int) -> None:
        """Halve the budget after a micro-batch of so many tokens did not fit; it is not measured again."""
        self.tokens = max(1, min(self.tokens, num_tokens) // 2)
        self._is_free = False
        _log.info(f"out of memory: micro-batches of up to {self.tokens:,} tokens from here on")

    def within(self, compute: Callable[[], _Result], *, can_shrink: bool) -> _Result:
        """Return what `compute` does, which has no effects and cuts by this budget; halve that as long as memory is short."""
        while True:
            try:
                return compute()
            except (MemoryError, RuntimeError) as error:
                if not can_shrink or self.tokens == 1 or not is_out_of_memory(error):
                    raise
            self.shrink(self.tokens)
            empty_cache()


def empty_cache() -> None:
    """Give memory that no tensor needs back to the GPU, where it may be in pieces."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting_tokens(num_tokens: int, kept_bytes: int, peak_bytes: int, all_bytes: int) -> int:
    """Return how many tokens fit, if `num_tokens` raised the memory in use from `kept_bytes` to `peak_bytes`."""
    per_token = max(1.0, (peak_bytes - kept_bytes) / num_tokens)
    return max(1, min(MOST_TOKENS, int(_SHARE * (all_bytes - kept_bytes) / per_token)))


def save_memory(model: torch.nn.Module, num_tokens: int, error: BaseException) -> None:
    """Switch gradient checkpointing on, because a single pair of `num_tokens` tokens does not fit without.

    Raises:
        SettingsError: It is on already, or the model cannot do it.
    """
    if not enable_checkpointing(model):
        raise SettingsError(
            f"a pair of {num_tokens:,} tokens does not fit into memory, computed alone and with gradient checkpointing: train "
            "with [lora], build the dataset with smaller dataset.max_prompt_tokens and dataset.max_response_tokens, or use a "
            f"device with more memory ({str(error).splitlines()[0]})"
        ) from error
    _log.info(
        f"a pair of {num_tokens:,} tokens does not fit into memory: computing layers again (gradient checkpointing)"
    )
