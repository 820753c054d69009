"""vLLM behind one contract: token ids in, one log-probability per response token out. The only file that imports vLLM.

Uses `prompt_logprobs=0` with flat log-probs, looked up by token id: entry order has changed between vLLM versions. Chosen and
rejected of a pair share the prompt's KV blocks through the prefix cache. A cache hit that reaches into the response leaves
rows unwritten (random numbers, wrong ids), so such a row is scored again without the cache.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weights_store.errors import InputError, MissingExtraError, ScoringError

_ROUNDING_NATS = 1e-3
"""Log-probs above 0 by less than this are rounding of log-softmax and become 0; anything above is an error."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine runs. Only `dtype` changes numbers."""

    dtype: str = "auto"
    batch_tokens: int = 8192
    kv_cache_gib: float = 2.0
    gpu_memory_share: float = 0.85
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """One response behind its prompt, as ids."""

    prompt_ids: list[int]
    response_ids: list[int]


class VllmEngine:
    """One loaded model.

    Raises:
        InputError: vLLM cannot load the model.
    """

    def __init__(self, model: Path, settings: EngineSettings) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # we are a process of our own already
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(settings.kv_cache_gib))))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        try:
            from vllm.platforms import current_platform

            on_cpu = current_platform.is_cpu()
            if on_cpu:  # else a helper of vLLM's is compiled, which needs g++ on the machine and changes no number
                os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"scoring needs the package {error.name!r}, which is not installed; pip install 'tokenweights[score]' (GPU) or "
                "'tokenweights[score-cpu]'"
            ) from error

        placement: dict[str, Any] = (
            {"block_size": 32} if on_cpu else {"gpu_memory_utilization": settings.gpu_memory_share}
        )
        try:
            self._llm = LLM(
                model=str(model),
                dtype=settings.dtype,
                max_num_batched_tokens=settings.batch_tokens,
                tensor_parallel_size=settings.tensor_parallel,
                enable_prefix_caching=True,
                enforce_eager=True,  # compiling costs more than it saves on prefill alone
                disable_log_stats=True,
                seed=0,
                **placement,
            )
        except (ValueError, OSError) as error:
            raise InputError(f"vLLM cannot load the model {model}: {str(error).strip().splitlines()[0]}") from error
        self.max_tokens: int = self._llm.llm_engine.model_config.max_model_len - 1
        """Longest prompt + response that can be scored: the engine needs one free position."""
        self.vocab_size: int = self._llm.llm_engine.model_config.get_vocab_size()

    def score(self, sequences: Sequence[ScoredSequence]) -> list[np.ndarray | ScoringError]:
        """Return for each sequence log pi(y_t | x, y_<t) of its response tokens, float32 `[len(response)]` nats.

        A sequence whose reply breaks the contract has a `ScoringError` in its place; it never shifts its neighbours.
        """
        replies = self._generate(sequences, use_cache=True)
        again = [
            index
            for index, (reply, sequence) in enumerate(zip(replies, sequences, strict=True))
            if (reply.num_cached_tokens or 0) > len(sequence.prompt_ids) - 1
        ]
        for index, reply in zip(again, self._generate([sequences[i] for i in again], use_cache=False), strict=True):
            replies[index] = reply
        return [_read_reply(reply, sequence) for reply, sequence in zip(replies, sequences, strict=True)]

    def _generate(self, sequences: Sequence[ScoredSequence], use_cache: bool) -> list[Any]:
        if not sequences:
            return []
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=not use_cache,
        )
        prompts = [TokensPrompt(prompt_token_ids=s.prompt_ids + s.response_ids) for s in sequences]
        return list(self._llm.generate(prompts, params, use_tqdm=False))


def _read_reply(reply: Any, sequence: ScoredSequence) -> np.ndarray | ScoringError:
    """Return the response's log-probs out of one engine reply, or what is wrong with it."""
    flat = reply.prompt_logprobs
    num_prompt, num_response = len(sequence.prompt_ids), len(sequence.response_ids)
    if flat is None or len(flat) != num_prompt + num_response:
        got = "none" if flat is None else str(len(flat))
        return ScoringError(f"expected log-probs for {num_prompt + num_response} tokens, got {got}")
    logps = np.empty(num_response, dtype=np.float32)
    starts, ends = flat.start_indices, flat.end_indices
    for row, token_id in enumerate(sequence.response_ids):
        position = num_prompt + row
        entries = flat.token_ids[starts[position] : ends[position]]
        if token_id not in entries:
            return ScoringError(f"response token {row}: id {token_id} is missing from the reply, which has {entries}")
        logps[row] = flat.logprobs[starts[position] + entries.index(token_id)]
    if not np.isfinite(logps).all():
        row = int(np.flatnonzero(~np.isfinite(logps))[0])
        return ScoringError(f"response token {row}: log-prob is {logps[row]}, expected a finite number")
    if (logps > _ROUNDING_NATS).any():
        row = int(np.argmax(logps))
        return ScoringError(f"response token {row}: log-prob is {logps[row]}, expected at most 0")
    return np.minimum(logps, 0.0)
