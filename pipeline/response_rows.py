"""Log-probs of response tokens alone, computed inside vLLM's V1 workers. Loaded by vLLM through `worker_extension_cls`.

The V1 runner's own prompt log-probs run the lm_head, a log-softmax, a top-k and a rank over every row of the prompt as well,
and turn each into Python objects. V2 has requests that name the ids and the first row; this brings the same to V1. The hook
is one method of the runner: `engine.py` checks it against vLLM's own log-probs when an engine starts and leaves it alone
where they differ or it is not there.
"""

from typing import Any

import torch

KEY = "tokenweights"
"""In `SamplingParams.extra_args`: `[key, first_row]`, the name to answer under and the row of the first wanted token."""

CPU_BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 256 << 20
"""Of float32 log-probs computed at a time: what stays in a core's cache, and what a GPU has to spare."""


class ResponseRows:
    """Methods that vLLM adds to its worker; called by `collective_rpc`."""

    model_runner: Any

    def tokenweights_install(self) -> None:
        """Make the runner answer requests that carry `KEY`."""
        runner = self.model_runner
        own = runner._get_prompt_logprobs_dict
        answers: dict[int, torch.Tensor] = {}
        failures: list[Exception] = []

        def with_response_rows(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            try:
                _score_step(runner, hidden_states, num_scheduled_tokens, answers)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                # Not the runner that we know. The engine lives on, and `tokenweights_take` says it.
                failures.append(error)
            return own(hidden_states, num_scheduled_tokens)

        runner._get_prompt_logprobs_dict = with_response_rows
        runner.tokenweights_answers, runner.tokenweights_failures = answers, failures

    def tokenweights_take(self) -> dict[int, Any]:
        """Return the answers by their key since the last call: float32 `[num_rows]` in nats, NaN where no row was computed.

        Raises:
            Exception: What went wrong in a step.
        """
        answers, failures = self.model_runner.tokenweights_answers, self.model_runner.tokenweights_failures
        if failures:
            raise failures[0]
        taken = {key: values.cpu().numpy() for key, values in answers.items()}
        answers.clear()
        return taken


def _score_step(
    runner: Any, hidden: torch.Tensor, num_scheduled: dict[str, int], answers: dict[int, torch.Tensor]
) -> None:
    """Fill in the rows of this engine step. `hidden` is `[tokens, width]`, all requests one behind the other."""
    rows: list[torch.Tensor] = []
    targets: list[int] = []
    places: list[torch.Tensor] = []
    for request_id, num_tokens in num_scheduled.items():
        request = runner.requests[request_id]
        asked = request.sampling_params and (request.sampling_params.extra_args or {}).get(KEY)
        if not asked:
            continue
        key, first_row = asked
        ids, done = request.prompt_token_ids, request.num_computed_tokens
        low, high = max(first_row, done), min(done + num_tokens, len(ids) - 1)
        if low >= high:
            continue
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]]) - done
        rows.append(torch.arange(offset + low, offset + high))
        targets += ids[low + 1 : high + 1]
        if key not in answers:
            answers[key] = torch.full((len(ids) - 1 - first_row,), float("nan"), device=hidden.device)
        places.append(answers[key][low - first_row : high - first_row])
    if not places:
        return
    values = _token_logps(
        runner.model, hidden, torch.cat(rows).to(hidden.device), torch.tensor(targets).to(hidden.device)
    )
    for place, part in zip(places, values.split([len(place) for place in places]), strict=True):
        place.copy_(part)


def _token_logps(model: Any, hidden: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log softmax(lm_head(hidden[rows]))[targets], float32 `[len(rows)]`, a block at a time: no `[rows, vocabulary]`."""
    values = torch.empty(len(rows), device=hidden.device)
    start, size = 0, 32
    while start < len(rows):
        block = slice(start, start + size)
        logits = model.compute_logits(hidden[rows[block]])
        logps = logits.log_softmax(-1, dtype=torch.float32)
        values[block] = logps.gather(-1, targets[block, None]).squeeze(-1)
        start += size
        size = max(32, (CPU_BLOCK_BYTES if hidden.device.type == "cpu" else GPU_BLOCK_BYTES) // (4 * logits.shape[-1]))
    return values
