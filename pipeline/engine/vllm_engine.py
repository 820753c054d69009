"""vLLM behind one contract: token ids in, one log-probability per wanted token out, on request also those of the likeliest ids.

The only file that imports vLLM. It samples as well (`VllmEngine.generate`): the anchors of TI-DPO.

There are three ways in to log-probs, from fast to slow:

* `fixed_ids`: `prompt_logprob_token_ids` and `prompt_logprob_start` of the V2 runner (GPUs). It takes ids that are known
  beforehand, so the likeliest ones are out of its reach;
* `response_rows`: the same on the V1 runner (CPUs, older GPUs) through our worker extension, `response_rows.py`;
* `flat`: vLLM's prompt log-probs, flat, looked up by token id (their order has changed between versions). Works everywhere.

The fast one of the runner at hand is checked against `flat` on the first sequences, and left where they differ or this vLLM
refuses it. Sequences share KV blocks through the prefix cache. A hit that reaches into the wanted rows leaves them unwritten
(random numbers, or no reply at all), so such a sequence is scored again without the cache.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.engine.replies import checked, read_fixed_ids, read_flat, read_rows
from pipeline.engine.score_once import Reply, ScoredSequence, Scores
from weights_store.errors import EngineError, InputError, MissingExtraError, OutOfMemoryError, ScoringError
from weights_store.messages import first_line, logger

_log = logger(__name__)

FIXED_IDS, RESPONSE_ROWS, FLAT = "fixed_ids", "response_rows", "flat"

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the prefix cache: the least that vLLM's CPU back end likes; its default, 128, shares few prompts."""
_NUM_CHECKED = 8
_MEAN_TOLERANCE_NATS = 0.02
"""Mean difference of two ways that is rounding: bfloat16 moves by 2e-3 with the make-up of a batch, a row amiss by nats."""
_MAX_TOP_K = 256
"""The most that `score.top_k` may ask for; vLLM itself would stop at 20."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "No available memory for the cache blocks")


_READERS: dict[str, Callable[[Any, ScoredSequence], Scores]] = {
    FIXED_IDS: read_fixed_ids,
    RESPONSE_ROWS: read_rows,
    FLAT: read_flat,
}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the engine runs. Only `dtype` changes numbers."""

    dtype: str = "auto"
    batch_tokens: int = 4096
    kv_cache_gib: float = 2.0
    gpu_memory_share: float = 0.85
    tensor_parallel: int = 1
    way: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How continuations are sampled.

    Args:
        max_new_tokens: The most tokens of one; fewer where the model takes no more behind its prompt.
        temperature: 0.01 to 2, as vLLM takes it.
        top_k: Among how many of the likeliest tokens; 0 for all.
        top_p: Among the likeliest with this much probability together, 0 to 1.
        stop_ids: What ends a continuation, as its last token. vLLM adds those of the model's generation_config.json.
    """

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_ids: tuple[int, ...]


class VllmEngine:
    """One loaded model.

    Raises:
        InputError: vLLM cannot load the model.
        OutOfMemoryError: There is not enough memory for it.
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
            from vllm import EngineArgs, LLMEngine
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"scoring needs the package {error.name!r}, which is not installed; pip install 'tokenweights[score]' (GPU) or "
                "'tokenweights[score-cpu]'"
            ) from error

        placement: dict[str, Any] = (
            {"block_size": CPU_BLOCK_SIZE} if on_cpu else {"gpu_memory_utilization": settings.gpu_memory_share}
        )
        arguments = EngineArgs(
            model=str(model),
            dtype=settings.dtype,  # type: ignore[arg-type]
            max_num_batched_tokens=settings.batch_tokens,
            tensor_parallel_size=settings.tensor_parallel,
            enable_prefix_caching=True,
            enforce_eager=True,  # compiling costs more than it saves on prefill alone
            disable_log_stats=True,
            seed=0,
            skip_tokenizer_init=True,
            max_logprobs=_MAX_TOP_K,
            worker_extension_cls="pipeline.engine.response_rows.ResponseRows",
            **placement,
        )
        try:
            self._engine: Any = LLMEngine.from_engine_args(arguments)
        except Exception as error:
            text = first_line(error)
            if _is_out_of_memory(error):
                raise OutOfMemoryError(f"no memory for the model {model} in vLLM: {text}") from error
            if not isinstance(error, ValueError | OSError):
                raise
            raise InputError(f"vLLM cannot load the model {model}: {text}") from error
        self.max_tokens: int = self._engine.model_config.max_model_len - 1
        """Longest prompt + response that can be scored: the engine needs one free position."""
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        self.way = settings.way
        """The way in, None until the first sequences have been scored."""
        self._top_k: int | None = None  # that `way` was chosen for; None where it was set from outside
        self._keys = count()
        self._rows_installed = False

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in that this engine has: the fast one of its model runner, and the flat one."""
        return (FIXED_IDS if self._engine.vllm_config.use_v2_model_runner else RESPONSE_ROWS, FLAT)

    def why_not(self, way: str) -> str | None:
        """Return why this engine does not have one of the three ways; None where it has."""
        if way in self.ways:
            return None
        if way == RESPONSE_ROWS:
            return "vLLM runs its V2 model runner, this way is for V1"
        from vllm.triton_utils import HAS_TRITON

        why = "" if HAS_TRITON else ": it needs Triton, which has no back end for this machine"
        return f"vLLM runs its V1 model runner, this way is for V2{why}"

    def score(
        self, sequences: Sequence[ScoredSequence], progress: Callable[[int], None] = lambda num_tokens: None
    ) -> list[Reply]:
        """Return for each sequence log pi(y_t | x, y_<t) of its wanted tokens, and of the `top_k` likeliest ids in their place.

        A sequence whose reply breaks the contract has a `ScoringError` in its place; it never shifts its neighbours.

        Args:
            sequences: Those that share a beginning should stand side by side. All with one `top_k`; where it is another than
                before, the way is chosen anew.
            progress: Gets the number of wanted tokens of each sequence that is done.

        Raises:
            OutOfMemoryError: A step did not fit into memory. The engine is spoilt; one with a smaller budget may do.
            EngineError: A step failed otherwise, or vLLM does not take the requests. The engine is spoilt.
        """
        if not sequences:  # nothing to choose a way by either
            return []
        try:
            top_k = sequences[0].top_k
            if self.way is None or self._top_k not in (None, top_k):
                self.way, self._top_k = self._choose_way(sequences[:_NUM_CHECKED]), top_k
            return self._score(sequences, self.way or FLAT, progress)
        except EngineError:
            raise
        except Exception as error:
            raise _engine_error(error) from error

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        progress: Callable[[int], None] = lambda num_prompts: None,
    ) -> list[list[int]]:
        """Return one sampled continuation of each prompt as ids, at least one and with the stop id that ends it.

        Prompt and continuation can be scored: together they have `max_tokens` at most.

        Args:
            prompts: As ids, each shorter than `max_tokens`; those that share a beginning should stand side by side.
            sampling: How they are continued.
            seeds: Of each prompt its own, 0 to 2**63 - 1: with the same one it is continued alike whatever is beside it, as far
                as rounding goes, which moves with the make-up of a batch.
            progress: Gets the number of prompts that have come to their end, one by one.

        Raises:
            OutOfMemoryError: A step did not fit into memory. The engine is spoilt; one with a smaller budget may do.
            EngineError: A step failed otherwise, or vLLM does not take the requests. The engine is spoilt.
        """
        try:
            asked = {
                next(self._keys): (prompt, self._sampling_params(len(prompt), sampling, seed))
                for prompt, seed in zip(prompts, seeds, strict=True)
            }
            ids = self._continue(asked, progress)
            # What they leave in the cache reaches into the rows that are wanted when they are scored, see above.
            self._engine.reset_prefix_cache()
        except EngineError:
            raise
        except Exception as error:
            raise _engine_error(error) from error
        return [ids[key] for key in asked]

    def _continue(
        self, asked: Mapping[int, tuple[list[int], Any]], progress: Callable[[int], None]
    ) -> dict[int, list[int]]:
        """Run sampled requests so that no seeded prompt of V1 is computed in parts.

        Each part would use up random numbers: V1 takes them back by an offset that generators on the CPU do not have, and
        fails there. V2 draws by seed and place.
        """
        scheduler = self._engine.vllm_config.scheduler_config
        most = scheduler.max_num_batched_tokens
        is_v2 = self._engine.vllm_config.use_v2_model_runner
        whole = {
            key: request for key, request in asked.items() if is_v2 or len(request[0]) + request[1].max_tokens <= most
        }
        with _in_whole_prompts(scheduler) if not is_v2 else nullcontext():
            ids = self._sampled_ids(whole, progress)
        for key, (prompt, params) in asked.items():
            if key in whole:
                continue
            # Longer than a step: computed in parts without a seed, and then taken from the cache but for its last block.
            self._sampled_ids({next(self._keys): (prompt, _greedy_params())})
            ids |= self._sampled_ids({key: (prompt, params)}, progress)
        return ids

    def _sampled_ids(
        self,
        asked: Mapping[int, tuple[list[int], Any]],
        progress: Callable[[int], None] = lambda num_prompts: None,
    ) -> dict[int, list[int]]:
        self._add(asked)
        ids: dict[int, list[int]] = {}
        for output in self._outputs():
            ids[int(output.request_id)] = list(output.outputs[0].token_ids)
            progress(1)
        return ids

    def _sampling_params(self, prompt_tokens: int, sampling: Sampling, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=min(sampling.max_new_tokens, self.max_tokens - prompt_tokens),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stop_token_ids=list(sampling.stop_ids),
            seed=seed,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _choose_way(self, sample: Sequence[ScoredSequence]) -> str | None:
        """Return the way that this engine goes from now on; None when the sample had nothing to compare."""
        fast, top_k = self.ways[0], sample[0].top_k
        if top_k and fast == FIXED_IDS:
            _log.info(
                f"scoring by vLLM's flat prompt log-probs: {fast} cannot find the {top_k} likeliest tokens (score.top_k)"
            )
            return FLAT
        try:
            replies = self._score(sample, fast)
        except EngineError:  # in a step: the engine is spoilt
            raise
        except Exception as error:  # noqa: BLE001 - whatever another vLLM version makes of it, the slow way is left
            _log.info(f"scoring by vLLM's flat prompt log-probs: {fast} failed with {type(error).__name__}: {error}")
            return FLAT
        difference = _difference(replies, self._score(sample, FLAT))
        if difference is None:
            return None
        if difference <= _MEAN_TOLERANCE_NATS:
            likeliest = f", {top_k} likeliest tokens included" if top_k else ""
            _log.info(
                f"scoring by {fast}: within {difference:.1e} nats of flat prompt log-probs on {len(sample)} sequences"
                + likeliest
            )
            return fast
        _log.info(
            f"scoring by vLLM's flat prompt log-probs: {fast} differs from them by {difference:.2g} nats in the mean on "
            f"{len(sample)} sequences, expected at most {_MEAN_TOLERANCE_NATS}"
        )
        return FLAT

    def _score(
        self, sequences: Sequence[ScoredSequence], way: str, progress: Callable[[int], None] = lambda num_tokens: None
    ) -> list[Reply]:
        replies = self._ask(sequences, way, True, progress)
        again = [i for i, reply in enumerate(replies) if reply is None]
        for index, reply in zip(again, self._ask([sequences[i] for i in again], way, False), strict=True):
            replies[index] = (
                ScoringError("the engine took rows from its cache that it was told to compute")
                if reply is None
                else reply
            )
        return [reply for reply in replies if reply is not None]

    def _ask(
        self,
        sequences: Sequence[ScoredSequence],
        way: str,
        use_cache: bool,
        progress: Callable[[int], None] = lambda num_tokens: None,
    ) -> list[Reply | None]:
        """Run the sequences through the engine; None for one whose wanted rows were in the cache."""
        if not sequences:
            return []
        if way == RESPONSE_ROWS and not self._rows_installed:
            self._engine.collective_rpc("tokenweights_install")
            self._rows_installed = True
        asked = {next(self._keys): sequence for sequence in sequences}
        self._add(
            {
                key: (sequence.prompt_ids + sequence.response_ids, _params(key, sequence, way, use_cache))
                for key, sequence in asked.items()
            }
        )
        replies: dict[int, Reply | None] = {}
        try:
            for output in self._outputs():
                key, num_cached = int(output.request_id), output.num_cached_tokens or 0
                if num_cached > asked[key].first_row:
                    replies[key] = None
                elif way != RESPONSE_ROWS:  # at once: all flat log-probs of a chunk together would fill the memory
                    replies[key] = self._reply(way, output, asked[key])
                progress(asked[key].num_wanted)
        except EngineError:
            raise
        except Exception:
            self._abort(asked)
            raise
        if way == RESPONSE_ROWS:
            taken = self._engine.collective_rpc("tokenweights_take")[0]
            for key in asked.keys() - replies.keys():
                replies[key] = self._reply(way, taken.get(key), asked[key])
        return [replies[key] for key in asked]

    def _reply(self, way: str, given: Any, sequence: ScoredSequence) -> Reply:
        """Return what the engine has given for a sequence, read and checked, or what is wrong with it."""
        try:
            return checked(_READERS[way](given, sequence), sequence, self.vocab_size)
        except ScoringError as error:
            return error

    def _outputs(self) -> Iterator[Any]:
        """Yield what the engine finishes, until nothing is left.

        Raises:
            EngineError: A step failed.
        """
        while self._engine.has_unfinished_requests():
            try:
                finished = self._engine.step()
            except Exception as error:
                raise _engine_error(error) from error
            yield from finished

    def _add(self, requests: Mapping[int, tuple[list[int], Any]]) -> None:
        """Hand over all requests, ids and parameters by key, or none.

        Those before the one that vLLM refuses would run with the next that it takes.
        """
        from vllm.inputs import TokensPrompt

        try:
            for key, (ids, params) in requests.items():
                self._engine.add_request(str(key), TokensPrompt(prompt_token_ids=ids), params)
        except Exception:
            self._abort(requests)
            raise

    def _abort(self, keys: Iterable[int]) -> None:
        self._engine.abort_request([str(key) for key in keys])


def _params(key: int, sequence: ScoredSequence, way: str, use_cache: bool) -> Any:
    from pipeline.engine.response_rows import KEY

    asked: dict[str, Any]
    if way == FIXED_IDS:
        ids = np.array(sequence.response_ids[sequence.start :], np.int32)[:, None]
        asked = {"prompt_logprob_token_ids": ids, "prompt_logprob_start": sequence.first_row}
    elif way == RESPONSE_ROWS:
        asked = {"extra_args": {KEY: [key, sequence.first_row, sequence.top_k]}}
    else:
        asked = {"prompt_logprobs": sequence.top_k, "flat_logprobs": True}
    return _greedy_params(skip_reading_prefix_cache=not use_cache, **asked)


def _greedy_params(**asked: Any) -> Any:
    """Return those of a request for what its ids alone say: it samples the least that vLLM takes, for nobody."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **asked
    )


@contextmanager
def _in_whole_prompts(scheduler: Any) -> Iterator[None]:
    """Have vLLM compute each prompt in one step, for a while."""
    before = scheduler.enable_chunked_prefill
    scheduler.enable_chunked_prefill = False
    try:
        yield
    finally:
        scheduler.enable_chunked_prefill = before


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text.lower() in str(error).lower() for text in _OUT_OF_MEMORY)


def _engine_error(error: BaseException) -> EngineError:
    text = (str(error).strip().splitlines() or [""])[0]
    if _is_out_of_memory(error):
        return OutOfMemoryError(f"the engine ran out of memory: {text}")
    return EngineError(f"the engine failed: {type(error).__name__}: {text}")


def _difference(replies: list[Reply], expected: list[Reply]) -> float | None:
    """Return the mean difference in nats, infinite where one has an answer and the other none; None without any answer.

    Of the likeliest tokens the log-probs are compared, not the ids: of two that are as likely either may come first. They
    have a mean of their own, or they would outnumber the tokens themselves; the larger mean counts.
    """
    both = list(zip(replies, expected, strict=True))
    if any(isinstance(a, ScoringError) != isinstance(b, ScoringError) for a, b in both):
        return float("inf")
    answers = [(a, b) for a, b in both if isinstance(a, Scores) and isinstance(b, Scores)]
    if not answers:
        return None
    gaps = [np.concatenate([np.abs(a.logps - b.logps) for a, b in answers])]
    gaps.append(np.concatenate([np.abs(a.top_logps - b.top_logps).ravel() for a, b in answers]))
    return max(float(gap.mean()) for gap in gaps if gap.size)
