"""How many tokens a device computes at a time: what the config says, or as many as its memory holds, found by measuring.

Called by the trainer. Not here: how a step is cut (`train/model/token_budget.py`).
"""

from collections.abc import Iterable

import torch

from train.config import FIRST_TOKENS
from train.model.policy import enable_checkpointing
from weights_store.errors import SettingsError
from weights_store.messages import logger

_log = logger(__name__)

MOST_TOKENS = 65_536
"""More at a time save nothing."""
_SHARE = 0.8
"""Of the memory that is left, so much is planned for: the sizes of the next pairs are not known."""
_FROM_STEP = 1
"""The first step in which the optimizer has its state, counted from 0."""


class TokenBudget:
    """Tokens of a micro-batch on one device.

    Args:
        tokens: What the config says; None to measure, on GPUs.
        device: Where the model is.
    """

    def __init__(self, tokens: int | None, device: torch.device) -> None:
        self.tokens = tokens or FIRST_TOKENS
        self._device = device
        self._is_free = tokens is None and device.type == "cuda"
        self._num_steps = 0
        self._resident = 0

    def begin_step(self) -> None:
        """Note what is in memory before a step."""
        if self._is_free:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._resident = torch.cuda.memory_allocated(self._device)

    def end_step(self, num_tokens: int, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Size the micro-batches to come by what the largest one of this step took; it had `num_tokens` tokens."""
        if self._is_free and self._num_steps == _FROM_STEP:
            peak = torch.cuda.max_memory_allocated(self._device)
            free, _ = torch.cuda.mem_get_info(self._device)
            reach = free + torch.cuda.memory_reserved(self._device)  # of all that others leave us
            kept = self._resident + sum(each.grad.nbytes for each in parameters if each.grad is not None)
            self.tokens = fitting_tokens(num_tokens, kept, peak, reach)
            _log.info(
                f"micro-batches of up to {self.tokens:,} tokens: {num_tokens:,} took {(peak - kept) / 2**30:.1f} GiB beside "
                f"{kept / 2**30:.1f} GiB that stay, of {reach / 2**30:.0f} GiB"
            )
            self._is_free = False
        self._num_steps += 1

    def shrink(self, largest: int) -> None:
        """Halve the budget after a micro-batch of `largest` tokens did not fit; it is not measured again."""
        self.tokens = max(1, min(self.tokens, largest) // 2)
        self._is_free = False


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
