"""Log-probs of response tokens alone, computed inside vLLM's V1 workers. Loaded by vLLM through `worker_extension_cls`.

V1's own prompt log-probs run the lm_head, a log-softmax, a top-k and a rank over every row of the prompt too, and turn each
into Python objects. On V2 a request names the ids and the first row; this brings the same to V1. The hook replaces one method
of the runner. `VllmEngine` compares it with vLLM's own log-probs when an engine starts, and does not use it if they differ.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

KEY = "tokenweights"
"""In `SamplingParams.extra_args`: `[key, first_row, top_k]`, the key of the answer, the row that predicts the first wanted
token, and how many of the most likely ids are wanted at each position."""

Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Log-probs of the wanted tokens, float32 `[N]`; the most likely ids, int32 `[N, k]`, and their log-probs, float32 `[N, k]`."""

CPU_BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 256 << 20
"""Of float32 log-probs computed at a time: they fit into a core's cache, or into a GPU's spare memory."""


class ResponseRows:
    """Methods that vLLM adds to its worker; called by `collective_rpc`."""

    model_runner: Any
    reload_weights: Callable[..., None]

    def tokenweights_load(self, model: str) -> None:
        """Exchange the weights for those of another folder with the same config and the same tensors."""
        self.reload_weights(weights_path=model)
        for name, head in self.model_runner.model.named_modules():
            # vLLM 0.32 leaves out an lm_head that is tied to the embeddings. On a GPU it is the same memory. On a CPU it is a
            # packed copy, which still holds the weights of the model before.
            if name.rpartition(".")[2] == "lm_head" and hasattr(head, "quant_method"):
                head.quant_method.process_weights_after_loading(head)

    def tokenweights_install(self) -> None:
        """Make the runner answer requests that carry `KEY`."""
        runner = self.model_runner
        own = runner._get_prompt_logprobs_dict
        answers: dict[int, Answer] = {}
        failures: list[Exception] = []

        def with_response_rows(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> object:
            try:
                _score_step(runner, hidden_states, num_scheduled_tokens, answers)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                # Not the runner that we know. The engine goes on, and `tokenweights_take` raises the error.
                failures.append(error)
            return own(hidden_states, num_scheduled_tokens)

        runner._get_prompt_logprobs_dict = with_response_rows
        runner.tokenweights_answers, runner.tokenweights_failures = answers, failures

    def tokenweights_take(self, keys: list[int]) -> dict[int, tuple[np.ndarray, ...]]:
        """Return and forget the answers of finished requests by their key, see `Answer`; NaN where no row was computed.

        Raises:
            Exception: A step failed.
        """
        answers, failures = self.model_runner.tokenweights_answers, self.model_runner.tokenweights_failures
        if failures:
            raise failures[0]
        taken = {key: answers.pop(key) for key in keys if key in answers}
        return {key: tuple(values.cpu().numpy() for values in answer) for key, answer in taken.items()}


def _score_step(runner: Any, hidden: torch.Tensor, num_scheduled: dict[str, int], answers: dict[int, Answer]) -> None:
    """Fill in the rows of this engine step. `hidden` is `[tokens, width]`, all requests concatenated."""
    rows: list[torch.Tensor] = []
    targets: list[int] = []
    places: list[tuple[torch.Tensor, ...]] = []
    for request_id, num_tokens in num_scheduled.items():
        request = runner.requests[request_id]
        asked = request.sampling_params and (request.sampling_params.extra_args or {}).get(KEY)
        if not asked:
            continue
        key, first_row, top_k = asked
        ids, done = request.prompt_token_ids, request.num_computed_tokens
        low, high = max(first_row, done), min(done + num_tokens, len(ids) - 1)
        if low >= high:
            continue
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - done
        rows.append(torch.arange(offset + low, offset + high))
        targets += ids[low + 1 : high + 1]
        if key not in answers:
            answers[key] = _unwritten(len(ids) - 1 - first_row, top_k, hidden.device)
        places.append(tuple(values[low - first_row : high - first_row] for values in answers[key]))
    if not places:
        return
    top_k = max(ids.shape[1] for _, ids, _ in places)
    where = torch.cat(rows).to(hidden.device), torch.tensor(targets).to(hidden.device)
    answer = _score_rows(runner.model.compute_logits, hidden, *where, top_k)
    sizes = [len(logps) for logps, _, _ in places]
    for place, parts in zip(places, zip(*(values.split(sizes) for values in answer), strict=True), strict=True):
        for values, part in zip(place, parts, strict=True):
            values.copy_(part[..., : values.shape[-1]])  # a shorter list is the beginning of a longer one


def _unwritten(num_rows: int, top_k: int, device: torch.device) -> Answer:
    return (
        torch.full((num_rows,), float("nan"), device=device),
        torch.full((num_rows, top_k), -1, dtype=torch.int32, device=device),
        torch.full((num_rows, top_k), float("nan"), device=device),
    )


def _score_rows(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    top_k: int,
) -> Answer:
    """Return log softmax(lm_head(hidden[rows])) at the targets and at its `top_k` largest, without a `[rows, vocabulary]`.

    Both are read from the same numbers, a block at a time, so a target among the most likely has one log-prob.
    """
    logps, top_ids, top_logps = answer = _unwritten(len(rows), top_k, hidden.device)
    start, size = 0, 32
    while start < len(rows):
        block = slice(start, start + size)
        logits = lm_head(hidden[rows[block]])
        all_logps = logits.log_softmax(-1, dtype=torch.float32)
        logps[block] = all_logps.gather(-1, targets[block, None]).squeeze(-1)
        if top_k:
            top_logps[block], top_ids[block] = all_logps.topk(top_k)
        start += size
        size = max(32, (CPU_BLOCK_BYTES if hidden.device.type == "cpu" else GPU_BLOCK_BYTES) // (4 * logits.shape[-1]))
    return answer
