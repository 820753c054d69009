"""Log-probs of response tokens alone, computed inside vLLM's workers. Loaded by vLLM through `worker_extension_cls`.

vLLM's own prompt log-probs run the lm_head over every row of the prompt too, and turn each into Python objects. Its V2 runner
can score given ids from a given row on, but runs the lm_head once per request and knows no most likely ids. This scores the
wanted rows of all requests of a step together, on both runners. The hooks wrap one method of the V1 runner, or two of the V2
runner's `PromptLogprobsWorker`. `VllmEngine` compares the result with vLLM's own log-probs when an engine starts, and does not
use it if they differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.engine.request_queue import is_out_of_memory

KEY = "tokenweights"
"""In `SamplingParams.extra_args`: `[key, first_row, top_k]`, the key of the answer, the row that predicts the first wanted
token, and how many of the most likely ids are wanted at each position."""

Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Log-probs of the wanted tokens, float32 `[N]`; the most likely ids, int32 `[N, k]`, and their log-probs, float32 `[N, k]`."""
Answer = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The same for one request, in the engine's process."""

CPU_BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 256 << 20
"""Of float32 log-probs computed at a time: they fit into a core's cache, or into a GPU's spare memory."""
_LEAST_ROWS = 32


@dataclass(frozen=True, slots=True)
class _Part:
    """The wanted rows of one request that one step computes: rows `low` to `high` of its prompt.

    `start` is the place of `low` among the rows of the step. `prompt` is where the runner has the ids: a list, or a row number
    in its table of ids.
    """

    key: int
    first_row: int
    top_k: int
    num_wanted: int
    low: int
    high: int
    start: int
    prompt: Any

    @classmethod
    def of(cls, asked: Sequence[int], num_prompt: int, done: int, num_tokens: int, offset: int, prompt: Any) -> "_Part":
        """Return the part of a request in a step that computes `num_tokens` of its tokens behind the `done` ones.

        Args:
            asked: See `KEY`.
            num_prompt: Number of ids in the whole prompt; its last row predicts none of them.
            done: Tokens that were computed or cached before.
            num_tokens: Tokens of the step.
            offset: Place of the first of them among the rows of the step.
            prompt: See above.
        """
        key, first_row, top_k = asked
        low, high = max(first_row, done), min(done + num_tokens, num_prompt - 1)
        return cls(key, first_row, top_k, num_prompt - 1 - first_row, low, high, offset + low - done, prompt)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The values of one part in the host's memory, valid once the copy from the device is `ready`."""

    part: _Part
    values: tuple[torch.Tensor, ...]
    ready: torch.cuda.Event | None


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
        runner.tokenweights = hook = _Hook(runner)
        worker = getattr(runner, "prompt_logprobs_worker", None)
        if worker is None:
            runner._get_prompt_logprobs_dict = hook.before(runner._get_prompt_logprobs_dict, hook.step_of_v1)
        else:
            worker.add_request = hook.before(worker.add_request, hook.add_to_v2)
            worker.compute_prompt_logprobs = hook.before(worker.compute_prompt_logprobs, hook.step_of_v2)

    def tokenweights_take(self, keys: list[int]) -> dict[int, Answer]:
        """Return and forget the answers of finished requests by their key; NaN where no row was computed.

        Raises:
            Exception: A step failed.
        """
        hook: _Hook = self.model_runner.tokenweights
        if hook.failure is not None:
            raise hook.failure
        return {key: _joined(hook.answers.pop(key)) for key in keys if key in hook.answers}


class _Hook:
    """What is called before the runner's own methods, and the pieces of the answers so far by their key."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._asked: dict[int, Sequence[int] | None] = {}
        self.answers: dict[int, list[_Piece]] = {}
        self.failure: Exception | None = None

    def before(self, own: Callable[..., Any], ours: Callable[..., None]) -> Callable[..., Any]:
        """Return a function that calls `ours` and then `own` with the same arguments; `own` alone after a failure of ours."""

        def both(*arguments: Any, **named: Any) -> Any:
            try:
                if self.failure is None:
                    ours(*arguments, **named)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Not the runner that we know. The engine goes on, and `tokenweights_take` raises the error. Its traceback would
                # keep the hidden states of this step in memory.
                self.failure = error.with_traceback(None)
            return own(*arguments, **named)

        return both

    def step_of_v1(self, hidden: torch.Tensor, num_scheduled: dict[str, int]) -> None:
        """Score the wanted rows of a step. `hidden` is `[tokens, width]`, all requests concatenated."""
        runner, parts = self._runner, list[_Part]()
        for request_id, num_tokens in num_scheduled.items():
            request = runner.requests[request_id]
            if asked := _asked_by(request.sampling_params):
                offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
                ids = request.prompt_token_ids
                parts.append(_Part.of(asked, len(ids), request.num_computed_tokens, num_tokens, offset, ids))
        parts = [part for part in parts if part.low < part.high]
        if parts:
            targets = np.concatenate([part.prompt[part.low + 1 : part.high + 1] for part in parts], dtype=np.int64)
            self._score(hidden, parts, _to(hidden.device, targets))

    def add_to_v2(self, _request_id: str, slot: int, sampling_params: Any) -> None:
        """Remember what is asked of the request in this slot of the runner's tables, until the next one takes the slot."""
        self._asked[slot] = _asked_by(sampling_params)

    def step_of_v2(
        self,
        _lm_head: Any,
        hidden: torch.Tensor,
        batch: Any,
        all_ids: torch.Tensor,
        _num_computed: Any,
        prompt_lens: np.ndarray,
    ) -> None:
        """Score the wanted rows of a step. `hidden` is `[tokens, width]`, `all_ids` `[slots, positions]`."""
        parts: list[_Part] = []
        for place, slot in enumerate(batch.idx_mapping_np.tolist()):
            if asked := self._asked.get(slot):
                done, num_tokens = (
                    int(batch.num_computed_prefill_tokens_np[place]),
                    int(batch.num_scheduled_tokens[place]),
                )
                offset = int(batch.query_start_loc_np[place])
                parts.append(_Part.of(asked, int(prompt_lens[slot]), done, num_tokens, offset, slot))
        parts = [part for part in parts if part.low < part.high]
        if parts:
            slots = np.repeat([part.prompt for part in parts], [part.high - part.low for part in parts])
            positions = np.concatenate([np.arange(part.low + 1, part.high + 1) for part in parts])
            where = _to(hidden.device, np.stack([slots, positions]))
            self._score(hidden, parts, all_ids[where[0], where[1]].long())

    def _score(self, hidden: torch.Tensor, parts: list[_Part], targets: torch.Tensor) -> None:
        """Score all parts of a step in one go, and start to copy the values to the host."""
        model, device = self._runner.model, hidden.device
        rows = np.concatenate([np.arange(part.start, part.start + part.high - part.low) for part in parts])
        block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
        block = max(_LEAST_ROWS, block_bytes // (4 * self._runner.model_config.get_vocab_size()))
        top_k = max(part.top_k for part in parts)
        values = _score_rows(model.compute_logits, hidden, _to(device, rows), targets, top_k, block)
        on_cuda, ready = device.type == "cuda", None
        # To pinned memory, without waiting: the host prepares the next step while this one is computed.
        on_host = [each.to("cpu", non_blocking=on_cuda) for each in values]
        if on_cuda:
            ready = torch.cuda.Event()
            ready.record()
        sizes = [part.high - part.low for part in parts]
        for part, *own in zip(parts, *(each.split(sizes) for each in on_host), strict=True):
            self.answers.setdefault(part.key, []).append(_Piece(part, tuple(own), ready))


def _asked_by(sampling_params: Any) -> Sequence[int] | None:
    return sampling_params and (sampling_params.extra_args or {}).get(KEY)


def _to(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """Return an array on the device. From pinned memory the copy does not wait for the step that the device computes."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _joined(pieces: Sequence[_Piece]) -> Answer:
    size, top_k = pieces[0].part.num_wanted, pieces[0].part.top_k
    answer = (
        np.full(size, np.nan, np.float32),
        np.full((size, top_k), -1, np.int32),
        np.full((size, top_k), np.nan, np.float32),
    )
    for piece in pieces:
        if piece.ready is not None:
            piece.ready.synchronize()
        rows = slice(piece.part.low - piece.part.first_row, piece.part.high - piece.part.first_row)
        for whole, values in zip(answer, piece.values, strict=True):
            whole[rows] = values.numpy()[..., : whole.shape[-1]]  # a shorter list is the beginning of a longer one
    return answer


def _score_rows(
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    top_k: int,
    block_rows: int,
) -> Values:
    """Return log softmax(lm_head(hidden[rows])) at the targets and at its `top_k` largest, without a `[rows, vocabulary]`.

    Both are read from the same numbers, a block at a time, so a target among the most likely has one log-prob.
    """
    num_rows = len(rows)
    logps = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    top_ids = torch.empty((num_rows, top_k), dtype=torch.int32, device=hidden.device)
    top_logps = torch.empty((num_rows, top_k), dtype=torch.float32, device=hidden.device)
    for start in range(0, num_rows, block_rows):
        block = slice(start, start + block_rows)
        all_logps = lm_head(hidden[rows[block]]).log_softmax(-1, dtype=torch.float32)
        logps[block] = all_logps.gather(-1, targets[block, None]).squeeze(-1)
        if top_k:
            top_logps[block], top_ids[block] = all_logps.topk(top_k)
    return logps, top_ids, top_logps
